"""Turns in and out of the engine: cells that run out, priorities, deadlines, cancels, stalls; and
200 agents over 4 slots."""

import gc
import random
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.branches import Branch
from actors.engines.base import Chunk, Engine, Logits
from actors.engines.fake_engine import FakeEngine, FakeVocab
from actors.errors import EngineFault, InvalidRequest, TurnTimeout
from actors.loop import LoopConfig, ReplicaLoop
from actors.prompt import common_prefix
from actors.scheduler import SchedulerConfig
from actors.turn import Resume, SamplingParams, TurnFailed, TurnFinished, TurnMoved, TurnRequest
from tests.engine_contract import GAP, feed
from tests.loops import (
    WAIT,
    Stream,
    agent_id,
    assistant,
    evict,
    make_loop,
    memory_of,
    run,
    settle,
    start,
    user,
)

pytestmark = pytest.mark.long

MakeLoop = Callable[..., ReplicaLoop]


@pytest.fixture
def loop_on(tmp_path: Path) -> Iterator[MakeLoop]:
    """Loops that are closed at the end; each has a store of its own."""
    loops: list[ReplicaLoop] = []

    def make(engine: Engine, **options: Any) -> ReplicaLoop:
        loops.append(make_loop(engine, tmp_path / f"store{len(loops)}", **options))
        return loops[-1]

    yield make
    for made in loops:
        if made.alive:
            made.close()


class CountingEngine(FakeEngine):
    """Never ends a reply by itself; notes the tokens of every step, and steps only while `gate` is
    set."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.vocab.eog = frozenset()
        self.steps: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def step(self, chunks: Any) -> dict[int, Logits]:
        assert self.gate.wait(WAIT)
        self.steps.append([len(chunk.token_ids) for chunk in chunks])
        return super().step(chunks)


@contextmanager
def together(loop: ReplicaLoop) -> Iterator[None]:
    """What is started inside is prepared before any of it is placed: then it runs side by side."""
    residency, places = loop.residency, range(loop.engine.n_seq_max)
    taken = loop.call(lambda: [residency.acquire(Branch(90 + i), 1) for i in places]).result(WAIT)
    yield
    ready = loop.call(lambda: False)
    while not ready.result(WAIT):
        ready = loop.call(
            lambda: all(t.prepared and t.prepared.done() for t in loop.scheduler.waiting.order())
        )
    loop.call(lambda: [residency.free(i) for i in taken if i is not None]).result(WAIT)


def alone(request: TurnRequest, n: int, *, window: int = 0) -> list[int]:
    """What the model says to a first message, straight from the engine."""
    engine = CountingEngine(1, window=window)
    prompt = [257, *engine.vocab.tokenize(request.messages[0]["content"]), 260, 258]
    for at in range(0, len(prompt), 512):
        part = prompt[at : at + 512]
        logits = engine.step([Chunk(0, part, at, 1)])
    reply: list[int] = []
    while True:
        reply.append(int(logits[0][-1].argmax()))
        if len(reply) == n:
            return reply
        at = len(prompt) + len(reply) - 1
        logits = engine.step([Chunk(0, reply[-1:], at, 1)])


def all_free(loop: ReplicaLoop) -> None:
    settle(loop)

    def look() -> None:
        assert not loop.scheduler.running
        assert not len(loop.scheduler.waiting)
        assert not loop._book.active
        assert loop.residency.cells_reserved == 0
        loop.residency.evict_idle()
        assert loop.residency.cells_used == 0
        engine = loop.engine
        assert [engine.n_rows(i) for i in range(engine.n_seq_max)] == [0] * engine.n_seq_max

    loop.call(look).result(WAIT)


# ---- cells that run out


def test_a_large_max_tokens_keeps_nobody_out(loop_on: MakeLoop) -> None:
    """Three turns that might fill the cells run together while they are short."""
    engine = CountingEngine(3, n_cells=1000)
    loop = loop_on(engine)
    with together(loop):
        streams = [
            start(loop, [user(f"{i}")], session=f"s{i}", n=900, turn_id=f"{i}") for i in "abc"
        ]
    for stream in streams:
        stream.take(20)
    engine.gate.clear()  # else they may be through before all are cancelled
    assert max(map(len, engine.steps)) == 3
    for stream in streams:
        loop.cancel(stream.request.id)
    engine.gate.set()
    assert {stream.result().reason for stream in streams} == {"cancelled"}
    all_free(loop)


@pytest.mark.parametrize("persist", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("window", [0, 48])
def test_a_turn_that_had_to_leave_goes_on_where_it_was(
    loop_on: MakeLoop, window: int, temperature: float, persist: bool
) -> None:
    """Neither is a token lost nor doubled, and the client sees nothing of it."""
    loop = loop_on(CountingEngine(3, n_cells=700, window=window))
    options: dict[str, Any] = {"n": 400, "temperature": temperature, "persist": persist}
    with together(loop):
        streams = [
            start(loop, [user(f"{i} and more")], session=f"s{i}", seed=i, **options)
            for i in range(3)
        ]
    answers = [stream.result() for stream in streams]
    assert loop.cells.preemptions >= 2
    reference = loop_on(CountingEngine(1, window=window))
    for number, (stream, answer) in enumerate(zip(streams, answers, strict=True)):
        lone = run(reference, [user(f"{number} and more")], seed=number, **options)
        assert (answer.ids, answer.text) == (lone.ids, lone.text)
        assert answer.reason == "length"
        if temperature == 0:
            assert answer.ids == alone(stream.request, 400, window=window)
    assert not loop.memory.faults
    all_free(loop)


@pytest.mark.parametrize("window", [0, 48])
def test_the_rows_of_one_that_left_are_restored_not_computed(
    loop_on: MakeLoop, window: int
) -> None:
    engine = CountingEngine(2, n_cells=600, window=window)
    loop = loop_on(engine)
    with together(loop):
        streams = [start(loop, [user(f"{i}")], session=f"s{i}", n=450) for i in range(2)]
    for stream in streams:
        assert stream.result().reason == "length"
    assert loop.cells.preemptions
    computed = sum(map(sum, engine.steps))
    told = sum(len(s.answer.prompt) + len(s.answer.ids) - 1 for s in streams)
    assert computed == told
    all_free(loop)


def test_the_memory_of_one_that_left_is_whole(loop_on: MakeLoop) -> None:
    loop = loop_on(CountingEngine(2, n_cells=600))
    with together(loop):
        streams = [start(loop, [user(f"{i}")], session=f"s{i}", n=450) for i in range(2)]
    answers = [stream.result() for stream in streams]
    settle(loop)
    for number, answer in enumerate(answers):
        (branch,) = memory_of(loop, f"s{number}").branches
        assert branch.tokens == answer.prompt + answer.ids
        assert branch.rows == len(branch.tokens) - 1
        asked = [user(f"{number}"), assistant(answer.text), user("And?")]
        assert run(loop, asked, session=f"s{number}", n=5).prefilled <= 9


def test_the_first_turn_is_never_asked_to_leave(loop_on: MakeLoop) -> None:
    """One always comes to its end: however many there are, the oldest decodes in every step."""
    engine = CountingEngine(4, n_cells=500)
    loop = loop_on(engine)
    with together(loop):
        streams = [start(loop, [user(f"{i}")], session=f"s{i}", n=480) for i in range(8)]
    leave_first, first_left = loop.cells.leave, []

    def leaving(turn: Any) -> None:
        running = [loop._book.by_sequence[id(s)] for s in loop.scheduler.running]
        first_left.append(turn is min(running, key=lambda t: t.began))
        leave_first(turn)

    loop.cells.leave = leaving  # type: ignore[method-assign]
    for stream in streams:
        assert stream.result().reason == "length"
    assert loop.cells.preemptions >= 3
    assert not any(first_left)
    # 8 replies of 480 in 500 cells: each alone at its end, none computed twice.
    assert sum(map(sum, engine.steps)) == sum(
        len(s.answer.prompt) + len(s.answer.ids) - 1 for s in streams
    )
    all_free(loop)


def test_the_lowest_priority_leaves_first(loop_on: MakeLoop) -> None:
    engine = CountingEngine(2, n_cells=500)
    loop = loop_on(engine)
    left: list[int] = []

    def leaving(turn: Any, leave: Any = loop.cells.leave) -> None:
        left.append(turn.priority)
        leave(turn)

    loop.cells.leave = leaving  # type: ignore[method-assign]
    with together(loop):
        low = start(loop, [user("low")], session="low", n=400)
        high_request = TurnRequest(
            "high", agent_id("high"), (user("high"),), SamplingParams(400, 0.0), priority=1
        )
        loop.submit(high_request, high := Stream(high_request))
    assert high.result().ids == alone(high.request, 400)
    assert low.result().ids == alone(low.request, 400)
    assert left == [0]
    all_free(loop)


def test_one_that_left_can_be_cancelled(loop_on: MakeLoop) -> None:
    engine = CountingEngine(2, n_cells=600, step_delay=0.001)
    loop = loop_on(engine)
    first = start(loop, [user("0")], session="s0", n=500, turn_id="0")
    first.take(1)
    second = start(loop, [user("1")], session="s1", n=500, turn_id="1")
    second.take(200)
    for _ in first:
        if loop.cells.preemptions:
            break
    loop.cancel("1")
    answer = second.result()
    assert answer.reason == "cancelled"
    assert answer.ids == alone(second.request, 500)[: len(answer.ids)]
    assert first.result().ids == alone(first.request, 500)
    settle(loop)
    assert not second.violations  # nothing comes after its last item
    (branch,) = memory_of(loop, "s1").branches
    assert branch.tokens == answer.prompt + answer.ids
    assert branch.turn is None
    card = memory_of(loop, "s1").card
    assert card is not None
    assert card.branches[0].tokens == tuple(branch.tokens)
    all_free(loop)


def test_one_that_left_fails_with_the_loop(loop_on: MakeLoop) -> None:
    loop = loop_on(CountingEngine(2, n_cells=600, step_delay=0.001))
    with together(loop):
        streams = [start(loop, [user(f"{i}")], session=f"s{i}", n=550) for i in range(2)]
    for _ in streams[0]:
        if loop.cells.preemptions:
            break
    loop.close()
    assert any(isinstance(stream.result().last, TurnFailed) for stream in streams)


def leave(loop: ReplicaLoop) -> None:
    """The last of the running turns leaves, and finds no way back until `come_back`."""

    def out() -> None:
        turns = [loop._book.by_sequence[id(s)] for s in loop.scheduler.running]
        loop.cells.leave(max(turns, key=lambda turn: turn.began))
        assert loop.residency.acquire(Branch(99), blocking) is not None

    blocking = 560
    loop.call(out).result(WAIT)


def come_back(loop: ReplicaLoop) -> None:
    def free() -> None:
        busy = loop.residency._busy
        loop.residency.free(next(i for i, (branch, _) in busy.items() if branch.id == 99))

    loop.call(free).result(WAIT)


@pytest.mark.parametrize("window", [0, 48])
def test_one_that_left_moves_to_another_replica(
    tmp_path: Path, loop_on: MakeLoop, window: int
) -> None:
    """Frozen while it is out of the engine: all its rows are where the target finds them."""
    loop = loop_on(CountingEngine(2, n_cells=600, step_delay=0.001, window=window))
    stream = start(loop, [user("0")], n=400)
    stream.take(100)
    leave(loop)
    loop.call(lambda: loop.handoff.freeze(agent_id())).result(WAIT)[1].result(WAIT)
    engine = CountingEngine(1, window=window)
    target = make_loop(engine, loop.memory.store, node="n1")
    try:
        target.memory.open(agent_id())
        loop.call(lambda: loop.handoff.release(agent_id())).result(WAIT)
        before = stream.result()
        assert isinstance(before.last, TurnMoved)
        resume = Resume(tuple(before.prompt), tuple(before.ids))
        after = start(target, [user("0")], n=400, attempt=1, resume=resume).result()
        assert before.ids + after.ids == alone(stream.request, 400, window=window)
        assert max(map(sum, engine.steps)) == 1
    finally:
        target.close()


def test_one_that_left_goes_on_after_an_engine_fault(loop_on: MakeLoop) -> None:
    """It has nothing in the engine that could break with it."""
    loop = loop_on(CountingEngine(2, n_cells=600, step_delay=0.001))
    stream = start(loop, [user("0")], n=300)
    stream.take(100)
    leave(loop)
    loop.call(lambda: loop._ends.give_up(EngineFault("broken"))).result(WAIT)
    assert stream.result().ids == alone(stream.request, 300)
    all_free(loop)


def test_one_that_left_times_out(loop_on: MakeLoop) -> None:
    config = LoopConfig(turn_timeout_s=0.5)
    loop = loop_on(CountingEngine(2, n_cells=600, step_delay=0.001), loop=config)
    stream = start(loop, [user("0")], n=400)
    stream.take(50)
    leave(loop)
    timed_out(stream)
    come_back(loop)
    settle(loop)
    (branch,) = memory_of(loop).branches
    assert branch.tokens == stream.answer.prompt + stream.answer.ids
    all_free(loop)


# ---- order


@pytest.mark.slow
def test_small_turns_do_not_keep_a_large_one_out(loop_on: MakeLoop) -> None:
    engine = CountingEngine(3, n_cells=950, step_delay=0.003)
    loop = loop_on(engine)
    order: list[str] = []
    enter = loop.memory.enter

    def entering(memory: Any, *rest: Any) -> None:
        order.append(memory.agent.session)
        enter(memory, *rest)

    loop.memory.enter = entering  # type: ignore[method-assign]
    streams = [start(loop, [user("x" * 60)], session=f"s{i}", n=300 + 9 * i) for i in range(2)]
    for stream in streams:
        stream.take(1)
    with together(loop):
        streams.append(start(loop, [user("x" * 850)], session="large", n=9))
        streams += [start(loop, [user("x" * 60)], session=f"t{i}", n=9 + i % 7) for i in range(40)]
    for stream in streams:
        assert stream.result().reason == "length"
    assert 2 <= order.index("large") < 16
    all_free(loop)


def test_the_turns_of_one_agent_do_not_keep_the_others_waiting(loop_on: MakeLoop) -> None:
    engine = CountingEngine(1)
    loop = loop_on(engine)
    order: list[str] = []

    def ask(session: str) -> Stream:
        stream = start(loop, [user(f"{session}{len(order)}")], session=session, n=2)
        return stream

    enter = loop.memory.enter

    def entering(memory: Any, *rest: Any) -> None:
        order.append(memory.agent.session)
        enter(memory, *rest)

    loop.memory.enter = entering  # type: ignore[method-assign]
    with together(loop):
        crowd = [ask("crowd") for _ in range(10)]
        others = [ask("b"), ask("c")]
    for stream in [*crowd, *others]:
        assert isinstance(stream.result().last, TurnFinished)
    assert {"b", "c"} <= set(order[:4])
    all_free(loop)


# ---- deadlines and cancels


def timed_out(stream: Stream) -> None:
    last = stream.result().last
    assert isinstance(last, TurnFailed)
    assert isinstance(last.error, TurnTimeout)
    assert "longer than 0.5 s" in str(last.error)


def test_a_turn_that_takes_too_long_ends_running_or_waiting(loop_on: MakeLoop) -> None:
    loop = loop_on(CountingEngine(1, step_delay=0.002), loop=LoopConfig(turn_timeout_s=0.5))
    running = start(loop, [user("one")], n=4000, turn_id="1")
    running.take(5)
    waiting = start(loop, [user("two")], session="b", n=4000)
    queued = start(loop, [user("three")], n=4000, turn_id="3")
    timed_out(running)
    # The sequence is free, and those who waited had some of their time left.
    for stream in (waiting, queued):
        timed_out(stream)
    settle(loop)
    branch = memory_of(loop).branches[0]
    assert branch.tokens == running.answer.prompt + running.answer.ids
    assert run(loop, [user("short")], session="c", n=3).reason == "length"
    all_free(loop)


@dataclass
class Reads:
    """Of stored rows, while `gate` is not set: `entered` tells that one waits there."""

    gate: threading.Event
    entered: threading.Event


@contextmanager
def slow_reads(loop: ReplicaLoop, *sessions: str) -> Iterator[Reads]:
    """Rows of these agents are in the store only, and stay there until the gate is set."""
    evict(loop, pool=True)
    reads, read = Reads(threading.Event(), threading.Event()), loop.memory.tiers.read
    ids = {run.id for s in sessions for b in memory_of(loop, s).branches for run in b.runs}

    def gated(tenant: str, run_id: str, *rest: Any) -> Any:
        if run_id in ids:
            reads.entered.set()
            assert reads.gate.wait(WAIT)
        return read(tenant, run_id, *rest)

    loop.memory.tiers.read = gated  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        reads.gate.set()


@pytest.mark.parametrize("phase", ["prefill", "decode", "restore"])
def test_a_cancelled_turn_frees_its_cells_within_two_steps(loop_on: MakeLoop, phase: str) -> None:
    engine = CountingEngine(2, n_ctx=8000, step_delay=0.002)
    loop = loop_on(engine)
    messages = [user("x" * (7000 if phase == "prefill" else 300))]
    if phase == "restore":
        messages += [assistant(run(loop, messages, n=9).text), user("And?")]
        with slow_reads(loop, "a") as reads:
            check_cancel(loop, engine, messages, lambda _: reads.entered.wait(WAIT))
    elif phase == "decode":
        check_cancel(loop, engine, messages, lambda stream: stream.take(5))
    else:
        check_cancel(loop, engine, messages, lambda stream: next(iter(stream)))
    all_free(loop)
    if phase == "restore":  # what was stored still is
        assert run(loop, messages, n=2).prefilled < 20


def check_cancel(
    loop: ReplicaLoop,
    engine: CountingEngine,
    messages: list[dict[str, str]],
    ready: Callable[[Stream], object],
) -> None:
    other = start(loop, [user("other")], session="b", n=3000, turn_id="other")
    other.take(1)
    stream = start(loop, messages, n=900)
    assert ready(stream)
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((len(engine.steps), len(loop.residency._busy)))
        if seen[-1][0] < asked + 5:
            loop.call(look)

    asked = loop.call(lambda: len(engine.steps)).result(WAIT)
    loop.cancel("turn")
    loop.call(look)
    assert stream.result().reason == "cancelled"
    other.take(200)
    began = seen[0][0]
    assert all(busy == 1 for at, busy in seen if at >= began + 2)
    assert max(at for at, _ in seen) >= began + 2
    loop.cancel("other")
    other.result()


def test_a_turn_that_takes_too_long_ends_while_it_is_restored(
    loop_on: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = loop_on(CountingEngine(2))
    messages = [user("x" * 300)]
    messages += [assistant(run(loop, messages, n=9).text), user("And?")]
    with slow_reads(loop, "a") as reads:
        stream = start(loop, messages, n=9)
        assert reads.entered.wait(WAIT)
        monkeypatch.setattr(loop._ends, "_limit_s", 0.5)
        timed_out(stream)
        assert not reads.gate.is_set()
        all_free(loop)
    monkeypatch.undo()
    assert run(loop, messages, n=9).prefilled < 20


def asking_again(loop: ReplicaLoop, sessions: list[str]) -> dict[str, list[dict[str, str]]]:
    """A second question of each of these agents, after a first turn."""
    asked = {session: [user(session * 300)] for session in sessions}
    for session, messages in asked.items():
        messages += [assistant(run(loop, messages, session=session, n=9).text), user("And?")]
    return asked


def test_slow_restores_keep_nobody_else_from_beginning(loop_on: MakeLoop) -> None:
    loop = loop_on(CountingEngine(10))
    asked = asking_again(loop, list("abcdefgh"))
    with slow_reads(loop, *asked) as reads:
        streams = [start(loop, m, session=s, n=3, turn_id=s) for s, m in asked.items()]
        while loop.call(lambda: len(loop._book.restoring)).result(WAIT) < len(streams):
            pass
        assert run(loop, [user("new")], session="new", n=5).reason == "length"
        for session in "abcd":  # those that the readers are at, and then one that none is at
            loop.cancel(session)
        loop.cancel("h")
        for stream in (*streams[:4], streams[7]):
            assert stream.result().reason == "cancelled"
        assert not reads.gate.is_set()
    for stream in streams[4:7]:
        assert stream.result().prefilled < 20
    all_free(loop)


def test_a_cancelled_turn_that_nobody_prepares_yet_ends_at_once(loop_on: MakeLoop) -> None:
    loop = loop_on(CountingEngine(10))
    gate, opened = threading.Event(), loop.memory.open
    entered = threading.Semaphore(0)

    def opening(agent: Any) -> Any:
        entered.release()
        assert gate.wait(WAIT)
        return opened(agent)

    loop.memory.open = opening  # type: ignore[method-assign]
    try:
        streams = [
            start(loop, [user(s)], session=s, n=3, turn_id=s) for s in ("a", "b", "c", "d", "e")
        ]
        for _ in range(4):
            assert entered.acquire(timeout=WAIT)
        loop.cancel("e")
        assert streams[4].result().reason == "cancelled"
    finally:
        gate.set()
    for stream in streams[:4]:
        assert stream.result().reason == "length"
    assert not entered.acquire(blocking=False)
    all_free(loop)


def test_the_others_decode_while_one_is_restored(loop_on: MakeLoop) -> None:
    engine = CountingEngine(2)
    loop = loop_on(engine)
    asked = asking_again(loop, ["a"])["a"]
    with slow_reads(loop, "a") as reads:
        stored = memory_of(loop).branches[0].rows
        other = start(loop, [user("other")], session="b", n=2000, turn_id="b")
        other.take(1)
        stream = start(loop, asked, n=9)
        assert reads.entered.wait(WAIT)
        other.take(len(engine.steps) + 100)  # which has no token without a step
        assert loop.call(lambda: [t.sink for t in loop._book.restoring]).result(WAIT) == [stream]
        assert not reads.gate.is_set()
    answer = stream.result()
    assert (answer.reason, answer.cache) == ("length", "warm")
    assert answer.cached == stored > 300
    loop.cancel("b")
    other.result()
    all_free(loop)


# ---- stalls


def test_an_arrival_does_not_stall_the_others_longer_than_the_bound(loop_on: MakeLoop) -> None:
    """A token takes 0.2 ms, a step may take 20 ms: beside a decode at most 100 tokens."""
    engine = CountingEngine(4, token_delay=2e-4)
    config = LoopConfig(scheduler=SchedulerConfig(max_step_s=0.02))
    loop = loop_on(engine, loop=config)
    running = start(loop, [user("x" * 600)], session="a", n=600, turn_id="a")
    running.take(30)
    began = len(engine.steps)
    arrivals = [start(loop, [user(f"{i}" * 1500)], session=f"s{i}", n=2) for i in range(3)]
    for stream in arrivals:
        assert stream.result().reason == "length"
    steps = engine.steps[began:]
    assert all(1 in step for step in steps)  # who decodes is in every step
    assert max(map(sum, steps)) <= 105
    assert any(sum(step) > 30 for step in steps)  # and the bound is used
    loop.cancel("a")
    running.result()
    all_free(loop)


# ---- many agents over a few slots


Told = dict[str, list[tuple[str, list[int], str]]]  # agent -> (asked, ids, text) of every turn


@dataclass
class Crowd:
    """Agents that talk turn after turn; `told` is the log of what each was told."""

    loop: ReplicaLoop
    n_agents: int
    turns: int
    most: int  # tokens of a reply
    words: int

    def talk(self, seed: int = 1) -> Told:
        rng = random.Random(seed)
        told: Told = {}
        messages: dict[str, list[dict[str, str]]] = {}
        for first in range(0, self.turns, self.n_agents):
            asked = []
            for number in range(min(self.n_agents, self.turns - first)):
                session = f"agent{number}"
                text = self.question(rng, session)
                history = messages.setdefault(session, [])
                history.append(user(text))
                n = rng.randrange(2, self.most)
                asked.append((session, text, start(self.loop, history, session=session, n=n)))
            for session, text, stream in asked:
                answer = stream.result()
                assert isinstance(answer.last, TurnFinished), answer.last
                messages[session].append(assistant(answer.text))
                told.setdefault(session, []).append((text, answer.ids, answer.text))
            self.note(sum(map(len, told.values())))
        return told

    def question(self, rng: random.Random, session: str) -> str:
        return f"{session} " + "word " * rng.randrange(1, self.words)

    def note(self, turns: int) -> None:
        """A round is over; so many turns were taken."""


def resident_bytes() -> int:
    """Of this process."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the most there ever were


def pool_bytes(loop: ReplicaLoop) -> int:
    return sum(entry.size for entry in loop.memory.tiers.pool._entries.values())


@dataclass
class Steady(Crowd):
    """Also notes, by turns, the process memory beside the pool."""

    beside: dict[int, int] = field(default_factory=dict)

    def note(self, turns: int) -> None:
        settle(self.loop)
        gc.collect()
        self.beside[turns] = resident_bytes() - pool_bytes(self.loop)

    def check(self) -> None:
        """Of 600 turns' rows, 17 to 33 MiB, none is left but in the pool. What the agents said,
        and the test's own log, took 2 to 6 MiB on Linux."""
        grown = self.beside[1000] - self.beside[400]
        print(f"beside the pool, 600 turns took {grown / 2**20:.1f} MiB")
        assert grown < 12 << 20


def check_crowd(loop: ReplicaLoop, crowd: Crowd) -> Told:
    """The crowd talks; at the end cells and process memory are what they were, but for the rows
    that RAM is meant to hold."""
    kv_bytes = loop.engine.kv_bytes
    run(loop, [user("warm")], persist=False)
    gc.collect()
    before = resident_bytes()
    told = crowd.talk()
    assert sum(map(len, told.values())) == crowd.turns
    settle(loop)
    gc.collect()
    after = resident_bytes()
    pool, held = loop.memory.tiers.pool, pool_bytes(loop)
    assert pool.used_bytes == held <= pool.budget_bytes
    print(f"resident: {before >> 20} MiB, then {after >> 20} MiB, of which pool {held >> 20} MiB")
    assert after - before <= 0.1 * before + (64 << 20) + held
    assert loop.engine.kv_bytes == kv_bytes
    assert not loop.memory.faults
    return told


_WIDE = LoopConfig(scheduler=SchedulerConfig(max_waiting=400))


Parted = list[tuple[list[int], list[int], list[int]]]  # prompt, the lone reply, the crowd's


def check_parted(reference: Engine, parted: Parted, total: int, most: float = GAP) -> None:
    """A batch of four is computed by other kernels: a reply may part from the lone one, but only
    where its token, or any where it ended, is nearly as likely as the likeliest."""
    gaps = []
    for prompt, lone, crowds in parted:
        common = common_prefix(lone, crowds)
        logits = feed(reference, 0, [*prompt, *lone[:common]])
        reference.truncate(0, 0)
        chosen = crowds[common] if common < len(crowds) else int(np.argsort(logits)[-2])
        gaps.append(float(logits.max() - logits[chosen]))
    print(f"{len(parted)} of {total} replies parted from the lone run's, at gaps {gaps}")
    assert all(gap < most for gap in gaps)


def check_told(lone: ReplicaLoop, told: Told, sessions: list[str]) -> tuple[Parted, int]:
    """The same conversations one by one on a loop of their own, each up to the first reply that is
    another; (those replies, number of replies)."""
    parted: Parted = []
    total = 0
    for session in sessions:
        messages: list[dict[str, str]] = []
        for text, ids, said in told[session]:
            messages.append(user(text))
            answer = run(lone, messages, session=session, n=max(len(ids), 1))
            if answer.ids != ids:
                parted.append((answer.prompt, answer.ids, ids))
                total += 1
                break  # from here on the two have other histories
            total += 1
            messages.append(assistant(said))
    return parted, total


@pytest.mark.slow
def test_two_hundred_agents_over_four_slots(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(4, n_ctx=850, n_cells=850), loop=_WIDE)
    crowd = Steady(loop, 200, 1000, most=120, words=8)
    told = check_crowd(loop, crowd)
    crowd.check()
    assert loop.residency.evictions > 500
    assert loop.cells.preemptions > 5
    assert loop.engine.kv_bytes == 850 * loop.engine.key.spec.f16_row_bytes
    all_free(loop)
    parted, total = check_told(loop_on(FakeEngine(1, n_ctx=850)), told, sorted(told)[::10])
    assert (parted, total) == ([], 100)


@pytest.mark.slow
def test_two_hundred_agents_over_four_slots_of_llama_cpp(
    loop_on: MakeLoop, tiny_models: dict[str, Path]
) -> None:
    from actors.engines.llama_engine import LlamaEngine

    def engine(slots: int, cells: int) -> LlamaEngine:
        path = tiny_models["no_template"]
        made = LlamaEngine(path, n_seq_max=slots, n_ctx=1024, n_cells=cells, n_threads=1)
        made.vocab.chat_template = FakeVocab().chat_template
        return made

    loop = loop_on(engine(4, 1024), loop=_WIDE)
    crowd = Steady(loop, 200, 1000, most=12, words=6)
    told = check_crowd(loop, crowd)
    crowd.check()
    assert loop.residency.evictions > 500
    assert loop.engine.kv_bytes == loop.engine.n_cells * loop.engine.key.spec.f16_row_bytes
    all_free(loop)
    parted, total = check_told(loop_on(engine(1, 1024)), told, sorted(told)[::10])
    assert total > 80
    reference = engine(1, 1024)
    check_parted(reference, parted, total)
    reference.close()


def test_a_turn_that_is_refused_while_others_are_placed_fails_alone(loop_on: MakeLoop) -> None:
    """Preparing may end between the look for those that cannot run and the one for those that
    can."""
    loop = loop_on(FakeEngine(2, n_ctx=400, step_delay=0.01))
    other = start(loop, [user("hello")], session="b", ignore_eos=True, n=100)
    other.take(1)
    waiting = loop.scheduler.waiting
    order = waiting.order

    def late() -> list[Any]:
        for turn in waiting:
            assert turn.prepared is None or turn.prepared.exception(WAIT) is not None
        return order()

    waiting.order = late  # type: ignore[method-assign]
    last = start(loop, [user("x" * 500)]).result().last
    assert isinstance(last, TurnFailed)
    assert isinstance(last.error, InvalidRequest)
    assert len(other.result().ids) == 100
