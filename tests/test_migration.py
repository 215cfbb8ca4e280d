"""A migration's calls, in order, and who owns the agent when one of them goes wrong."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.config import ReplicaConfig
from actors.errors import AgentMoved, EngineFault
from actors.replica import ModelReplica
from actors.turn import TurnFinished, TurnMoved
from cluster.errors import MigrationFailed
from cluster.migration import Migration, migrate
from storage.card import AgentId
from storage.errors import Fenced, StoreUnavailable
from tests.fake_cluster import Handle, lost
from tests.loops import WAIT, Stream, agent_id, run, settle, start, user

AGENT = agent_id()
N = 400  # tokens of a reply that is under way for a second or more


class Silence(Exception):
    """No answer."""


class Side:
    """One side of a migration. Calls are noted when they arrive; `instead` and `after` say what
    goes wrong in place of a call, or when it has done its work."""

    def __init__(self, node: str, calls: list[str], real: ModelReplica | None = None) -> None:
        self.node, self.calls, self.real = node, calls, real
        self.instead: dict[str, Exception] = {}
        self.after: dict[str, Exception] = {}

    async def _call(self, method: str, agent: AgentId) -> Any:
        self.calls.append(f"{self.node} {method}")
        await self._fail(self.instead.get(method))
        result = await getattr(self.real, method)(agent) if self.real else 7
        await self._fail(self.after.get(method))
        return result

    async def _fail(self, error: Exception | None) -> None:
        if isinstance(error, Silence):
            await asyncio.Event().wait()
        if error is not None:
            raise error

    def prefetch(self, agent: AgentId) -> Any:
        return self._call("prefetch", agent)

    def freeze(self, agent: AgentId) -> Any:
        return self._call("freeze", agent)

    def adopt(self, agent: AgentId) -> Any:
        return self._call("adopt", agent)

    def thaw(self, agent: AgentId) -> Any:
        return self._call("thaw", agent)

    def release(self, agent: AgentId) -> Any:
        return self._call("release", agent)


class Pair:
    """An agent's way from a to b. Where a call is not answered on purpose, a test sets the time
    that is lost with it."""

    def __init__(self, *real: ModelReplica) -> None:
        self.calls: list[str] = []
        self.timeout_s = WAIT
        self.a, self.b = (
            Side(node, self.calls, replica)
            for node, replica in zip("ab", real or (None, None), strict=True)
        )

    def migrate(self, *, source: bool = True) -> Migration:
        async def go() -> Migration:
            pair = ("a", Handle(self.a)) if source else None
            try:
                return await migrate(AGENT, pair, ("b", Handle(self.b)), self.timeout_s)
            finally:
                # Calls that nobody waits for.
                others = asyncio.all_tasks() - {asyncio.current_task()}
                await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), WAIT)

        return asyncio.run(go())

    def fails(self, message: str) -> None:
        with pytest.raises(MigrationFailed, match=message):
            self.migrate()


# ---- the calls


def test_the_source_freezes_the_target_adopts_the_source_releases() -> None:
    pair = Pair()
    done = pair.migrate()
    assert pair.calls == ["b prefetch", "a freeze", "b adopt", "a release"]
    assert (done.source, done.target, done.epoch) == ("a", "b", 7)
    assert 0 <= done.freeze_s < WAIT


def test_rows_that_cannot_be_fetched_ahead_are_read_later() -> None:
    pair = Pair()
    pair.b.instead["prefetch"] = StoreUnavailable("file:///s", "gone")
    assert pair.migrate().epoch == 7
    assert pair.calls == ["b prefetch", "a freeze", "b adopt", "a release"]


def test_a_source_whose_engine_died_is_asked_no_more() -> None:
    pair = Pair()
    pair.a.instead["freeze"] = EngineFault("the replica's loop has ended")
    assert pair.migrate().epoch == 7
    assert pair.calls == ["b prefetch", "a freeze", "b adopt"]


def test_without_a_source_the_target_takes_what_the_store_has() -> None:
    pair = Pair()
    done = pair.migrate(source=False)
    assert pair.calls == ["b prefetch", "b adopt"]
    assert (done.source, done.target, done.epoch) == (None, "b", 7)


def test_a_source_that_is_silent_is_thawed_and_the_target_not_asked() -> None:
    """It may have frozen the agent without a word, or do so when it wakes."""
    pair = Pair()
    pair.a.instead["freeze"] = Silence()
    pair.timeout_s = 0.05
    pair.fails(r"^a does not answer: no answer in 0\.05 s$")
    assert pair.calls == ["b prefetch", "a freeze", "a thaw"]


@pytest.mark.parametrize("error", [lost(), AgentMoved("not owned here")])
def test_a_source_that_is_dead_or_not_the_owner_is_asked_no_more(error: Exception) -> None:
    pair = Pair()
    pair.a.instead["freeze"] = error
    assert pair.migrate().epoch == 7
    assert pair.calls == ["b prefetch", "a freeze", "b adopt"]


@pytest.mark.parametrize(
    "error",
    [
        Silence(),
        lost(),
        Fenced(str(AGENT), 2),
        StoreUnavailable("cards", "the disk is full"),
        EngineFault("the engine broke"),
    ],
)
def test_the_source_is_thawed_when_the_target_cannot_adopt(error: Exception) -> None:
    pair = Pair()
    pair.b.instead["adopt"] = error
    pair.timeout_s = 0.3
    pair.fails(f"^b could not take agent {AGENT}: ")
    assert pair.calls == ["b prefetch", "a freeze", "b adopt", "a thaw"]


def test_a_source_that_did_not_freeze_is_not_thawed() -> None:
    pair = Pair()
    pair.a.instead["freeze"] = lost()
    pair.b.instead["adopt"] = lost()
    pair.fails("^b could not take agent")
    assert pair.calls == ["b prefetch", "a freeze", "b adopt"]


def test_the_operator_hears_of_the_target_when_the_thaw_fails_too() -> None:
    pair = Pair()
    pair.b.instead["adopt"] = StoreUnavailable("cards", "the disk is full")
    pair.a.instead["thaw"] = lost()
    pair.fails("^b could not take agent .*the disk is full$")


@pytest.mark.parametrize("error", [Silence(), lost(), EngineFault("the engine broke")])
def test_a_release_that_is_lost_does_not_undo_the_move(error: Exception) -> None:
    pair = Pair()
    pair.a.instead["release"] = error
    pair.timeout_s = 0.3
    assert pair.migrate().epoch == 7
    assert pair.calls == ["b prefetch", "a freeze", "b adopt", "a release"]


# ---- the owner, on real replicas that run a turn


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    config = ReplicaConfig(
        model="fake://?step_delay=0.003",
        store=tmp_path.as_uri(),
        codec="f16",
        n_ctx=512,
        slots=2,
        pool_bytes=1 << 20,
    )
    replicas = [ModelReplica(config, node) for node in "ab"]
    for replica in replicas:
        replica._loop.engine.vocab.eog = frozenset()  # a reply is as long as it may be
    yield Pair(*replicas)
    for replica in replicas:
        replica._loop.close()


def real(side: Side) -> ModelReplica:
    assert side.real is not None
    return side.real


def state(side: Side) -> str | None:
    memory = real(side)._memory.get(AGENT)
    return memory.state if memory is not None else None


def speaking(side: Side) -> Stream:
    """A long reply, of which some has been said."""
    stream = start(real(side)._loop, [user("Hello.")], n=N)
    stream.take(5)
    return stream


def goes_on(pair: Pair, stream: Stream) -> None:
    """The turn ends on a as if nothing had been, and the agent is a's. By a thaw: an agent that
    nobody thaws stays frozen for longer than this takes."""
    began = time.monotonic()
    answer = stream.result()
    assert time.monotonic() - began < 10.0
    assert isinstance(answer.last, TurnFinished)
    assert len(answer.ids) == N
    assert (state(pair.a), state(pair.b)) == ("owned", None)


def has_moved(pair: Pair, stream: Stream) -> None:
    """The turn ends on a as moved, and the agent is b's, with its memory."""
    answer = stream.result()
    assert isinstance(answer.last, TurnMoved)
    assert 5 <= len(answer.ids) < N
    assert (state(pair.a), state(pair.b)) == (None, "owned")
    assert run(real(pair.b)._loop, [user("Hello.")]).cached > 0


def test_a_migration_moves_the_owner(pair: Pair) -> None:
    stream = speaking(pair.a)
    assert pair.migrate().epoch == 2
    has_moved(pair, stream)


@pytest.mark.parametrize("when", ["instead", "after"])
def test_the_source_goes_on_after_a_freeze_without_an_answer(pair: Pair, when: str) -> None:
    stream = speaking(pair.a)
    getattr(pair.a, when)["freeze"] = Silence()
    pair.timeout_s = 0.3
    pair.fails("^a does not answer")
    goes_on(pair, stream)


def test_the_source_goes_on_when_the_target_cannot_adopt(pair: Pair) -> None:
    stream = speaking(pair.a)
    pair.b.instead["adopt"] = StoreUnavailable("cards", "the disk is full")
    pair.fails("the disk is full")
    goes_on(pair, stream)


@pytest.mark.parametrize("error", [Silence(), lost()])
def test_a_target_that_claimed_without_an_answer_owns_the_agent(
    pair: Pair, error: Exception
) -> None:
    """The operator hears of a failure; the thawed source's claim fails, and it releases."""
    stream = speaking(pair.a)
    pair.b.after["adopt"] = error
    pair.timeout_s = 2.0  # the freeze, too, must have been answered by then
    pair.fails("^b could not take agent")
    has_moved(pair, stream)


def test_the_target_owns_the_agent_of_a_source_that_died_before_it_froze(pair: Pair) -> None:
    """One that was only taken for dead speaks on to nobody, and what it commits is not read."""
    stream = speaking(pair.a)
    pair.a.instead["freeze"] = lost()
    assert pair.migrate().epoch == 2
    assert state(pair.b) == "owned"
    stream.result()
    settle(real(pair.a)._loop)
    store, key = real(pair.b)._memory.store, real(pair.b)._memory.key
    assert store.epoch(AGENT, key) == 2
    assert run(real(pair.b)._loop, [user("Hello.")]).reason == "length"
    assert store.epoch(AGENT, key) == 2


def test_the_target_owns_the_agent_of_a_source_that_never_heard_the_release(pair: Pair) -> None:
    """At the deadline of the frozen agent the source's claim fails, and it releases."""
    stream = speaking(pair.a)
    pair.a.instead["release"] = lost()
    assert pair.migrate().epoch == 2
    assert (state(pair.a), state(pair.b)) == ("frozen", "owned")
    real(pair.a)._loop.handoff._deadlines[AGENT] = 0.0
    has_moved(pair, stream)
