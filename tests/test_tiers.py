"""Rows in RAM, on the node's disk and in the shared store: reading, verifying, writing."""

from __future__ import annotations

import pytest

from storage.card import BlockRef, PartRef
from storage.codec import encode_rows, get_codec, tensor_bytes
from storage.errors import CorruptData
from storage.store import CacheStore
from storage.tiers import Tiers, pack_block, unpack_block
from tests.store_contract import AGENT, SPEC, flip, race, sample_rows

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
    return [n for n, run_id in enumerate(IDS) if tiers.pool.get((run_id, "full"))]


def write(tiers: Tiers, run_id: str, tensors) -> BlockRef:
    part = tiers.write(AGENT, run_id, "full", tensors)
    assert part is not None
    return BlockRef(run_id, 16, {"full": part})


def read(tiers: Tiers, run_id: str, ref: BlockRef | None):
    return tiers.read("acme", run_id, 16, "full", None, ref)


def same(ours, theirs) -> bool:
    return {k: x.tobytes() for k, x in ours.items()} == {k: x.tobytes() for k, x in theirs.items()}


def test_reading_falls_through_to_the_store_and_keeps_the_rows(tiers, store):
    ref = write(tiers, IDS[0], ROWS)
    assert tiers.pool.get((IDS[0], "full")) is None
    found = read(tiers, IDS[0], ref)
    assert same(found, ROWS)
    assert tiers.pool.get((IDS[0], "full")) is found
    store.files.fs.rm_file(store.block_path("acme", ref, "full"))
    assert read(tiers, IDS[0], ref) is found
    tiers.pool.evict_all()
    assert read(tiers, IDS[0], ref) is None
    assert read(tiers, IDS[0], None) is None


def test_rows_that_another_wrote_are_adopted(tiers, store):
    ref = write(tiers, IDS[0], ROWS)
    other = {name: x[:, ::-1] for name, x in ROWS.items()}
    assert write(tiers, IDS[0], other) == ref
    assert same(read(tiers, IDS[0], ref), ROWS)


def test_damaged_bytes_are_refused_and_do_not_enter_the_pool(tiers, store):
    ref = write(tiers, IDS[0], ROWS)
    path = store.block_path("acme", ref, "full")
    raw = store.files.fs.cat_file(path)
    for bad in (b"", raw[:-1], *(flip(raw, at) for at in (0, 20, 5000, len(raw) - 1))):
        store.files.fs.pipe_file(path, bad)
        with pytest.raises(CorruptData) as caught:
            read(tiers, IDS[0], ref)
        assert caught.value.path == path
    assert (in_ram(tiers), tiers.pool.used_bytes) == ([], 0)


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
        read(tiers, IDS[0], ref)
    assert caught.value.reason == reason
    assert in_ram(tiers) == []


def test_metadata_and_tensors_must_agree():
    raw = pack_block(Q4, IDS[0], 15, ROWS)
    with pytest.raises(CorruptData, match=r"tensor full\.0\.k\.codes"):
        unpack_block(raw, "p", SPEC, Q4, IDS[0], 15)
    good = pack_block(Q4, IDS[0], 16, ROWS)
    assert same(unpack_block(good, "p", SPEC, Q4, IDS[0], 16), ROWS)


def test_a_block_the_card_has_wrong_is_refused(tiers, store):
    ref = write(tiers, IDS[0], ROWS)
    part = ref.parts["full"]
    wrong = BlockRef(IDS[0], 16, {"full": PartRef(part.sha256, part.size + 1)})
    with pytest.raises(CorruptData, match=f"the card says {part.size + 1}"):
        read(tiers, IDS[0], wrong)


def test_readers_and_writers_may_share_the_pool(tiers):
    refs = [write(tiers, run_id, ROWS) for run_id in IDS]

    def work(i: int) -> bool:
        sound = True
        for n in range(40):
            ref = refs[(i + n) % 8]
            tiers.pool.put((ref.id, "full"), ROWS, pinned=True)
            sound &= same(read(tiers, ref.id, ref), ROWS)
            tiers.pool.unpin((ref.id, "full"))
        return sound

    assert race(4, work) == [True] * 4
    assert tiers.pool.used_bytes == SIZE * len(in_ram(tiers)) <= 3 * SIZE
