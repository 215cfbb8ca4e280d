"""A migration's calls, in order, and who owns the agent when one of them goes wrong."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import actors.replica as replica_module
from actors.branches import AgentMemory, Before, Branch
from actors.config import ReplicaConfig
from actors.coverage import missing
from actors.engines.fake_engine import FakeEngine
from actors.errors import AgentMoved, EngineFault
from actors.exporter import Held, Tail
from actors.handoff import Copied, Frozen
from actors.preload import Fetched
from actors.replica import ModelReplica
from actors.turn import Resume, TurnFinished, TurnMoved
from cluster.disks import NodeDisk
from cluster.errors import MigrationFailed
from cluster.migration import Migration, migrate
from storage.card import AgentId, BlockRef, BranchCard, CacheCard, CardRef, OpenTurn, Owner, Reply
from storage.claims import new_card
from storage.errors import Fenced, StoreUnavailable
from storage.reader import LoadedCard
from storage.spec import CompatibilityKey
from tests.fake_cluster import Handle, lost
from tests.loops import (
    WAIT,
    Answer,
    Stream,
    agent_id,
    evict,
    memory_of,
    run,
    settle,
    start,
    talk,
    user,
)

pytestmark = pytest.mark.long

AGENT = agent_id()
KEYS = "default = " + "07" * 32
HELD = Held(0, 100)
NOWHERE: Any = object()  # a disk that nobody reads
N = 400  # tokens of a reply that is under way for a second or more


class Silence(Exception):
    """No answer."""


class Side:
    """One side of a migration. Calls are noted when they arrive; `instead` and `after` say what
    goes wrong in place of a call, or when it has done its work."""

    def __init__(self, node: str, calls: list[str], real: ModelReplica | None = None) -> None:
        self.node, self.calls, self.real = node, calls, real
        self.pause_s = 0.0
        self.instead: dict[str, Exception] = {}
        self.after: dict[str, Exception] = {}
        # Without a real one: its answers, the last of them for ever.
        self.told: dict[str, list[Any]] = {
            "precopy": [Copied(0)],
            "prefetch": [Fetched(HELD, 90, 80)],
            "freeze": [Frozen()],
        }

    async def _call(self, method: str, agent: AgentId, *more: Any) -> Any:
        self.calls.append(f"{self.node} {method}")
        await asyncio.sleep(self.pause_s)
        await self._fail(self.instead.get(method))
        told = self.told.get(method, [7])
        answer = told[0] if len(told) == 1 else told.pop(0)
        result = await getattr(self.real, method)(agent, *more) if self.real else answer
        await self._fail(self.after.get(method))
        return result

    async def _fail(self, error: Exception | None) -> None:
        if isinstance(error, Silence):
            await asyncio.Event().wait()
        if error is not None:
            raise error

    def precopy(self, agent: AgentId, *near: Any) -> Any:
        return self._call("precopy", agent, *near)

    def prefetch(self, agent: AgentId, was: Before) -> Any:
        return self._call("prefetch", agent, was)

    def freeze(self, agent: AgentId, held: Held | None, near: bool) -> Any:
        self.held = held
        return self._call("freeze", agent, held, near)

    def adopt(self, agent: AgentId, *near: Any) -> Any:
        return self._call("adopt", agent, *near)

    def thaw(self, agent: AgentId) -> Any:
        return self._call("thaw", agent)

    def release(self, agent: AgentId) -> Any:
        return self._call("release", agent)


class Disk:
    """The local tier of a, as b reads it: by the calls of cluster.disks, without Ray. `spoil` goes
    over what it sends."""

    node = "a"

    def __init__(self, replica: ModelReplica) -> None:
        local = replica._memory.tiers.local
        assert local is not None
        self.real, self.calls = NodeDisk(local.store.files.root), 0
        self.spoil: Callable[[bytes | None], bytes | None] = lambda raw: raw

    def get(self, tenant: str, ref: BlockRef, part: str) -> bytes | None:
        self.calls += 1
        stored = ref.parts[part]
        return self.spoil(self.real.block(tenant, ref.id, part, stored.sha256, stored.size))

    def sample(self, size: int) -> bytes:
        return self.real.sample(size)


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

    def migrate(
        self, *, source: bool = True, prefetch_s: float = WAIT, **options: Any
    ) -> Migration:
        async def go() -> Migration:
            pair = ("a", Handle(self.a)) if source else None
            try:
                target = ("b", Handle(self.b))
                return await migrate(
                    AGENT, pair, target, self.timeout_s, prefetch_s=prefetch_s, **options
                )
            finally:
                # Calls that nobody waits for.
                others = asyncio.all_tasks() - {asyncio.current_task()}
                await asyncio.wait_for(asyncio.gather(*others, return_exceptions=True), WAIT)

        return asyncio.run(go())

    def fails(self, message: str, **options: Any) -> None:
        with pytest.raises(MigrationFailed, match=message):
            self.migrate(**options)


# ---- the calls


def test_the_source_freezes_the_target_adopts_the_source_releases() -> None:
    pair = Pair()
    done = pair.migrate()
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "b adopt", "a release"]
    assert (done.source, done.target, done.epoch) == ("a", "b", 7)
    assert 0 <= done.freeze_s < WAIT


def test_rows_that_cannot_be_fetched_ahead_are_read_later() -> None:
    pair = Pair()
    pair.b.instead["prefetch"] = StoreUnavailable("file:///s", "gone")
    assert pair.migrate().epoch == 7
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "b adopt", "a release"]


def test_a_source_whose_engine_died_is_asked_no_more() -> None:
    pair = Pair()
    pair.a.instead["freeze"] = EngineFault("the replica's loop has ended")
    assert pair.migrate().epoch == 7
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "b adopt"]


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
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "a thaw"]


@pytest.mark.parametrize("error", [lost(), AgentMoved("not owned here")])
def test_a_source_that_is_dead_or_not_the_owner_is_asked_no_more(error: Exception) -> None:
    pair = Pair()
    pair.a.instead["freeze"] = error
    assert pair.migrate().epoch == 7
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "b adopt"]


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
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "b adopt", "a thaw"]


def test_a_source_that_did_not_freeze_is_not_thawed() -> None:
    pair = Pair()
    pair.a.instead["freeze"] = lost()
    pair.b.instead["adopt"] = lost()
    pair.fails("^b could not take agent")
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "b adopt"]


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
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "b adopt", "a release"]


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


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


# ---- pre-copy: rounds


def test_rounds_go_on_while_more_than_a_few_rows_are_left() -> None:
    pair = Pair()
    pair.a.told["precopy"] = [Copied(30), Copied(9), Copied(8)]
    done = pair.migrate()
    assert pair.calls[:6] == ["a precopy", "b prefetch"] * 3
    assert pair.calls[6:] == ["a freeze", "b adopt", "a release"]
    assert (done.rounds, done.rows, done.loaded, done.n_bytes) == (3, 100, 90, 240)
    assert done.total_s >= done.freeze_s
    assert pair.a.held == HELD


@pytest.mark.parametrize(
    ("copied", "rounds"),
    [
        ([Copied(0)], 1),
        ([Copied(18, branch_id=0, row_bytes=6500)], 1),
        ([Copied(18, branch_id=1, row_bytes=6500), Copied(0)], 2),
        ([Copied(20, branch_id=0, row_bytes=6500), Copied(0)], 2),
        ([Copied(0, branch_id=0, step_s=0.05)], 1),
        ([Copied(30), Copied(30)], 2),  # no fewer than before
        ([Copied(None), Copied(20), Copied(4)], 3),  # of earlier turns, first
        ([Copied(None)] * 9, 5),
        ([Copied(n) for n in (90, 80, 70, 60, 50, 40)], 5),
    ],
)
def test_rounds_are_bounded(copied: list[Copied], rounds: int) -> None:
    pair = Pair()
    pair.a.told["precopy"] = list(copied)
    assert pair.migrate().rounds == rounds
    assert pair.calls.count("b prefetch") == rounds


@pytest.mark.parametrize(("step_s", "rounds"), [(0.005, 2), (0.5, 1)])
def test_rows_that_come_while_the_target_fetches_are_reckoned_with(
    step_s: float, rounds: int
) -> None:
    pair = Pair()
    pair.a.told["precopy"] = [Copied(2, branch_id=0, step_s=step_s), Copied(0)]
    pair.b.pause_s = 0.1
    assert pair.migrate().rounds == rounds


@pytest.mark.parametrize(("shipped", "rounds"), [(1_000_000, 2), (20_000_000, 1)])
def test_more_rows_go_with_the_freeze_where_the_link_is_fast(shipped: int, rounds: int) -> None:
    """What came in the first round tells, if it was enough."""
    pair = Pair()
    pair.a.told["precopy"] = [Copied(60, branch_id=0, row_bytes=6500), Copied(0)]
    pair.b.told["prefetch"] = [Fetched(HELD, 90, shipped)]
    pair.a.pause_s = pair.b.pause_s = 0.1
    assert pair.migrate().rounds == rounds


def test_no_more_rounds_when_their_time_is_over() -> None:
    pair = Pair()
    pair.b.instead["prefetch"] = Silence()
    assert pair.migrate(prefetch_s=0.05).rounds == 0
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "b adopt", "a release"]


@pytest.mark.parametrize(
    ("copied", "rounds"),
    [
        ([Copied(30), Copied(30)], 2),
        ([Copied(None)], 5),
        ([Copied(n) for n in range(60, 10, -10)], 5),
    ],
)
def test_a_migration_that_must_be_whole_freezes_nobody_before(
    copied: list[Copied], rounds: int
) -> None:
    pair = Pair()
    pair.a.told["precopy"] = list(copied)
    pair.fails("^pre-copy of agent .* is not done$", whole=True)
    assert pair.calls == ["a precopy", "b prefetch"] * rounds


@pytest.mark.parametrize("error", [Silence(), StoreUnavailable("file:///s", "gone")])
def test_nor_where_the_target_gets_nothing(error: Exception) -> None:
    pair = Pair()
    pair.b.instead["prefetch"] = error
    pair.fails("is not done$", whole=True, prefetch_s=0.05)
    assert pair.calls == ["a precopy", "b prefetch"]


def test_a_migration_that_is_whole_goes_on() -> None:
    pair = Pair()
    pair.a.told["precopy"] = [Copied(30), Copied(8)]
    assert pair.migrate(whole=True).rounds == 2
    assert pair.calls[4:] == ["a freeze", "b adopt", "a release"]


def test_a_source_that_is_silent_in_the_rounds_is_not_frozen() -> None:
    pair = Pair()
    pair.a.instead["precopy"] = Silence()
    pair.timeout_s = 0.05
    pair.fails(r"^a does not answer: no answer in 0\.05 s$")
    assert pair.calls == ["a precopy"]


# ---- pre-copy, on real replicas

LONG = "Tell me about the sea, the wind and the old harbour of the town. " * 12
MakePair = Callable[..., Pair]


def slowly(engine: Any, seconds: float) -> Any:
    """An engine whose steps take some time, and whose replies are as long as they may be."""
    step = engine.step

    def slow(chunks: Any) -> Any:
        time.sleep(seconds)
        return step(chunks)

    engine.step = slow
    engine.vocab.eog = frozenset()
    return engine


@pytest.fixture
def pair_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePair]:
    replicas: list[ModelReplica] = []

    def make(engine: Callable[[], Any], folder: str = "store", **options: Any) -> Pair:
        monkeypatch.setattr(replica_module, "open_profiled", lambda _: (engine(), None))
        settings: dict[str, Any] = {"pool_bytes": 1 << 26, **options}
        settings |= {"encryption_keys": KEYS} if settings.pop("encrypted", False) else {}
        if settings.pop("local", False):
            settings |= {"local": str(tmp_path / folder / "disk")}
        config = ReplicaConfig(
            model="fake://", store=(tmp_path / folder).as_uri(), codec="f16", **settings
        )
        made = [ModelReplica(config, node) for node in "ab"]
        replicas.extend(made)
        return Pair(*made)

    yield make
    for replica in replicas:
        if replica._loop.alive:
            replica._loop.close()


def fake(window: int = 0, step_s: float = 0.004, n_seq_max: int = 4) -> Callable[[], Any]:
    return lambda: slowly(FakeEngine(n_seq_max, n_ctx=4096, window=window), step_s)


@pytest.fixture(params=["fake", "fake window", "llama", "gemma3"])
def engine(request: pytest.FixtureRequest) -> Callable[[], Any]:
    name = request.param
    if name.startswith("fake"):
        return fake(40 if name.endswith("window") else 0)
    from actors.engines.llama_engine import LlamaEngine

    path = request.getfixturevalue("tiny_models")[name]

    def opened() -> Any:
        made = LlamaEngine(path, n_seq_max=4, n_ctx=2048, n_cells=4096, n_threads=1)
        return slowly(made, 0.004)

    return opened


def rest_of(pair: Pair, stream: Stream, n: int) -> Answer:
    """The turn's next attempt, on b."""
    before = stream.answer
    resume = Resume(tuple(before.prompt), tuple(before.ids))
    messages = [dict(m) for m in stream.request.messages]
    return start(real(pair.b)._loop, messages, n=n, attempt=1, resume=resume).result()


def idle_cells(side: Side) -> tuple[int, int]:
    loop = real(side)._loop
    return loop.residency.n_idle, loop.preloader.n_preloads


@pytest.mark.slow
def test_a_stream_that_moves_says_what_it_would_have_said(
    pair_of: MakePair, engine: Callable[[], Any]
) -> None:
    quiet = run(real(pair_of(engine, "quiet").a)._loop, [user(LONG)], n=120)
    pair = pair_of(engine)
    stream = start(real(pair.a)._loop, [user(LONG)], n=120)
    stream.take(20)
    done = pair.migrate()
    moved = stream.result()
    assert isinstance(moved.last, TurnMoved)
    assert 20 <= len(moved.ids) < 120
    assert done.rounds >= 1
    assert done.n_bytes > 0
    assert done.loaded == done.rows > 0
    real(pair.b)._memory.persister.flush().result(WAIT)
    rows = memory_of(real(pair.b)._loop).branches[0].rows
    assert rows == len(moved.prompt) + len(moved.ids) - 1, "the last ones came with the freeze"
    assert idle_cells(pair.b) == (1, 0)
    answer = rest_of(pair, stream, 120)
    assert moved.ids + answer.ids == quiet.ids
    assert answer.cached == len(moved.prompt)
    assert not real(pair.b)._memory.faults
    assert not real(pair.a)._memory.faults


@pytest.mark.parametrize("local", [False, True])
def test_an_idle_agent_moves_with_every_row(
    pair_of: MakePair, engine: Callable[[], Any], local: bool
) -> None:
    pair = pair_of(engine, local=local)
    messages: list[dict[str, str]] = []
    for question in (LONG, "And the ships?"):
        talk(real(pair.a)._loop, messages, question, n=30)
    done = pair.migrate()
    assert state(pair.a) is None
    rows = memory_of(real(pair.b)._loop).branches[0].rows
    assert done.loaded == done.rows == rows
    assert idle_cells(pair.b) == (1, 0)

    def refuse(*_: Any) -> None:
        raise EngineFault("nothing is left to load")

    real(pair.b)._loop.engine.load = refuse  # type: ignore[method-assign]
    answer = talk(real(pair.b)._loop, messages, "And now?", n=5)
    assert (answer.cached, answer.cache) == (rows, "hot")


def frozen_in_a_reply(pair: Pair) -> tuple[Stream, Held, Frozen]:
    """A stream of a that b is to take over, what b has of it, and what comes with the freeze."""

    async def go() -> tuple[Held, Frozen]:
        a, b = real(pair.a), real(pair.b)
        await a.precopy(AGENT)
        held = (await b.prefetch(AGENT)).held
        while memory_of(a._loop).branches[0].turn is None or n_rows(a) < held.rows + 20:
            await asyncio.sleep(0.01)
        return held, await a.freeze(AGENT, held)

    stream = start(real(pair.a)._loop, [user(LONG)], n=120)
    stream.take(20)
    held, frozen = asyncio.run(go())
    return stream, held, frozen


def n_rows(replica: ModelReplica) -> int:
    """Of the turn under way."""
    return replica._loop.scheduler.running[0].n_rows


OTHER_TAILS: list[Callable[[Tail], Tail]] = [
    lambda tail: replace(tail, branch_id=tail.branch_id + 1),
    lambda tail: replace(tail, tokens=[tail.tokens[0] + 1, *tail.tokens[1:]]),
    lambda tail: replace(tail, start=tail.start + 1, full=tail.after(tail.start + 1)[0]),
]


@pytest.mark.parametrize("change", [None, *OTHER_TAILS])
def test_rows_that_come_with_the_freeze_count_where_they_go_on(
    pair_of: MakePair, change: Callable[[Tail], Tail] | None
) -> None:
    """Others are dropped, and computed again: those of another branch, after other tokens, behind a
    gap."""
    quiet = run(real(pair_of(fake(), "quiet").a)._loop, [user(LONG)], n=120)
    pair = pair_of(fake())
    stream, held, frozen = frozen_in_a_reply(pair)
    tail = frozen.tail
    assert tail is not None
    assert tail.start == held.rows <= len(tail.tokens) - 20
    if change is not None:
        frozen = replace(frozen, tail=change(tail))
    asyncio.run(real(pair.b).adopt(AGENT, frozen))
    asyncio.run(real(pair.a).release(AGENT))
    moved = stream.result()
    loop = real(pair.b)._loop
    rows = len(tail.tokens) if change is None else held.rows
    loop.memory.persister.flush().result(WAIT)
    assert memory_of(loop).branches[0].rows == rows
    assert loop.engine.n_rows(next(iter(loop.residency._idle))) == rows
    answer = rest_of(pair, stream, 120)
    assert moved.ids + answer.ids == quiet.ids
    assert not real(pair.b)._memory.faults


@pytest.mark.parametrize("held", [None, Held(7, 10), Held(0, 0), Held(0, 9999)])
def test_rows_that_the_target_cannot_use_are_stored_instead(
    pair_of: MakePair, held: Held | None
) -> None:
    """It has nothing, or another branch, so little that the store is the shorter way, or more."""
    pair = pair_of(fake())
    stream = start(real(pair.a)._loop, [user(LONG)], n=400)
    stream.take(20)
    frozen = asyncio.run(real(pair.a).freeze(AGENT, held))
    assert frozen.tail is None
    asyncio.run(real(pair.b).adopt(AGENT, frozen))
    asyncio.run(real(pair.a).release(AGENT))
    moved = stream.result()
    rows = memory_of(real(pair.b)._loop).branches[0].rows
    assert rows == len(moved.prompt) + len(moved.ids) - 1


def test_claims_that_no_turn_follows_are_forgotten(
    pair_of: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I9: an agent that is idle may stay so."""
    monkeypatch.setattr("actors.preload._LATELY_S", 0.3)
    pair = pair_of(fake())
    talk(real(pair.a)._loop, [], LONG, n=5)
    pair.migrate()
    preloader = real(pair.b)._loop.preloader
    assert len(preloader._lately) == 1
    wait_until(lambda: not preloader._lately)


def test_a_tail_that_cannot_be_made_is_stored(pair_of: MakePair) -> None:
    pair = pair_of(fake())
    source = real(pair.a)

    def refuse(*_: Any) -> Any:
        raise EngineFault("no rows come out")

    source._loop.call(lambda: setattr(source._loop._exporter, "tail", refuse)).result(WAIT)
    stream, held, frozen = frozen_in_a_reply(pair)
    assert frozen.tail is None
    assert source._memory.faults["engine_refused"] == 1
    memory = memory_of(source._loop)
    assert memory.shared is not None
    assert memory.shared.card.branches[0].rows == n_rows(source) >= held.rows + 20
    asyncio.run(source.release(AGENT))
    assert isinstance(stream.result().last, TurnMoved)


def test_rows_that_came_from_codes_are_not_encoded_again(pair_of: MakePair) -> None:
    """I7. The turn had left the engine, and is back with rows that no card names yet."""
    pair = pair_of(fake())
    source = real(pair.a)
    left = list[bool]()

    def leave() -> None:
        turn = source._loop._book.active[AGENT]
        if turn.sequence is not None and n_rows(source) >= 820:
            source._loop.scheduler.running[0].n_loaded = n_rows(source) - 1
            left.append(True)

    stream = start(source._loop, [user(LONG)], n=400)
    stream.take(20)
    asyncio.run(source.precopy(AGENT))
    held = asyncio.run(real(pair.b).prefetch(AGENT)).held
    while not left:
        source._loop.call(leave).result(WAIT)
    frozen = asyncio.run(source.freeze(AGENT, held))
    assert frozen.tail is None
    memory = memory_of(source._loop)
    assert memory.shared is not None
    assert memory.shared.card.branches[0].rows == n_rows(source), "stored instead"
    asyncio.run(source.release(AGENT))
    stream.result()


@pytest.mark.parametrize("again", [False, True])
def test_a_frozen_agent_is_claimed_without_a_look_at_the_store(
    pair_of: MakePair, again: bool
) -> None:
    """`again`: its owner has stored more since the target fetched."""
    pair = pair_of(fake())
    source, target = real(pair.a), real(pair.b)
    stream = start(source._loop, [user(LONG)], n=400)
    stream.take(20)
    asyncio.run(source.precopy(AGENT))
    held = asyncio.run(target.prefetch(AGENT)).held
    if again:
        stream.take(20)
        asyncio.run(source.precopy(AGENT))
    frozen = asyncio.run(source.freeze(AGENT, held))
    asked: list[str] = []
    files = target._memory.store.files
    for name in ("names", "read", "create"):
        was = getattr(files, name)
        setattr(files, name, lambda *a, n=name, f=was, **k: (asked.append(n), f(*a, **k))[1])
    asyncio.run(target.adopt(AGENT, frozen))
    assert asked[:2] == ["create", "names"], "then the rows that came along are stored"
    asyncio.run(source.release(AGENT))
    stream.result()


def test_a_claim_is_of_the_epoch_after_the_frozen_one(pair_of: MakePair) -> None:
    """I5. The answer came so late that the owner has claimed the agent back, and runs."""
    pair = pair_of(fake())
    messages: list[dict[str, str]] = []
    talk(real(pair.a)._loop, messages, LONG, n=5)
    frozen = asyncio.run(real(pair.a).freeze(AGENT))
    asyncio.run(real(pair.a).thaw(AGENT))
    wait_until(lambda: state(pair.a) == "owned")
    with pytest.raises(Fenced):
        asyncio.run(real(pair.b).adopt(AGENT, frozen))
    assert (state(pair.a), state(pair.b)) == ("owned", None)


def test_a_freeze_that_took_too_long_hands_nothing_over(pair_of: MakePair) -> None:
    """I5. Its deadline passed before the answer was made, and the owner has claimed it back."""
    pair = pair_of(fake())
    handoff, call = real(pair.a)._loop.handoff, real(pair.a)._loop.call
    talk(real(pair.a)._loop, [], LONG, n=5)
    call(lambda: handoff.freeze(AGENT)).result(WAIT)
    assert handoff.answer(AGENT)[1] is not None
    call(lambda: handoff.thaw(AGENT)).result(WAIT)
    wait_until(lambda: state(pair.a) == "owned")
    wait_until(lambda: not call(lambda: handoff._deadlines).result(WAIT))
    with pytest.raises(StoreUnavailable, match="too slow"):
        handoff.answer(AGENT)


def slow_blocks(replica: ModelReplica, seconds: float) -> None:
    """Its shared store takes that long for every block."""
    put = replica._memory.store.put_block

    def slow(*block: Any) -> Any:
        time.sleep(seconds)
        return put(*block)

    replica._memory.store.put_block = slow  # type: ignore[method-assign]


@pytest.mark.parametrize("local", [False, True])
def test_a_freeze_does_not_wait_for_the_store(pair_of: MakePair, local: bool) -> None:
    pair = pair_of(fake(step_s=0.02), local=local)
    stream = start(real(pair.a)._loop, [user(LONG)], n=400)
    stream.take(5)
    slow_blocks(real(pair.a), 0.4)
    done = pair.migrate()
    assert done.freeze_s < 0.3
    assert isinstance(stream.result().last, TurnMoved)


def test_rows_go_with_a_move_sooner_than_into_a_card(
    pair_of: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stored after the last round would have to be fetched while the agent is frozen."""
    monkeypatch.setattr("actors.exporter._MOST_AT_RISK_S", 0.0)
    pair = pair_of(fake(step_s=0.005), local=True)
    source = real(pair.a)
    stream = start(source._loop, [user(LONG)], n=400)
    stream.take(5)

    def generation() -> int:
        source._memory.persister.flush().result(WAIT)
        card = memory_of(source._loop).card
        assert card is not None
        return card.generation

    asyncio.run(source.precopy(AGENT, True, False))
    before = generation()
    stream.take(20)
    assert generation() == before
    memory_of(source._loop).moving = 0.0
    wait_until(lambda: generation() > before)
    stream.result()


def test_a_freeze_waits_for_the_store_where_much_is_missing(pair_of: MakePair) -> None:
    """Without pre-copy: what the turn has computed is stored, not computed again."""
    pair = pair_of(fake())
    stream = start(real(pair.a)._loop, [user(LONG)], n=400)
    stream.take(5)
    done = pair.migrate(prefetch_s=0.0)
    assert done.rounds == 0
    moved = stream.result()
    rows = memory_of(real(pair.b)._loop).branches[0].rows
    assert rows == len(moved.prompt) + len(moved.ids) - 1


def test_what_earlier_turns_left_to_store_is_not_lost(pair_of: MakePair) -> None:
    """While the shared store refuses blocks, an idle agent stays where its rows are."""
    pair = pair_of(fake(), local=True)
    source, messages = real(pair.a), list[dict[str, str]]()
    put = source._memory.store.put_block

    def refuse(*_: Any) -> Any:
        raise StoreUnavailable("blocks", "the disk is full")

    source._memory.store.put_block = refuse  # type: ignore[method-assign]
    talk(source._loop, messages, LONG, n=5)
    pair.fails(f"^a could not hand over {AGENT}: ")
    assert idle_cells(pair.b) == (0, 0)
    source._memory.store.put_block = put  # type: ignore[method-assign]
    wait_until(lambda: state(pair.a) == "owned")
    assert talk(source._loop, messages, "And now?", n=5).cached > 780
    assert pair.migrate().rows == memory_of(real(pair.b)._loop).branches[0].rows


# ---- from the source's disk


def lagging(pair: Pair) -> Disk:
    """The shared store takes no blocks from a: what a has is on its disk only."""

    def refuse(*_: Any) -> Any:
        raise StoreUnavailable("blocks", "the uplink is slow")

    real(pair.a)._memory.store.put_block = refuse  # type: ignore[method-assign]
    return Disk(real(pair.a))


def in_store(side: Side) -> int:
    """Rows of the agent that the shared store's card names."""
    loaded = real(side)._memory.store.latest(AGENT, real(side)._memory.key)
    assert loaded is not None
    return loaded.card.branches[0].rows if loaded.card.branches else 0


def test_from_a_disk_the_card_goes_from_hand_to_hand() -> None:
    pair = Pair()
    card = new_card(AGENT, FakeEngine().key, "f16", Owner("a", "life"))
    pair.a.told |= {"precopy": [Copied(0, card)], "freeze": [Frozen(card)]}
    pair.b.told["prefetch"] = [Fetched(HELD, 90, 80, 70)]
    done = pair.migrate(disk=NOWHERE)
    assert pair.calls == ["a precopy", "b prefetch", "a freeze", "b adopt", "a release"]
    assert (done.n_bytes, done.peer_bytes) == (80, 70)


def test_a_disk_that_takes_nothing_leaves_it_to_the_store() -> None:
    pair = Pair()
    pair.a.told["precopy"] = [Copied(None), Copied(None), Copied(0)]
    pair.migrate(disk=NOWHERE)
    assert pair.calls[:5] == ["a precopy", "b prefetch", "a precopy", "a precopy", "b prefetch"]


@pytest.mark.parametrize("encrypted", [False, True])
def test_an_idle_agent_moves_without_the_store_and_its_debt_with_it(
    pair_of: MakePair, engine: Callable[[], Any], encrypted: bool
) -> None:
    pair = pair_of(engine, local=True, encrypted=encrypted)
    disk, messages = lagging(pair), list[dict[str, str]]()
    for question in (LONG, "And the ships?"):
        talk(real(pair.a)._loop, messages, question, n=30)
    done = pair.migrate(disk=disk)
    assert (state(pair.a), state(pair.b)) == (None, "owned")
    rows = memory_of(real(pair.b)._loop).branches[0].rows
    assert done.loaded == done.rows == rows > 256
    assert 0 < done.peer_bytes <= done.n_bytes
    settle(real(pair.b)._loop)  # b's uplink is well
    assert in_store(pair.b) == rows
    answer = talk(real(pair.b)._loop, messages, "And now?", n=5)
    assert (answer.cached, answer.cache) == (rows, "hot")
    assert not real(pair.b)._memory.faults


@pytest.mark.slow
def test_a_stream_moves_from_disk_to_disk_and_says_what_it_would_have_said(
    pair_of: MakePair, engine: Callable[[], Any]
) -> None:
    quiet = run(real(pair_of(engine, "quiet").a)._loop, [user(LONG)], n=120)
    pair = pair_of(engine, local=True)
    disk = lagging(pair)
    stream = start(real(pair.a)._loop, [user(LONG)], n=120)
    stream.take(20)
    done = pair.migrate(disk=disk)
    moved = stream.result()
    assert isinstance(moved.last, TurnMoved)
    assert 20 <= len(moved.ids) < 120
    assert done.loaded == done.rows > 0
    assert done.peer_bytes > 0
    answer = rest_of(pair, stream, 120)
    assert moved.ids + answer.ids == quiet.ids
    assert answer.cached == len(moved.prompt)
    assert not real(pair.b)._memory.faults


def silent(_: bytes | None) -> bytes | None:
    raise StoreUnavailable("the disk of a", "GetTimeoutError")


def flipped(raw: bytes | None) -> bytes | None:
    return raw and raw[:-1] + bytes([raw[-1] ^ 1])


@pytest.mark.parametrize(
    ("spoil", "fault"), [(silent, None), (flipped, "corrupt"), (lambda _: None, None)]
)
def test_rows_that_no_sound_disk_has_are_computed_again(
    pair_of: MakePair, spoil: Callable[[bytes | None], bytes | None], fault: str | None
) -> None:
    """The agent moves with its tokens; what cannot be had is a cost, and no error of the turn."""
    quiet = run(real(pair_of(fake(), "quiet").a)._loop, [user(LONG)], n=120)
    pair = pair_of(fake(), local=True)
    disk = lagging(pair)
    disk.spoil = spoil
    stream = start(real(pair.a)._loop, [user(LONG)], n=120)
    stream.take(20)
    pair.migrate(disk=disk)
    moved = stream.result()
    answer = rest_of(pair, stream, 120)
    assert moved.ids + answer.ids == quiet.ids
    assert answer.cached == 0
    assert "corrupt" in real(pair.b)._memory.faults or fault is None
    if spoil is silent:
        assert disk.calls <= 4  # reads that were under way together; then it is left alone


def test_replies_that_only_the_old_owner_had_are_known_to_the_next(pair_of: MakePair) -> None:
    """Even if none of their rows can be had: the card is handed over, not read from a disk."""
    pair = pair_of(fake(), local=True)
    disk, messages = lagging(pair), list[dict[str, str]]()
    disk.spoil = silent
    talk(real(pair.a)._loop, messages, LONG, n=5)
    branch = memory_of(real(pair.a)._loop).branches[0]
    tokens, replies = list(branch.tokens), list(branch.replies)
    pair.migrate(disk=disk)
    taken = memory_of(real(pair.b)._loop).branches[0]
    assert (taken.tokens, taken.replies) == (tokens, replies)


def test_every_branch_comes_along(pair_of: MakePair) -> None:
    """Nobody else has them."""
    pair = pair_of(fake(), local=True)
    disk = lagging(pair)
    for text in (LONG, "Once upon a time " + LONG):
        run(real(pair.a)._loop, [user(text)], n=5)
    branches = memory_of(real(pair.a)._loop).branches
    assert len(branches) == 2
    wait_until(lambda: all(b.rows == len(b.tokens) - 1 for b in branches))
    rows = [branch.rows for branch in branches]
    pair.migrate(disk=disk)
    settle(real(pair.b)._loop)
    loaded = real(pair.b)._memory.store.latest(AGENT, real(pair.b)._memory.key)
    assert loaded is not None
    assert [branch.rows for branch in loaded.card.branches] == rows


def test_a_card_names_only_blocks_that_its_own_disk_has(pair_of: MakePair) -> None:
    """I4: half of the blocks could not be fetched."""
    pair = pair_of(fake(), local=True, pool_bytes=0)
    disk = lagging(pair)
    talk(real(pair.a)._loop, [], LONG, n=5)
    sent = list[bytes]()

    def two(raw: bytes | None) -> bytes | None:
        if raw is not None:
            sent.append(raw)
        return raw if len(sent) <= 2 else None

    disk.spoil = two
    written = list[CacheCard]()
    local = real(pair.b)._memory.tiers.local
    assert local is not None
    write_card = local.write_card

    def watched(card: CacheCard) -> None:
        written.append(card)
        refs = [ref for branch in card.branches for ref in (*branch.blocks, *branch.tail)]
        assert all(Path(local.store.block_path("default", r, "full")).exists() for r in refs)
        write_card(card)

    local.write_card = watched  # type: ignore[method-assign]
    pair.migrate(disk=disk)
    settle(real(pair.b)._loop)
    assert written
    assert written[0].branches[0].rows <= 512


def test_an_owner_that_went_on_keeps_the_agent(pair_of: MakePair) -> None:
    """I5: its claim is newer than the card that was handed over."""
    pair = pair_of(fake(), local=True)
    disk, messages = lagging(pair), list[dict[str, str]]()
    talk(real(pair.a)._loop, messages, LONG, n=5)
    card = asyncio.run(real(pair.a).precopy(AGENT, True)).card
    assert card is not None
    frozen = asyncio.run(real(pair.a).freeze(AGENT, None, True))
    assert (frozen.card, frozen.tail) == (card, None)
    asyncio.run(real(pair.a).thaw(AGENT))
    wait_until(lambda: state(pair.a) == "owned")
    with pytest.raises(Fenced):
        asyncio.run(real(pair.b).adopt(AGENT, frozen, disk))
    assert (state(pair.a), state(pair.b)) == ("owned", None)
    assert talk(real(pair.a)._loop, messages, "And now?", n=5).cached > 780


def test_the_debt_survives_the_new_owners_death(pair_of: MakePair) -> None:
    """What it took over is on its disk, named by a card there, before anybody hears of it."""
    pair = pair_of(fake(), local=True)
    disk = lagging(pair)
    talk(real(pair.a)._loop, [], LONG, n=5)
    after = real(pair.b)
    put = after._memory.store.put_block
    after._memory.store.put_block = real(pair.a)._memory.store.put_block  # type: ignore[method-assign]
    pair.migrate(disk=disk)
    rows = memory_of(after._loop).branches[0].rows
    assert in_store(pair.b) == 0
    after._loop.close()
    after._memory.store.put_block = put  # type: ignore[method-assign]
    again = ModelReplica(after._config, "b")
    try:
        wait_until(lambda: in_store(pair.b) == rows > 256)
    finally:
        again._loop.close()


# ---- what was preloaded


def preloaded(pair: Pair, **options: Any) -> int:
    """Rows in b's engine of an agent that a runs."""
    stream = start(real(pair.a)._loop, [user(LONG)], n=10, **options)
    stream.result()
    settle(real(pair.a)._loop)
    return real(pair.b)._loop.preloader.fetch(AGENT).loaded


def test_a_target_that_fails_before_its_claim_keeps_nothing(pair_of: MakePair) -> None:
    pair = pair_of(fake())
    stream = start(real(pair.a)._loop, [user(LONG)], n=200)
    stream.take(5)

    def refuse(*_: Any, **__: Any) -> Any:
        assert idle_cells(pair.b) == (1, 1)
        raise StoreUnavailable("cards", "the disk is full")

    real(pair.b)._memory.store.claim = refuse  # type: ignore[method-assign]
    pair.fails("the disk is full")
    assert idle_cells(pair.b) == (0, 0)
    assert real(pair.b)._loop.engine.n_rows(0) == 0
    answer = stream.result()
    assert len(answer.ids) == 200
    assert (state(pair.a), state(pair.b)) == ("owned", None)


def test_a_target_that_dies_before_its_claim_leaves_the_source_running(pair_of: MakePair) -> None:
    pair = pair_of(fake())
    stream = start(real(pair.a)._loop, [user(LONG)], n=200)
    stream.take(5)
    pair.b.instead["adopt"] = lost()
    pair.fails("^b could not take agent")
    assert len(stream.result().ids) == 200
    assert state(pair.a) == "owned"
    assert idle_cells(pair.b) == (1, 1)  # had it only been taken for dead: until the deadline


def test_what_nobody_claims_is_dropped(pair_of: MakePair) -> None:
    pair = pair_of(fake())
    assert preloaded(pair) > 780
    assert idle_cells(pair.b) == (1, 1)
    loop = real(pair.b)._loop
    loop.preloader._preloads[AGENT].deadline = 0.0
    loop._wake.set()
    wait_until(lambda: idle_cells(pair.b) == (0, 0))
    assert loop.engine.n_rows(0) == 0
    assert pair.migrate().loaded > 780  # it can come again


def test_what_was_preloaded_leaves_for_a_turn(pair_of: MakePair) -> None:
    pair = pair_of(fake(n_seq_max=1))
    rows, loop = preloaded(pair), real(pair.b)._loop
    assert run(loop, [user("Hello.")], session="other", n=5).reason == "length"
    evict(loop)
    assert loop.preloader.fetch(AGENT).loaded == 0  # RAM only: it was in the way
    done = pair.migrate()
    assert (done.rows, done.loaded) == (rows, 0)
    answer = run(loop, [user(LONG)], n=10)
    assert answer.cached == len(answer.prompt) - 1


def test_no_turn_is_kept_from_running_by_preloads(pair_of: MakePair) -> None:
    """The one sequence is busy: rows come to RAM only."""
    pair = pair_of(fake(n_seq_max=1))
    stream = start(real(pair.b)._loop, [user("Hello.")], session="other", n=300)
    stream.take(5)
    assert preloaded(pair) == 0
    done = pair.migrate()
    assert done.loaded == 0 < done.rows
    assert stream.result().reason == "length"


def test_what_was_preloaded_is_dropped_where_the_card_says_something_else(
    pair_of: MakePair,
) -> None:
    pair = pair_of(fake())
    assert preloaded(pair) > 0
    real(pair.b)._loop.preloader._preloads[AGENT].branch.tokens[700] += 1
    asyncio.run(real(pair.b).adopt(AGENT))
    assert idle_cells(pair.b) == (0, 0)
    answer = run(real(pair.b)._loop, [user(LONG)], n=10)
    assert answer.cached == len(answer.prompt) - 1


@pytest.mark.slow
def test_others_decode_while_rows_are_loaded(pair_of: MakePair) -> None:
    """A block per round of the loop: nobody stalls for the whole of it."""
    pair = pair_of(fake(step_s=0.01))
    stream = start(real(pair.b)._loop, [user("Hello.")], session="other", n=400)
    stream.take(2)
    engine, steps = real(pair.b)._loop.engine, list[int]()
    load, step = engine.load, engine.step

    def counting(*rows: Any) -> None:
        steps.append(0)
        load(*rows)

    def stepping(chunks: Any) -> Any:
        if steps:
            steps[-1] += 1
        return step(chunks)

    engine.load, engine.step = counting, stepping  # type: ignore[method-assign]
    assert preloaded(pair) > 780
    assert len(steps) >= 4
    assert all(steps[:-1])
    stream.result()


def test_what_a_frozen_source_still_commits_is_not_its_end(pair_of: MakePair) -> None:
    """The target has claimed meanwhile: the release frees the cells, as it always does."""
    pair = pair_of(fake())
    loop = real(pair.a)._loop
    talk(loop, [], LONG, n=5)
    settle(loop)
    memory = memory_of(loop)
    loop.call(lambda: loop.handoff.freeze(AGENT)).result(WAIT)[1].result(WAIT)
    asyncio.run(real(pair.b).adopt(AGENT))
    loop.memory.commits.later(memory)
    loop.memory.commits.settle(memory).result(WAIT)
    assert (memory.state, state(pair.a)) == ("frozen", "frozen")
    assert idle_cells(pair.a) == (1, 0)
    asyncio.run(real(pair.a).release(AGENT))
    assert idle_cells(pair.a) == (0, 0)
    assert state(pair.a) is None
    assert not loop.memory.faults


# ---- what the shared store's last card lacks


def remembered(key: CompatibilityKey) -> AgentMemory:
    """Forty tokens, the last ten a reply, all of them in the card."""
    branch = Branch(3, list(range(40)), [Reply(30, 40, "")], exported=39)
    tail = (BlockRef("x", 39, {}),)
    card = BranchCard(3, tuple(range(40)), (), tail, (Reply(30, 40, ""),), (20, 39))
    latest = replace(new_card(AGENT, key, "f16", Owner("a", "life")), branches=(card,))
    shared = LoadedCard(latest, CardRef(1, 0, ""))
    return AgentMemory(AGENT, None, "warm", [branch], shared=shared)


def speak(branch: Branch) -> None:
    """A turn is under way: a question of five tokens, and twenty of its reply."""
    branch.turn = OpenTurn("turn", 45)
    branch.tokens += range(100, 125)


HISTORY: list[Callable[[Branch], None]] = [
    lambda branch: branch.tokens.append(7),
    lambda branch: setattr(branch, "exported", 40),
    lambda branch: branch.replies.append(Reply(39, 40, "")),
    lambda branch: setattr(branch, "id", 4),
    lambda branch: branch.tokens.__setitem__(0, 7),
]


def test_nothing_is_missing_of_what_a_card_says() -> None:
    memory = remembered(FakeEngine().key)
    assert missing(memory, {}, windows=False) == 0
    assert missing(memory, {}, windows=True) == 0


@pytest.mark.parametrize("change", HISTORY)
def test_a_turn_that_is_over_is_in_the_card_or_missing(change: Callable[[Branch], None]) -> None:
    memory = remembered(FakeEngine().key)
    change(memory.branches[0])
    assert missing(memory, {}, windows=False) is None


def test_of_a_turn_under_way_rows_are_missing() -> None:
    memory = remembered(FakeEngine().key)
    branch = memory.branches[0]
    speak(branch)
    assert missing(memory, {3: 64}, windows=False) == 64 - 39
    branch.tokens[25] = 7  # the reply before is said again
    branch.replies = []
    assert missing(memory, {3: 64}, windows=False) == 64 - 25
    assert missing(memory, {3: 64}, windows=True) == 64 - 20
    branch.replies = [Reply(29, 41, "")]
    assert missing(memory, {3: 64}, windows=False) is None


def test_without_a_card_all_is_missing() -> None:
    memory = remembered(FakeEngine().key)
    memory.shared = None
    assert missing(memory, {}, windows=False) is None
