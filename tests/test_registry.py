"""The registry repeats what cards and replicas claim: the newest epoch wins."""

import time
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from actors.engines.fake_engine import FakeEngine
from actors.report import AgentReport
from cluster.placement import Location
from cluster.registry import Registry
from storage.card import AgentId, BranchCard, Owner
from storage.claims import new_card
from storage.store import CacheStore, LoadedCard

A, B = AgentId("t", "a"), AgentId("t", "b")


def report(agent: AgentId = A, epoch: int = 1, **values: object) -> AgentReport:
    fields: dict[str, object] = {
        "generation": 1, "branches": 1, "tokens": 10, "rows": 9, "in_ram": True,
        "ram_bytes": 100, "stored_bytes": 200, "last_used": 5.0,
    }  # fmt: skip
    fields |= values
    fields.setdefault("durable_rows", fields["rows"])
    return AgentReport(agent=agent, epoch=epoch, **fields)  # type: ignore[arg-type]


def test_an_unknown_agent_is_nowhere() -> None:
    registry = Registry()
    assert registry.get(A) is None
    assert registry.location(A) == Location()
    assert registry.count("n1") == len(registry) == 0
    registry.forget(A)
    registry.node_lost("n1")


def test_the_newest_epoch_wins_in_any_order() -> None:
    for order in ((("n1", 1), ("n2", 2)), (("n2", 2), ("n1", 1))):
        registry = Registry()
        for node, epoch in order:
            registry.reported(node, [report(epoch=epoch)])
        record = registry.get(A)
        assert record is not None
        assert (record.node, record.epoch) == ("n2", 2)
        assert (registry.count("n1"), registry.count("n2")) == (0, 1)


def test_the_owners_later_word_replaces_its_earlier_one() -> None:
    registry = Registry()
    registry.reported("n1", [report(rows=9)])
    registry.reported("n1", [report(rows=20, in_ram=False)])
    assert registry.location(A) == Location("n1", 20, False)
    assert registry.count("n1") == 1


def test_a_decision_counts_until_the_next_report() -> None:
    registry = Registry()
    registry.reported("n1", [report()])
    registry.assign(A, "n2")
    assert registry.location(A) == Location("n2", 9, False)
    record = registry.get(A)
    assert record is not None
    assert record.ram_bytes == 0
    registry.assign(B, "n2")
    assert registry.location(B) == Location("n2", 0, False)
    assert (registry.count("n1"), registry.count("n2")) == (0, 2)


def test_assigning_an_agent_where_it_is_keeps_what_is_known() -> None:
    registry = Registry()
    registry.reported("n1", [report()])
    registry.assign(A, "n1")
    assert registry.location(A) == Location("n1", 9, True)


def test_the_agents_of_a_lost_node_are_in_the_store() -> None:
    registry = Registry()
    registry.reported("n1", [report(A)])
    registry.reported("n2", [report(B)])
    registry.node_lost("n1")
    assert registry.location(A) == Location(None, 9, False)
    record = registry.get(A)
    assert record is not None
    assert (record.state, record.ram_bytes, record.stored_bytes) == ("warm", 0, 200)
    assert registry.location(B).node == "n2"
    assert (registry.count("n1"), registry.count("n2")) == (0, 1)


def test_states() -> None:
    registry = Registry()
    for values, state in (
        ({"in_ram": True}, "hot"),
        ({"in_ram": False}, "warm"),
        ({"in_ram": False, "rows": 0}, "cold"),
    ):
        registry.reported("n1", [report(**values)])
        record = registry.get(A)
        assert record is not None
        assert record.state == state


def test_agents_are_listed_per_tenant_latest_first() -> None:
    registry = Registry()
    other = AgentId("someone-else", "a")
    registry.reported("n1", [report(A, last_used=1), report(B, last_used=2), report(other)])
    assert [record.agent for record in registry.all("t")] == [B, A]
    assert [record.agent for record in registry.all("someone-else")] == [other]
    registry.forget(A)
    assert [record.agent for record in registry.all("t")] == [B]
    assert registry.count("n1") == 2


def test_an_agent_stays_until_its_turn_ends_or_its_time_is_up() -> None:
    registry = Registry()
    assert not registry.stays(A, 0.0)
    registry.turn_began(A, "t1", 100.0)
    assert registry.stays(A, 99.9)
    assert not registry.stays(A, 100.0)
    assert not registry.stays(B, 99.9)
    registry.turn_began(A, "t1", 200.0)
    registry.turn_began(A, "t2", 150.0)
    registry.turn_ended(A, "t1")
    assert registry.stays(A, 149.9)
    registry.turn_ended(A, "t1")
    assert registry.stays(A, 149.9)
    registry.turn_ended(A, "t2")
    assert not registry.stays(A, 0.0)


def test_turns_whose_end_nobody_told_count_until_they_must_be_over() -> None:
    registry = Registry()
    assert registry.turns(A, 0.0) == []
    registry.turn_began(A, "gone", 100.0)
    registry.turn_began(A, "runs", 150.0)
    assert registry.turns(A, 99.9) == [100.0, 150.0]
    assert registry.turns(A, 100.0) == [150.0]
    assert registry.turns(A, 0.0) == [150.0]
    registry.turn_ended(A, "runs")
    assert registry.turns(A, 0.0) == []


def test_where_an_operator_settled_an_agent_outlives_its_turns() -> None:
    registry = Registry()
    registry.settled(A, 60.0)
    registry.turn_began(A, "t1", 600.0)
    registry.turn_ended(A, "t1")
    assert registry.stays(A, 59.9)
    assert not registry.stays(A, 60.0)


def test_a_forgotten_agent_does_not_stay() -> None:
    registry = Registry()
    registry.assign(A, "n1")
    registry.settled(A, 100.0)
    registry.turn_began(A, "t1", 100.0)
    registry.forget(A)
    assert not registry.stays(A, 0.0)


def test_what_a_prompt_adds_to_the_last_turn_is_new() -> None:
    registry = Registry()
    registry.reported("n1", [report(rows=50)])
    registry.spoken(A, 4000)
    assert registry.new_tokens(A, 4400) == 100
    registry.spoken(B, 4000)  # never heard of: it may have been deleted meanwhile
    assert registry.new_tokens(B, 4400) == 1100


def test_without_a_last_turn_to_go_by_what_the_rows_do_not_hold_is_new() -> None:
    registry = Registry()
    assert registry.new_tokens(A, 4000) == 1000
    registry.reported("n1", [report(rows=50)])
    assert registry.new_tokens(A, 4000) == 950
    registry.spoken(A, 8000)
    assert registry.new_tokens(A, 4000) == 950  # not the last turn's continuation: a branch


def test_a_message_is_never_free() -> None:
    registry = Registry()
    registry.reported("n1", [report(rows=5000)])
    assert registry.new_tokens(A, 4) == registry.new_tokens(B, 0) == 16


def test_a_card_of_the_store_counts_where_nobody_has_reported(tmp_path: Path) -> None:
    engine = FakeEngine()
    store = CacheStore(str(tmp_path))
    template = new_card(A, engine.key, "f16", Owner("n9", "life"))
    claimed = store.claim(template).card
    branches = (
        BranchCard(0, tuple(range(30)), last_used=1.0),
        BranchCard(1, tuple(range(40)), last_used=2.0),
    )
    loaded: LoadedCard = store.commit(replace(claimed, generation=1, branches=branches))
    registry = Registry()
    registry.found_in_store(loaded)
    record = registry.get(A)
    assert record is not None
    assert (record.node, record.epoch, record.generation) == (None, 1, 1)
    assert (record.tokens, record.branches, record.rows) == (40, 2, 0)
    registry.reported("n1", [report(epoch=1)])
    registry.found_in_store(loaded)
    assert registry.location(A).node == "n1"


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("report"), st.integers(0, 3), st.integers(0, 2), st.integers(1, 5)),
            st.tuples(st.just("assign"), st.integers(0, 3), st.integers(0, 2), st.just(0)),
            st.tuples(st.just("lost"), st.just(0), st.integers(0, 2), st.just(0)),
            st.tuples(st.just("forget"), st.integers(0, 3), st.just(0), st.just(0)),
        )
    )
)
def test_counts_are_those_of_the_records(steps: list[tuple[str, int, int, int]]) -> None:
    registry = Registry()
    epochs: dict[AgentId, int] = {}
    for what, number, node, epoch in steps:
        agent, name = AgentId("t", f"s{number}"), f"n{node}"
        if what == "report":
            registry.reported(name, [report(agent, epoch)])
        elif what == "assign":
            registry.assign(agent, name)
        elif what == "lost":
            registry.node_lost(name)
            assert registry.count(name) == 0
        else:
            registry.forget(agent)
            epochs.pop(agent, None)
        records = registry.all("t")
        assert len(records) == len(registry)
        for name in ("n0", "n1", "n2"):
            assert registry.count(name) == sum(record.node == name for record in records)
        for record in records:
            assert record.epoch >= epochs.get(record.agent, 0)
            epochs[record.agent] = record.epoch


def test_rows_that_only_the_lost_node_had_are_lost_with_it() -> None:
    registry = Registry()
    registry.reported("n1", [report(rows=9, durable_rows=5)])
    assert registry.location(A) == Location("n1", 9, True, 4)
    registry.node_lost("n1")
    assert registry.location(A) == Location(None, 5, False)


def test_counts_are_told_as_they_change() -> None:
    told: list[tuple[str, int]] = []
    registry = Registry(lambda node, n: told.append((node, n)))
    registry.assign(A, "n1")
    registry.assign(A, "n1")
    registry.assign(B, "n1")
    registry.assign(A, "n2")
    registry.forget(B)
    assert told == [("n1", 1), ("n1", 2), ("n1", 1), ("n2", 1), ("n1", 0)]


def test_characters_of_a_token_are_measured() -> None:
    registry = Registry()
    registry.tokenized(100, 10)  # too short: mostly template
    assert registry.new_tokens(A, 4000) == 1000
    for _ in range(200):
        registry.tokenized(4000, 2000)
    assert registry.new_tokens(A, 4000) in (1999, 2000)
    for _ in range(200):
        registry.tokenized(4000, 1)  # nonsense is bounded
    assert registry.chars_per_token <= 16


def test_a_turn_that_ended_while_it_was_placed_does_not_hold_its_agent() -> None:
    """The ingress says that a client went away while a slow migration is still under way."""
    registry, agent = Registry(), AgentId("t", "s")
    registry.turn_ended(agent, "gone")
    registry.turn_began(agent, "gone", 600.0)
    assert not registry.stays(agent, 1.0)
    registry.turn_began(agent, "next", 600.0)
    assert registry.stays(agent, 1.0)


def test_the_agents_of_one_node_are_found_without_a_look_at_all_the_others() -> None:
    """A drain asks ten times a second."""
    registry, others = Registry(), 100_000
    for n in range(others):
        registry.reported(f"n{n % 100}", [report(AgentId("t", f"s{n}"))])
    registry.reported("few", [report(A), report(B)])
    began = time.process_time()
    for _ in range(1000):
        assert [record.agent for record in registry.on("few")] == [A, B]
    assert time.process_time() - began < 0.5  # 5 ms each, if it looked at all
    assert len(registry.on("n7")) == registry.count("n7") == others // 100
    registry.node_lost("n7")
    assert registry.on("n7") == []
    assert registry.count("n7") == 0
