"""A node's disk: a cache within its budget, and a journal whose blocks are pinned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from storage.backends import temporary_name
from storage.card import AgentId, BlockRef, BranchCard, CacheCard
from storage.errors import CorruptData
from storage.local import LocalTier
from storage.store import CacheStore
from tests.store_contract import AGENT, ALICE, KEY, template

RAW = bytes(range(256)) * 4  # 1 KiB
IDS = [f"{n:064x}" for n in range(16)]


def tier(tmp_path: Path, budget: int = 4 * len(RAW), daily: int = 0) -> LocalTier:
    return LocalTier(CacheStore(f"file://{tmp_path}/local"), KEY, budget, daily)


def raw(n: int) -> bytes:
    return RAW[n:] + RAW[:n]


def put(local: LocalTier, n: int, agent=AGENT) -> BlockRef | None:
    ref = local.put(agent, IDS[n], "full", raw(n))
    return BlockRef(IDS[n], 16, {"full": ref}) if ref is not None else None


def cached(local: LocalTier, n: int, tmp_path: Path) -> BlockRef:
    """A block as it comes from a shared store."""
    shared = CacheStore(f"file://{tmp_path}/shared")
    ref = BlockRef(IDS[n], 16, {"full": shared.put_block("acme", IDS[n], "full", raw(n))})
    local.keep("acme", ref, "full", raw(n))
    return ref


def here(local: LocalTier, *refs: BlockRef | None) -> list[bool]:
    return [ref is not None and local.get("acme", ref, "full") is not None for ref in refs]


def card(generation: int, *refs: BlockRef | None) -> CacheCard:
    named = tuple(ref for ref in refs if ref is not None)
    branch = BranchCard(0, tuple(range(16 * len(named))), named)
    return replace(template(ALICE), epoch=2, generation=generation, branches=(branch,))


def test_a_block_that_is_held_stays_for_the_next_card(tmp_path):
    """Another agent's block, named by ours from its next card on."""
    local = tier(tmp_path)
    ours = AgentId("acme", "ours")
    held, other = (cached(local, n, tmp_path) for n in range(2))
    part = held.parts["full"]
    assert local.hold(ours, held.id, "full", part)
    assert not local.hold(ours, "99" * 32, "full", part)
    for n in range(2, 6):
        cached(local, n, tmp_path)
    assert here(local, held, other) == [True, False]
    local.write_card(replace(card(1, held), agent=ours))
    for n in range(6, 9):
        cached(local, n, tmp_path)
    assert here(local, held) == [True]
    local.forget(ours, 2)
    for n in range(2, 6):
        cached(local, n, tmp_path)
    assert here(local, held) == [False]


def test_the_least_recently_used_leave_first(tmp_path):
    local = tier(tmp_path)
    refs = [cached(local, n, tmp_path) for n in range(4)]
    assert here(local, refs[0]) == [True]
    refs.append(cached(local, 4, tmp_path))
    assert here(local, *refs) == [True, False, True, True, True]
    assert local.used_bytes == 4 * len(RAW)
    files = list((tmp_path / "local" / "blocks").rglob("*.safetensors"))
    assert len(files) == 4


def test_what_the_shared_store_lacks_never_leaves(tmp_path):
    local = tier(tmp_path)
    mine = [put(local, n) for n in range(4)]
    assert put(local, 4) is None
    assert not local.writes
    assert local.pinned_bytes == 4 * len(RAW)
    local.write_card(card(1, *mine))
    assert put(local, 4) is None
    assert here(local, *mine) == [True] * 4


def test_a_card_that_the_shared_store_has_unpins_its_blocks(tmp_path):
    local = tier(tmp_path)
    mine = [put(local, n) for n in range(3)]
    local.write_card(card(1, *mine))
    fresh = put(local, 3)  # for the next card
    local.drop_card(card(1, *mine))
    assert local.card(AGENT) is None
    assert local.pinned_bytes == len(RAW)
    others = [cached(local, n, tmp_path) for n in range(4, 8)]
    assert here(local, *mine) == [False] * 3
    assert here(local, fresh, *others[1:]) == [True] * 4


def test_a_newer_card_survives_the_end_of_an_older_one(tmp_path):
    local = tier(tmp_path)
    first, second = put(local, 0), put(local, 1)
    local.write_card(card(1, first))
    local.write_card(card(2, first, second))
    local.drop_card(card(1, first))
    found = local.card(AGENT)
    assert found is not None
    assert found.card.generation == 2
    assert local.pinned_bytes == 2 * len(RAW)
    local.drop_card(card(2, first, second))
    assert (local.card(AGENT), local.pinned_bytes) == (None, 0)


def test_blocks_that_no_card_names_any_more_are_unpinned(tmp_path):
    """Segments that were joined to a block, rows that were cut."""
    local = tier(tmp_path)
    segment, block = put(local, 0), put(local, 1)
    local.write_card(card(1, segment))
    local.write_card(card(2, block))
    assert local.pinned_bytes == len(RAW)


def test_an_agent_that_is_another_nodes_holds_nothing(tmp_path):
    local = tier(tmp_path)
    first = put(local, 0)
    local.write_card(card(1, first))
    put(local, 1)
    local.forget(AGENT, 2)
    assert (local.card(AGENT), local.pinned_bytes) == (None, 0)
    assert here(local, first) == [True]


def test_after_a_restart_pins_and_bytes_are_the_same(tmp_path):
    local = tier(tmp_path)
    mine = [put(local, n) for n in range(2)]
    local.write_card(card(1, *mine))
    orphan = put(local, 2)
    again = tier(tmp_path)
    assert again.used_bytes == 3 * len(RAW)
    assert again.pinned_bytes == 2 * len(RAW)
    assert [c.generation for c in again.cards()] == [1]
    assert here(again, *mine, orphan) == [True] * 3
    smaller = tier(tmp_path, budget=2 * len(RAW))
    assert here(smaller, *mine, orphan) == [True, True, False]


def test_what_a_killed_writer_left_is_removed_at_start(tmp_path):
    ref = put(tier(tmp_path), 0)
    (path,) = (tmp_path / "local" / "blocks").rglob("*.safetensors")
    left = path.with_name(temporary_name())
    left.write_bytes(b"half")
    again = tier(tmp_path)
    assert not left.exists()
    assert here(again, ref) == [True]
    assert again.used_bytes == len(RAW)


def test_two_agents_pin_one_block_twice(tmp_path):
    local = tier(tmp_path)
    other = replace(AGENT, session="session-2")
    ref = put(local, 0)
    assert put(local, 0, other) == ref
    local.write_card(card(1, ref))
    local.write_card(replace(card(1, ref), agent=other))
    assert local.used_bytes == len(RAW)
    local.drop_card(card(1, ref))
    assert local.pinned_bytes == len(RAW)
    local.forget(other, 2)
    assert local.pinned_bytes == 0


def test_a_damaged_file_is_refused_and_forgotten(tmp_path):
    local = tier(tmp_path)
    ref = put(local, 0)
    assert ref is not None
    path = Path(local.store.block_path("acme", ref, "full"))
    path.write_bytes(raw(1))
    with pytest.raises(CorruptData, match="sha256"):
        local.get("acme", ref, "full")
    assert local.get("acme", ref, "full") is None
    assert not path.exists()
    assert local.used_bytes == 0
    assert put(local, 0) == ref
    assert here(local, ref) == [True]


def test_a_day_may_write_so_much_and_no_more(tmp_path, monkeypatch):
    local = tier(tmp_path, budget=1 << 20, daily=2 * len(RAW))
    first, second = put(local, 0), put(local, 1)
    assert None not in (first, second)
    assert put(local, 2) is None
    assert not local.writes
    assert local.written_bytes == 2 * len(RAW)
    monkeypatch.setattr("storage.wear._today", lambda: "2101-01-01")
    assert put(local, 2) is not None
    assert local.writes


def test_a_restart_does_not_forget_what_the_day_has_written(tmp_path, monkeypatch):
    monkeypatch.setattr("storage.wear._NOTE_BYTES", len(RAW))
    local = tier(tmp_path, budget=1 << 20, daily=2 * len(RAW))
    put(local, 0)
    put(local, 1)
    again = tier(tmp_path, budget=1 << 20, daily=2 * len(RAW))
    assert put(again, 2) is None
    note = tmp_path / "local" / "written"
    assert json.loads(note.read_text())["bytes"] == 2 * len(RAW)
    note.write_text("{")
    assert put(tier(tmp_path, budget=1 << 20, daily=2 * len(RAW)), 2) is not None


def test_only_a_directory_of_this_machine_will_do():
    with pytest.raises(ValueError, match="directory of this machine"):
        LocalTier(CacheStore("memory://local"), KEY, 1)
