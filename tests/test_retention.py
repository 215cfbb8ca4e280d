"""Quota and time to live: blocks before tokens, the idle before the busy, nobody's fresh card."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storage.card import AgentId
from storage.errors import Fenced, StoreUnavailable
from storage.retention import MIN_IDLE_S, RetentionPolicy, apply_retention
from storage.spec import CompatibilityKey
from storage.usage import tenant_usage
from tests.sim_store import Disk, sim_store
from tests.store_contract import ALICE, KEY, template
from tests.test_collector import put, raw_block, with_blocks

HOUR = 3600.0
SIZE = len(raw_block(1))


class Place:
    """Agents s0, s1, … an hour apart, s0 the oldest; each with a block of its own and block 99."""

    def __init__(self, n_agents: int = 3) -> None:
        self.disk = Disk()
        self.store = sim_store(self.disk)
        self.cards = {}
        for number in range(n_agents):
            self.write(number)
            self.disk.clock += HOUR

    def write(self, number: int) -> None:
        agent = AgentId("acme", f"s{number}")
        card = self.cards.get(number) or self.store.claim(template(ALICE, agent)).card
        refs = (put(self.store, 99), put(self.store, number))
        self.cards[number] = self.store.commit(with_blocks(card, *refs)).card

    def apply(self, **policy):
        return apply_retention(sim_store(self.disk), RetentionPolicy(**policy))

    def state(self) -> dict[str, tuple[int, int]]:
        """agent -> (tokens, bytes)"""
        usage = tenant_usage(sim_store(self.disk), "acme")
        return {a.card.agent.session: (a.tokens, a.bytes) for a in usage.agents}


@pytest.fixture
def place():
    return Place()


FULL = (32, 2 * SIZE)
BARE = (32, 0)


def test_bytes_are_counted_once_and_as_shared(place):
    usage = tenant_usage(place.store, "acme")
    assert (usage.bytes, usage.shared_bytes) == (4 * SIZE, SIZE)
    assert [(a.bytes, a.shared_bytes, a.rows) for a in usage.agents] == [(2 * SIZE, SIZE, 32)] * 3
    place.store.delete(template(ALICE, AgentId("acme", "s0")))
    place.store.delete(template(ALICE, AgentId("acme", "s1")))
    usage = tenant_usage(place.store, "acme")
    assert (usage.bytes, usage.shared_bytes, len(usage.agents)) == (2 * SIZE, 0, 1)


def test_without_a_policy_nothing_happens(place):
    before = dict(place.disk.files)
    assert place.apply().stripped == []
    assert place.disk.files == before


def test_idle_agents_lose_their_blocks_and_keep_their_tokens(place):
    report = place.apply(idle_ttl_s=1.5 * HOUR)
    assert report.stripped == ["acme/s0", "acme/s1"]
    assert report.bytes == 2 * SIZE  # the shared block is still named by s2
    assert place.state() == {"s0": BARE, "s1": BARE, "s2": FULL}
    card = place.store.latest(AgentId("acme", "s0"), KEY).card
    assert (card.epoch, card.owner.node, card.codec) == (2, "retention", "q4")
    assert [p for p in place.disk.files if "/agents/" in p and p.endswith("01-00000001")] == []


def test_over_quota_the_least_recently_updated_lose_theirs(place):
    report = place.apply(quota_bytes=3 * SIZE)
    assert report.stripped == ["acme/s0"]
    assert (report.over, place.state()["s1"], place.state()["s0"]) == ({}, FULL, BARE)
    assert place.apply(quota_bytes=3 * SIZE).stripped == []
    assert place.apply(quota_bytes=1).stripped == ["acme/s1", "acme/s2"]
    assert place.state() == {"s0": BARE, "s1": BARE, "s2": BARE}


def test_tokens_go_last(place):
    policy = {"idle_ttl_s": 1.5 * HOUR, "token_ttl_s": 5 * HOUR}
    assert place.apply(**policy).deleted == []
    place.disk.clock += 4 * HOUR
    assert place.apply(**policy).deleted == []  # the clock began anew when the blocks went
    place.disk.clock += 2 * HOUR
    report = place.apply(**policy)
    assert sorted(report.deleted) == ["acme/s0", "acme/s1"]
    assert set(place.state()) == {"s2"}
    assert place.store.latest(AgentId("acme", "s0"), KEY).card.tombstone


def test_an_agent_that_was_just_updated_is_left_alone(place):
    place.write(0)
    place.disk.clock += MIN_IDLE_S - 1
    report = place.apply(quota_bytes=1, idle_ttl_s=1)
    assert report.stripped == ["acme/s1", "acme/s2"]
    assert report.over == {"acme": 2 * SIZE - 1}
    assert place.state()["s0"] == FULL


def test_an_agent_that_changed_since_it_was_looked_at_is_left_alone(place):
    """Its owner commits, or another claims it, between our look and our claim."""
    looked = []

    def step(operation: str, path: str) -> None:
        if operation == "list" and "/agents/acme/" in path:
            looked.append(path)
            if len(looked) == 4:  # after the three of the look
                place.write(0)

    report = apply_retention(sim_store(place.disk, step), RetentionPolicy(idle_ttl_s=1.5 * HOUR))
    assert report.stripped == ["acme/s1"]
    assert place.state()["s0"] == FULL
    place.write(0)  # still its owner's


def test_the_owner_of_a_stripped_agent_is_fenced_and_finds_its_tokens(place):
    place.apply(idle_ttl_s=1)
    with pytest.raises(Fenced):
        place.write(0)
    claim = place.store.claim(template(ALICE, AgentId("acme", "s0")))
    assert claim.card.branches[0].tokens == tuple(range(32))
    assert claim.card.branches[0].blocks == ()


def test_a_dry_run_only_tells(place):
    before = dict(place.disk.files)
    report = apply_retention(
        place.store, RetentionPolicy(idle_ttl_s=1.5 * HOUR, quota_bytes=2 * SIZE), dry_run=True
    )
    assert report.stripped == ["acme/s0", "acme/s1"]
    assert place.disk.files == before


def test_agents_of_other_models_are_kept_under_their_own_key(place):
    key = CompatibilityKey("99" * 32, KEY.tokenizer, KEY.rope, KEY.spec)
    agent = AgentId("acme", "s0")
    card = place.store.claim(replace(template(ALICE, agent), key=key)).card
    place.store.commit(with_blocks(card, put(place.store, 7)))
    place.disk.clock += HOUR
    place.apply(idle_ttl_s=1)
    assert place.store.latest(agent, key).card.owner.node == "retention"
    assert place.store.latest(agent, KEY).card.owner.node == "retention"


def test_what_cannot_be_read_or_written_is_skipped_and_named(place):
    other = sim_store(place.disk, signing_key=b"k" * 16)
    other.claim(template(ALICE, AgentId("acme", "signed")))
    place.disk.clock += HOUR
    store = sim_store(place.disk)
    create = store.files.create

    def refuse(path, raw):
        if AgentId("acme", "s1").digest(KEY.digest) in path:
            raise StoreUnavailable("sim", "no space")
        create(path, raw)

    store.files.create = refuse
    report = apply_retention(store, RetentionPolicy(idle_ttl_s=1))
    assert sorted(report.skipped) == ["acme", "acme/s1"]
    assert report.stripped == ["acme/s0", "acme/s2"]


def test_an_agent_with_blocks_never_loses_its_tokens(place):
    assert place.apply(token_ttl_s=1).deleted == []
    assert place.state() == {"s0": FULL, "s1": FULL, "s2": FULL}
