"""The pool of encoded rows: its budget, its pins, and what it reads from the store."""

from __future__ import annotations

import pytest

from storage.card import BlockRef, PartRef
from storage.codec import encode_rows, get_codec, tensor_bytes
from storage.errors import CorruptData
from storage.store import CacheStore
from storage.tiers import Tiers, pack_block, unpack_block
from tests.store_contract import SPEC, flip, race, sample_rows

Q4 = get_codec("q4")
ROWS = encode_rows(SPEC, Q4, sample_rows(16))
SIZE = tensor_bytes(ROWS)
IDS = [f"{n:064x}" for n in range(8)]


@pytest.fixture
def store(tmp_path):
    return CacheStore(f"file://{tmp_path}/store")


@pytest.fixture
def tiers(store):
    return Tiers(store, SPEC, Q4, pool_bytes=3 * SIZE)


def in_ram(tiers: Tiers) -> list[int]:
    return [n for n, run_id in enumerate(IDS) if run_id in tiers._entries]


def same(ours, theirs) -> bool:
    return {k: x.tobytes() for k, x in ours.items()} == {k: x.tobytes() for k, x in theirs.items()}


def test_the_least_recently_used_leave_first(tiers):
    for n in range(3):
        tiers.put(IDS[n], ROWS, pinned=False)
    assert tiers.used_bytes == 3 * SIZE == tiers.pool_bytes
    assert tiers.resident(IDS[0]) is ROWS
    tiers.put(IDS[3], ROWS, pinned=False)
    assert in_ram(tiers) == [0, 2, 3]
    tiers.put(IDS[2], ROWS, pinned=False)
    tiers.put(IDS[4], ROWS, pinned=False)
    assert in_ram(tiers) == [2, 3, 4]
    assert tiers.used_bytes == 3 * SIZE
    assert tiers.resident(IDS[0]) is None


def test_bytes_count_not_entries(tiers):
    small = encode_rows(SPEC, Q4, sample_rows(1))
    for n in range(2):
        tiers.put(IDS[n], ROWS, pinned=False)
    for n in range(2, 8):
        tiers.put(IDS[n], small, pinned=False)
    assert in_ram(tiers) == list(range(8))
    assert tiers.used_bytes == 2 * SIZE + 6 * SIZE // 16
    assert (tiers.size_of(IDS[0]), tiers.size_of("none")) == (SIZE, 0)


def test_pins_hold_even_above_the_budget(tiers):
    for n in range(5):
        tiers.put(IDS[n], ROWS, pinned=True)
    assert tiers.used_bytes == 5 * SIZE
    tiers.put(IDS[5], ROWS, pinned=False)
    tiers.evict_all()
    assert in_ram(tiers) == [0, 1, 2, 3, 4]
    tiers.unpin(IDS[3])
    assert in_ram(tiers) == [0, 1, 2, 4]
    tiers.unpin(IDS[0])
    tiers.unpin(IDS[1])
    assert in_ram(tiers) == [1, 2, 4]
    tiers.evict_all()
    assert in_ram(tiers) == [2, 4]
    assert tiers.used_bytes == 2 * SIZE


def test_every_pin_needs_its_unpin(tiers):
    tiers.put(IDS[0], ROWS, pinned=True)
    tiers.put(IDS[0], ROWS, pinned=True)
    tiers.put(IDS[0], ROWS, pinned=False)
    assert tiers.used_bytes == SIZE
    tiers.unpin(IDS[0])
    tiers.evict_all()
    assert in_ram(tiers) == [0]
    tiers.unpin(IDS[0])
    tiers.unpin(IDS[0])
    tiers.unpin("unknown")
    tiers.put(IDS[0], ROWS, pinned=True)
    tiers.evict_all()
    assert in_ram(tiers) == [0]
    tiers.unpin(IDS[0])
    tiers.evict_all()
    assert (in_ram(tiers), tiers.used_bytes) == ([], 0)


def test_reading_falls_through_to_the_store_and_keeps_the_rows(tiers, store):
    ref = tiers.write("acme", IDS[0], 16, ROWS)
    assert tiers.resident(IDS[0]) is None
    found = tiers.read("acme", IDS[0], 16, ref)
    assert same(found, ROWS)
    assert tiers.resident(IDS[0]) is found
    store.files.fs.rm_file(store.block_path("acme", ref, "full"))
    assert tiers.read("acme", IDS[0], 16, ref) is found
    tiers.evict_all()
    assert tiers.read("acme", IDS[0], 16, ref) is None
    assert tiers.read("acme", IDS[0], 16, None) is None


def test_rows_that_another_wrote_are_adopted(tiers, store):
    ref = tiers.write("acme", IDS[0], 16, ROWS)
    other = {name: x[:, ::-1] for name, x in ROWS.items()}
    assert tiers.write("acme", IDS[0], 16, other) == ref
    assert same(tiers.read("acme", IDS[0], 16, ref), ROWS)


def test_damaged_bytes_are_refused_and_do_not_enter_the_pool(tiers, store):
    ref = tiers.write("acme", IDS[0], 16, ROWS)
    path = store.block_path("acme", ref, "full")
    raw = store.files.fs.cat_file(path)
    for bad in (b"", raw[:-1], *(flip(raw, at) for at in (0, 20, 5000, len(raw) - 1))):
        store.files.fs.pipe_file(path, bad)
        with pytest.raises(CorruptData) as caught:
            tiers.read("acme", IDS[0], 16, ref)
        assert caught.value.path == path
    assert (in_ram(tiers), tiers.used_bytes) == ([], 0)


@pytest.mark.parametrize(
    ("run_id", "rows", "codec", "part", "reason"),
    [
        (IDS[1], 16, "q4", "full", f"id is '{IDS[1]}', not '{IDS[0]}'"),
        (IDS[0], 15, "q4", "full", "rows is 15, not 16"),
        (IDS[0], 16, "f16", "full", "codec is 'f16', not 'q4'"),
        (IDS[0], 16, "q4", "sliding", "part is 'sliding', not 'full'"),
    ],
)
def test_a_sound_file_that_is_not_what_was_asked_for_is_refused(
    tiers, store, run_id, rows, codec, part, reason
):
    codec = get_codec(codec)
    raw = pack_block(codec, run_id, rows, encode_rows(SPEC, codec, sample_rows(rows), part), part)
    ref = BlockRef(IDS[0], 16, {"full": store.put_block("acme", IDS[0], "full", raw)})
    with pytest.raises(CorruptData) as caught:
        tiers.read("acme", IDS[0], 16, ref)
    assert caught.value.reason == reason
    assert in_ram(tiers) == []


def test_metadata_and_tensors_must_agree():
    raw = pack_block(Q4, IDS[0], 15, ROWS)
    with pytest.raises(CorruptData, match=r"tensor full\.0\.k\.codes"):
        unpack_block(raw, "p", SPEC, Q4, IDS[0], 15)
    good = pack_block(Q4, IDS[0], 16, ROWS)
    assert same(unpack_block(good, "p", SPEC, Q4, IDS[0], 16), ROWS)


def test_a_block_the_card_has_wrong_is_refused(tiers, store):
    ref = tiers.write("acme", IDS[0], 16, ROWS)
    part = ref.parts["full"]
    wrong = BlockRef(IDS[0], 16, {"full": PartRef(part.sha256, part.size + 1)})
    with pytest.raises(CorruptData, match=f"the card says {part.size + 1}"):
        tiers.read("acme", IDS[0], 16, wrong)


def test_readers_and_writers_may_share_the_pool(tiers):
    refs = [tiers.write("acme", run_id, 16, ROWS) for run_id in IDS]

    def work(i: int) -> bool:
        sound = True
        for n in range(40):
            ref = refs[(i + n) % 8]
            tiers.put(ref.id, ROWS, pinned=True)
            sound &= same(tiers.read("acme", ref.id, 16, ref), ROWS)
            tiers.unpin(ref.id)
        return sound

    assert race(4, work) == [True] * 4
    assert tiers.used_bytes == SIZE * len(in_ram(tiers)) <= 3 * SIZE
