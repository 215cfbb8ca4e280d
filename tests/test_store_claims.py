"""What claims and commits do when a store was emptied, filled again, or damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storage.card import BlockRef, BranchCard, Reply
from storage.errors import CorruptData, Fenced, StoreUnavailable
from tests.sim_store import Disk, sim_store
from tests.store_contract import AGENT, ALICE, BOB, KEY, flip, template, tokens_of, with_tokens


@pytest.fixture
def disk():
    return Disk()


@pytest.fixture
def faults():
    return []


@pytest.fixture
def store(disk, faults):
    return sim_store(disk, on_fault=faults.append)


def cards(disk) -> list[str]:
    return sorted(path for path in disk.files if "/agents/" in path)


def test_a_commit_into_an_emptied_store_is_fenced(store, disk):
    card = store.commit(with_tokens(store.claim(template(ALICE)).card, 1)).card
    disk.files.clear()
    with pytest.raises(Fenced):
        store.commit(with_tokens(card, 1, 2))
    assert disk.files == {}
    assert store.claim(template(ALICE)).card.epoch == 1


def test_a_commit_into_a_store_that_was_emptied_and_claimed_again_is_fenced(store, disk):
    card = store.commit(with_tokens(store.claim(template(ALICE)).card, 1)).card
    disk.files.clear()
    sim_store(disk).claim(template(BOB))
    with pytest.raises(Fenced):
        store.commit(with_tokens(card, 666))
    assert tokens_of(store) is None


def test_a_commit_without_its_claim_is_fenced(store, disk):
    card = store.commit(with_tokens(store.claim(template(ALICE)).card, 1)).card
    disk.remove(cards(disk)[0])
    with pytest.raises(Fenced):
        store.commit(with_tokens(card, 2))


def test_a_claim_is_read_when_all_later_generations_are_corrupt(store, disk, faults):
    store.commit(with_tokens(store.claim(template(ALICE)).card, 1))
    claimed = store.claim(template(BOB)).card
    store.commit(with_tokens(store.commit(with_tokens(claimed, 1, 2)).card, 1, 2, 3))
    for path in cards(disk)[1:]:
        disk.files[path] = (flip(disk.files[path][0], -1), disk.clock)
    assert store.latest(AGENT, KEY).card == claimed
    assert tokens_of(store) == (1,)
    assert [type(fault) for fault in faults[:2]] == [CorruptData, CorruptData]
    assert faults[0].path == cards(disk)[2]


def test_a_claim_that_lost_to_one_that_has_gone_on_is_fenced(disk):
    """The winner's claim is gone before the loser can read it back."""
    other = sim_store(disk)

    def step(operation: str, path: str) -> None:
        if operation == "create" and "/agents/" in path and not cards(disk):
            other.claim(template(BOB))
        elif operation == "read" and path.endswith("00000001-00000000.safetensors"):
            disk.remove(path)

    with pytest.raises(Fenced):
        sim_store(disk, step).claim(template(ALICE))


def test_a_doubtful_create_is_told(store, disk, faults):
    create = store.files.create

    def doubtful(path, raw):
        create(path, raw)
        raise OSError("the folder cannot be synced")

    store.files.create = doubtful
    card = store.claim(template(ALICE)).card
    assert store.latest(AGENT, KEY).card == card
    assert [type(fault) for fault in faults] == [StoreUnavailable]
    assert "cannot be synced" in str(faults[0])


def test_a_claim_can_let_go_of_the_rows(store):
    part = store.put_block("acme", "3c" * 32, "full", b"rows")
    ref = BlockRef("3c" * 32, 16, {"full": part})
    tail = BlockRef("3c" * 32, 3, {"full": part})
    branch = BranchCard(
        0, tuple(range(20)), (ref,), (tail,), (Reply(1, 2),), checkpoints=(16,), last_used=7
    )
    card = replace(store.claim(template(ALICE)).card, cache_salt="salt")
    card = store.commit(replace(card, generation=1, branches=(branch,))).card
    claim = store.claim(template(BOB), rows=False)
    assert claim.previous == card
    assert claim.card.branches == (replace(branch, blocks=(), tail=(), checkpoints=()),)
    assert claim.card.cache_salt == "salt"


def test_a_claim_that_expects_a_card_wants_exactly_that(store):
    card = store.claim(template(ALICE)).card
    seen = store.latest(AGENT, KEY).ref
    store.commit(with_tokens(card, 1))
    with pytest.raises(Fenced):
        store.claim(template(BOB), after=1, expect=seen)
    with pytest.raises(Fenced):
        store.delete(template(BOB), after=1, expect=seen)
    assert tokens_of(store) == (1,)
    now = store.latest(AGENT, KEY).ref
    assert store.claim(template(BOB), after=1, expect=now).card.epoch == 2


@pytest.mark.parametrize(("told", "looks"), [(False, ["list", "read"]), (True, [])])
def test_a_claim_takes_few_requests(disk, told, looks):
    steps = []
    store = sim_store(disk, step=lambda operation, path: steps.append(operation))
    store.commit(with_tokens(store.claim(template(ALICE)).card, 1))
    known = store.latest(AGENT, KEY) if told else None
    steps.clear()
    store.claim(template(BOB), known=known)
    assert steps == [*looks, "create", "list"]
    assert tokens_of(store) == (1,)


def test_what_a_claim_and_a_commit_tell_is_what_the_store_has(store):
    claim = store.claim(template(ALICE))
    assert claim.stored == store.latest(AGENT, KEY)
    assert store.commit(with_tokens(claim.card, 1)) == store.latest(AGENT, KEY)


@pytest.mark.parametrize("claims", [1, 2])
def test_a_claim_that_does_not_look_first_is_fenced_by_any_other(store, claims):
    """Its epoch is taken, or its owner has gone on and removed it."""
    store.commit(with_tokens(store.claim(template(ALICE)).card, 1))
    known = store.latest(AGENT, KEY)
    for _ in range(claims):
        store.commit(with_tokens(store.claim(template(BOB)).card, 1))
    with pytest.raises(Fenced):
        store.claim(template(ALICE), known=known)
    assert store.latest(AGENT, KEY).card.owner == template(BOB).owner
