"""BlockStore: variants, sliding parts, parts that are absent, and what a card may name."""

from __future__ import annotations

import pytest

from storage import cache_file
from storage.blocks import WRITER_WINDOW_S, block_name, fresh_variant
from storage.cache_file import PAGE, sha256
from storage.card import BlockRef, BranchCard, PartRef
from storage.codec import encode_rows, get_codec
from storage.condemned import MAX_AGE_S
from storage.errors import CorruptData
from storage.tiers import pack_block, unpack_block
from tests.sim_store import Disk, sim_store
from tests.store_contract import SPEC, sample_rows

ID = "3c" * 32


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def store(disk):
    return sim_store(disk)


def put(store, raw=b"the rows", part="full", block_id=ID):
    return BlockRef(block_id, 16, {part: store.blocks.put("acme", block_id, part, raw)})


def test_a_part_that_a_reference_lacks_is_a_miss(store):
    ref = put(store)
    assert store.get_block("acme", ref, "sliding") is None
    assert "none" in store.block_path("acme", ref, "sliding")


def test_a_full_variant_is_adopted_and_a_sliding_one_only_when_it_is_equal(store, disk):
    assert put(store, b"others") == put(store, b"mine")
    first, second = put(store, b"5 rows", "sliding"), put(store, b"all rows", "sliding")
    assert first != second
    assert put(store, b"5 rows", "sliding") == first
    assert put(store, b"all rows", "sliding") == second
    assert len(disk.files) == 3


def test_a_fresh_variant_holds_the_same_rows_under_another_name():
    codec = get_codec("q4")
    tensors = encode_rows(SPEC, codec, sample_rows(16), "full")
    raw = pack_block(codec, ID, 16, tensors)
    one, two = fresh_variant(raw), fresh_variant(raw)
    assert len({sha256(raw), sha256(one), sha256(two)}) == 3
    again = unpack_block(one, "p", SPEC, codec, ID, 16)
    assert {name: x.tobytes() for name, x in again.items()} == {
        name: x.tobytes() for name, x in tensors.items()
    }
    assert (8 + int.from_bytes(one[:8], "little")) % PAGE == 0
    with pytest.raises(CorruptData):
        fresh_variant(b"no block")


def test_secure_reads_what_neither_the_card_before_nor_the_writer_vouches_for(store, disk):
    ref = put(store)
    (path,) = disk.files
    name = path.rsplit("/", 1)[1]
    none = frozenset()
    assert store.blocks.secure("acme", ref, none) == ref
    kept = disk.files.pop(path)
    assert store.blocks.secure("acme", ref, none) == ref  # put a moment ago
    disk.clock += WRITER_WINDOW_S + 1
    assert store.blocks.secure("acme", ref, frozenset({name})) == ref  # the card before names it
    assert store.blocks.secure("acme", ref, none) is None
    disk.files[path] = kept
    assert store.blocks.secure("acme", ref, none) == ref
    disk.files[path] = (b"the rowz", kept[1])
    assert store.blocks.secure("acme", ref, none) == ref  # verified a moment ago
    disk.clock += WRITER_WINDOW_S + 1
    assert store.blocks.secure("acme", ref, none) is None


def test_a_window_that_is_gone_leaves_the_rest_of_the_block(store, disk):
    full, sliding = put(store), put(store, b"window", "sliding")
    ref = BlockRef(ID, 16, {**full.parts, **sliding.parts})
    disk.remove(store.block_path("acme", sliding, "sliding"))
    disk.clock += WRITER_WINDOW_S + 1
    assert store.blocks.secure("acme", ref, frozenset()) == full


def test_a_branch_ends_where_a_block_is_gone(store, disk):
    refs = [put(store, b"x", block_id=f"{n:02x}" * 32) for n in range(4)]
    branch = BranchCard(0, (1, 2), tuple(refs[:2]), tuple(refs[2:]), checkpoints=(16, 32, 64))
    none = frozenset()
    assert store.blocks.secure_branch("acme", branch, none) == branch
    disk.clock += WRITER_WINDOW_S + 1
    disk.remove(store.block_path("acme", refs[2], "full"))
    found = store.blocks.secure_branch("acme", branch, none)
    assert (found.blocks, found.tail, found.checkpoints) == (tuple(refs[:2]), (), (16, 32))
    assert found.tokens == (1, 2)
    disk.clock += WRITER_WINDOW_S + 1
    disk.remove(store.block_path("acme", refs[0], "full"))
    found = store.blocks.secure_branch("acme", branch, none)
    assert (found.blocks, found.tail, found.checkpoints) == ((), (), ())


def test_writers_know_of_a_list_within_seconds(store, disk):
    ref = put(store)
    name = block_name(ID, "full", ref.parts["full"].sha256)
    sim_store(disk).condemned.publish("acme", "condemned", {name: 8})
    assert store.condemned.names("acme") == frozenset()
    disk.clock += MAX_AGE_S + 0.1
    assert store.condemned.names("acme") == {name}
    assert store.condemned.names("other") == frozenset()


def test_lists_are_read_once(disk):
    reads: list[str] = []
    store = sim_store(disk, lambda operation, path: reads.append(operation))
    sim_store(disk).condemned.publish("acme", "condemned", {"x": 1})
    for _ in range(3):
        assert store.condemned.names("acme") == {"x"}
        disk.clock += MAX_AGE_S + 1
    assert reads == ["list", "read", "list", "list"]


def test_what_a_writer_remembers_is_bounded(store, disk):
    for number in range(50):
        put(store, b"x", block_id=f"{number:02x}" * 32)
        disk.clock += WRITER_WINDOW_S / 10
    assert len(store.blocks._ours) <= 12


def test_a_size_that_the_reference_does_not_say_is_corrupt(store):
    ref = put(store)
    longer = BlockRef(ID, 16, {"full": PartRef(ref.parts["full"].sha256, 9)})
    with pytest.raises(CorruptData, match="the card says 9"):
        store.get_block("acme", longer, "full")
    assert cache_file.sha256(b"the rows") == ref.parts["full"].sha256
