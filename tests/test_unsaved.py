"""What a commit could not store, without a local tier: tried again when the store is back, before a
stop, and now and then; reported until then."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.branches import AgentMemory
from actors.engines.fake_engine import FakeEngine
from actors.loop import ReplicaLoop
from actors.report import status_of
from actors.unsaved import Unsaved
from storage.errors import StoreUnavailable
from storage.store import CacheStore
from tests.loops import WAIT, Answer, agent_id, make_loop, memory_of, run, settle, start, talk, user

LONG = "Tell me about the sea, the wind and the old harbour of the town. " * 10


class LostStore(CacheStore):
    """Takes neither blocks nor cards while told so; while all of it is gone, it has no answer."""

    no_blocks = no_cards = False
    gone = False

    def __init__(self, url: str) -> None:
        super().__init__(url)
        names = self.files.names
        self.files.names = lambda *at: self._check(self.gone) or names(*at)  # type: ignore

    def _check(self, fails: bool) -> None:
        if fails:
            raise StoreUnavailable(self.url, "no answer")

    def put_block(self, *block: Any) -> Any:
        self._check(self.gone or self.no_blocks)
        return super().put_block(*block)

    def commit(self, card: Any) -> Any:
        self._check(self.gone or self.no_cards)
        return super().commit(card)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LostStore:
    monkeypatch.setattr("actors.outage._PAUSE_S", 0.01)
    return LostStore(str(tmp_path / "store"))


@pytest.fixture
def loops() -> Iterator[list[ReplicaLoop]]:
    made: list[ReplicaLoop] = []
    yield made
    for loop in made:
        if loop.alive:
            loop.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def two_turns_without(loop: ReplicaLoop, store: LostStore) -> Answer:
    """After one that was stored; the last of them is returned."""
    messages: list[dict[str, str]] = []
    talk(loop, messages, LONG)
    settle(loop)
    assert loop.memory.is_stored(agent_id())
    store.gone = True
    talk(loop, messages, "And the ships?")
    last = talk(loop, messages, LONG)
    settle(loop)
    assert not loop.memory.is_stored(agent_id())
    return last


def everything_of(store: LostStore, last: Answer) -> None:
    """Another replica goes on with all that was said."""
    loop = make_loop(FakeEngine(4), CacheStore(store.url), node="n1")
    try:
        said = loop.memory.open(agent_id()).branches[0]
        assert said.tokens == last.prompt + last.ids
        assert said.rows == len(said.tokens) - 1
    finally:
        loop.close()


def test_after_an_outage_all_is_stored_without_a_further_turn(
    store: LostStore, loops: list[ReplicaLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.unsaved._FIRST_PAUSE_S", 3600.0)  # the outage's end counts
    loop = make_loop(FakeEngine(4), store)
    loops.append(loop)
    last = two_turns_without(loop, store)
    assert loop.memory.outage.lasts
    store.gone = False
    wait_for(lambda: loop.memory.is_stored(agent_id()))
    everything_of(store, last)


@pytest.mark.parametrize("how", ["flush", "close"])
def test_a_stop_after_an_outage_loses_nothing(
    store: LostStore, loops: list[ReplicaLoop], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("actors.unsaved._FIRST_PAUSE_S", 3600.0)
    loop = make_loop(FakeEngine(4), store)
    loops.append(loop)
    last = two_turns_without(loop, store)
    monkeypatch.setattr(loop.memory.outage, "_lasts", True)  # nobody has seen that it is over
    monkeypatch.setattr(loop.memory.outage, "_answers", lambda: False)
    store.gone = False
    if how == "flush":
        loop.call(loop.flush).result(WAIT).result(WAIT)
    else:
        loop.close()
    assert loop.memory.is_stored(agent_id())
    everything_of(store, last)


@pytest.mark.parametrize("what", ["no_blocks", "no_cards"])
def test_a_write_that_failed_alone_is_tried_again(
    store: LostStore, loops: list[ReplicaLoop], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("actors.unsaved._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("actors.unsaved._LONGEST_PAUSE_S", 0.05)
    loop = make_loop(FakeEngine(4), store)
    loops.append(loop)
    setattr(store, what, True)
    last = run(loop, [user(LONG)])
    settle(loop)
    failures = loop.memory.faults["store_unavailable"]
    wait_for(lambda: loop.memory.faults["store_unavailable"] > failures + 1)
    assert not loop.memory.outage.lasts
    assert not loop.memory.is_stored(agent_id())
    setattr(store, what, False)
    wait_for(lambda: loop.memory.is_stored(agent_id()))
    everything_of(store, last)


def test_an_agent_that_speaks_is_left_to_its_turns_end(
    store: LostStore, loops: list[ReplicaLoop]
) -> None:
    """Between a turn's beginning and its first commit its tokens and its rows are not a pair."""
    loop = make_loop(FakeEngine(4, step_delay=0.005), store)
    loops.append(loop)
    store.no_cards = True
    first = run(loop, [user("short")])
    settle(loop)
    memory = memory_of(loop)
    turn = start(loop, [user("short"), {"role": "assistant", "content": first.text}, user("And?")])
    turn.take(2)
    before = memory.card
    loop.call(loop.flush).result(WAIT).result(WAIT)
    assert memory.card is before
    store.no_cards = False
    turn.result()
    settle(loop)
    assert loop.memory.is_stored(agent_id())


@pytest.mark.parametrize("what", ["no_blocks", "no_cards"])
def test_an_agent_that_is_forgotten_during_its_commit_is_not_kept(
    store: LostStore, loops: list[ReplicaLoop], what: str
) -> None:
    loop = make_loop(FakeEngine(4), store)
    loops.append(loop)
    setattr(store, what, True)
    commit = store.commit

    def forgotten(card: Any) -> Any:
        loop.memory.forget(memory_of(loop))
        return commit(card)

    store.commit = forgotten  # type: ignore[method-assign]
    run(loop, [user("short")])
    settle(loop)
    assert loop.memory.get(agent_id()) is None
    assert loop.memory.commits.lag() == (0, 0)


def test_what_lags_is_reported_without_a_local_tier(
    store: LostStore, loops: list[ReplicaLoop]
) -> None:
    loop = make_loop(FakeEngine(4), store)
    loops.append(loop)
    store.no_blocks = True
    run(loop, [user(LONG)])
    settle(loop)
    status = status_of(loop, 0.0, 0.0, loop.memory.agents(), None, {})
    assert status.lagging_agents == 1
    assert status.lagging_bytes == loop.memory.tiers.pool.used_bytes > 0
    store.no_blocks = False
    loop.call(loop.flush).result(WAIT).result(WAIT)
    status = status_of(loop, 0.0, 0.0, loop.memory.agents(), None, {})
    assert (status.lagging_agents, status.lagging_bytes) == (0, 0)


def test_many_that_are_tried_again_keep_no_turn_waiting(
    store: LostStore, loops: list[ReplicaLoop]
) -> None:
    loop = make_loop(FakeEngine(4), store)
    loops.append(loop)
    sessions = [f"s{i}" for i in range(100)]
    store.no_blocks = True
    for session in sessions:
        run(loop, [user("short")], session=session, n=2)
    settle(loop)
    assert loop.memory.commits.lag()[0] == 100
    entered, gate, put = threading.Event(), threading.Event(), store.put_block
    store.put_block = lambda *b: entered.set() or (gate.wait(WAIT) and put(*b))  # type: ignore
    store.no_blocks = False
    try:
        loop.memory.commits._unsaved.soon()
        assert entered.wait(WAIT)
        run(loop, [user("short")], session="new", n=2)
        deadline = time.monotonic() + 5.0
        while loop.call(lambda: loop.draining).result(WAIT):
            assert time.monotonic() < deadline
        assert loop.memory.persister.pending < 10
    finally:
        gate.set()
    stored = [agent_id(session) for session in (*sessions, "new")]
    while not all(map(loop.memory.is_stored, stored)):
        loop.call(lambda: None).result(WAIT)  # an idle loop looks less often
        assert time.monotonic() < deadline + WAIT


def test_pauses_grow_up_to_a_bound_and_begin_anew_after_success() -> None:
    now = 0.0
    unsaved = Unsaved(lambda: now)
    memory = AgentMemory(agent_id(), None, "cold")

    def tries(until: float) -> list[float]:
        nonlocal now
        found = []
        while now < until:
            now += 0.25
            if unsaved.due(9):
                found.append(now)
        return found

    unsaved.add(memory)
    found = tries(120.0)
    assert found[:4] == [0.5, 1.5, 3.5, 7.5]
    assert found[-1] - found[-2] == 30.0
    unsaved.discard(memory)
    assert not unsaved.due(9)
    unsaved.add(memory)
    assert tries(now + 1.0) == [120.5]
    unsaved.soon()
    assert unsaved.due(9) == [memory]


def test_a_round_is_handed_out_in_parts_and_the_pause_begins_after_it() -> None:
    now = 10.0
    unsaved = Unsaved(lambda: now)
    a, b, c = (AgentMemory(agent_id(name), None, "cold") for name in "abc")
    for memory in (a, b, c):
        unsaved.add(memory)
    unsaved.soon()
    assert unsaved.due(0) == []
    assert unsaved.due(2) == [a, b]
    now = 99.0
    assert unsaved.due(2) == [c]
    assert unsaved.due(2) == []
    now = 100.0
    assert unsaved.due(1) == [a]
    unsaved.soon()  # what was handed out may have failed
    assert unsaved.due(9) == [a, b, c]
