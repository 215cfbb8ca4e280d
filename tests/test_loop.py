"""Turns on a replica's loop: the seam between turns, branches, migration, faults, overload."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines.base import Chunk, Logits
from actors.engines.fake_engine import FakeEngine
from actors.errors import AgentMoved, EngineFault, InvalidRequest, Overloaded
from actors.loop import LoopConfig, ReplicaLoop
from actors.scheduler import SchedulerConfig
from actors.turn import Resume, TurnFailed, TurnFinished, TurnMoved
from tests.loops import (
    WAIT,
    Answer,
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

MakeLoop = Callable[..., ReplicaLoop]
Messages = list[dict[str, str]]
END, USER, ASSISTANT = 260, 257, 258
LONG = "Tell me about the sea, the wind and the old harbour of the town. " * 10


@pytest.fixture
def loop_on(tmp_path: Path) -> Iterator[MakeLoop]:
    """Loops that are closed at the end; by default on one store and one fake model."""
    loops: list[ReplicaLoop] = []

    def make(engine: FakeEngine | None = None, store: Any = None, **options: Any) -> ReplicaLoop:
        made = make_loop(engine or FakeEngine(4), store or tmp_path / "store", **options)
        loops.append(made)
        return made

    yield make
    for made in loops:
        if made.alive:
            made.close()


class SlowEngine(FakeEngine):
    """Steps only while `gate` is set; `faults` steps raise."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.faults = 0

    def step(self, chunks: Any) -> dict[int, Logits]:
        assert self.gate.wait(WAIT)
        if self.faults:
            self.faults -= 1
            raise EngineFault("the engine broke, as the test asked")
        return super().step(chunks)


def talk(loop: ReplicaLoop, messages: Messages, question: str, **options: Any) -> Answer:
    """One more question of a conversation; its reply is appended to `messages`."""
    messages.append(user(question))
    answer = run(loop, messages, **options)
    messages.append(assistant(answer.text))
    return answer


def direct(prompt: list[int], n: int, engine: FakeEngine | None = None) -> list[int]:
    """What the model says after `prompt`, straight from the engine."""
    engine = engine or FakeEngine(1)
    for at in range(0, len(prompt), 256):
        part = prompt[at : at + 256]
        logits = engine.step([Chunk(0, part, at, 1)])
    reply: list[int] = []
    while len(reply) < n:
        token = int(logits[0][-1].argmax())
        if token == END:
            break
        reply.append(token)
        logits = engine.step([Chunk(0, [token], len(prompt) + len(reply) - 1, 1)])
    return reply


def all_free(loop: ReplicaLoop) -> None:
    """Nothing runs, waits or is reserved; every cell can be freed."""
    settle(loop)

    def look() -> None:
        assert not loop.scheduler.running
        assert not loop.scheduler.waiting
        for turns in (
            loop._book.active,
            loop._book.restoring,
            loop._book.draining,
            loop._book.by_sequence,
        ):
            assert not turns
        loop.residency.evict_idle()
        assert loop.residency.cells_used == 0
        engine = loop.engine
        assert [engine.n_rows(i) for i in range(engine.n_seq_max)] == [0] * engine.n_seq_max
        assert sorted(loop.residency._free) == list(range(engine.n_seq_max))

    loop.call(look).result(WAIT)


# ---- one turn


def test_the_reply_is_what_the_model_says(loop_on: MakeLoop) -> None:
    loop = loop_on()
    answer = run(loop, [user(LONG)], n=50)
    vocab = loop.engine.vocab
    assert answer.prompt == [USER, *vocab.tokenize(LONG), END, ASSISTANT]
    assert answer.ids == direct(answer.prompt, 50)
    assert answer.text == bytes(answer.ids).decode()
    assert (answer.reason, answer.cache, answer.cached) == ("length", "cold", 0)
    all_free(loop)


def test_several_agents_at_once_do_not_disturb_each_other(loop_on: MakeLoop) -> None:
    loop = loop_on()
    streams = [start(loop, [user(f"{i} {LONG}")], session=f"s{i}", n=40) for i in range(9)]
    for stream in streams:
        answer = stream.result()
        assert answer.ids == direct(answer.prompt, 40)
    all_free(loop)


def test_a_prompt_longer_than_the_context_is_refused(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(2, n_ctx=200))
    last = run(loop, [user("x" * 200)]).last
    assert isinstance(last, TurnFailed)
    assert isinstance(last.error, InvalidRequest)
    assert (last.error.param, last.error.code) == ("messages", "context_length_exceeded")
    fits = run(loop, [user("x" * 187)], n=99)
    assert len(fits.ids) == 10
    assert fits.reason == "length"
    all_free(loop)


# ---- the seam between turns


def ended_by_itself(loop: ReplicaLoop, messages: Messages) -> dict[str, Any]:
    """Sampling options under which the model ends its reply by itself."""
    for seed in range(50):
        options = {"temperature": 1.0, "seed": seed, "n": 200}
        if run(loop, messages, session=f"try{seed}", persist=False, **options).reason == "stop":
            return options
    raise AssertionError("no seed ends the reply")


@pytest.mark.parametrize("codec", ["f16", "q4"])
@pytest.mark.parametrize("ending", ["length", "stop"])
@pytest.mark.parametrize("parked", ["hot", "pool", "store"])
def test_turn_two_prefills_only_its_new_message(
    loop_on: MakeLoop, ending: str, parked: str, codec: str
) -> None:
    loop, messages = loop_on(codec=codec), []
    options = {"n": 30}
    if ending == "stop":
        options = ended_by_itself(loop, [user(LONG)])
    first = talk(loop, messages, LONG, **options)
    assert first.reason == ending
    if parked != "hot":
        evict(loop, pool=parked == "store")
    second = talk(loop, messages, "And the ships?")
    vocab = loop.engine.vocab
    new = [END, USER, *vocab.tokenize("And the ships?"), END, ASSISTANT]
    assert second.prompt == [*first.prompt, *first.ids, *new]
    unfed = 1 if ending == "length" else 0  # the last id of a cut reply was never fed
    assert second.prefilled == len(new) + unfed
    assert second.cache == {"hot": "hot", "pool": "hot", "store": "warm"}[parked]
    if codec == "f16":
        assert second.ids == direct(second.prompt, 20)
    all_free(loop)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1.7])
def test_ten_turns_are_token_faithful(loop_on: MakeLoop, temperature: float) -> None:
    """Sampled bytes need not even be UTF-8; the ids stay what was emitted."""
    loop, messages = loop_on(), []
    history: list[int] = []
    for turn in range(10):
        answer = talk(loop, messages, f"{turn}?", temperature=temperature, seed=turn, n=25)
        assert answer.prompt[: len(history)] == history
        assert answer.prefilled <= len(f"{turn}?") + 5
        history = answer.prompt + answer.ids
    assert len(memory_of(loop).branches) == 1
    all_free(loop)


class TwoWayVocabEngine(FakeEngine):
    """Token 1 reads "e" too, and is the one its tokenizer chooses."""

    def __init__(self) -> None:
        super().__init__(4)
        whole = self.vocab.tokenize
        self.vocab.tokenize = lambda text: [1 if i == 101 else i for i in whole(text)]  # type: ignore[method-assign]
        bytes_of = self.vocab.token_bytes
        self.vocab.token_bytes = lambda i: b"e" if i == 1 else bytes_of(i)  # type: ignore[method-assign]


def test_emitted_ids_stay_where_the_tokenizer_would_choose_others(loop_on: MakeLoop) -> None:
    loop, messages = loop_on(TwoWayVocabEngine()), []
    first = talk(loop, messages, "see here", n=60)
    assert ord("e") in first.ids
    assert loop.engine.vocab.tokenize(first.text) != first.ids
    second = talk(loop, messages, "more", n=60)
    assert second.prompt[: len(first.prompt) + len(first.ids)] == first.prompt + first.ids
    assert second.prefilled == len("more") + 5


@pytest.mark.parametrize("width", [1, 3, 6])
@pytest.mark.parametrize("parked", [False, True])
def test_a_reply_cut_by_a_stop_string_leaves_no_hidden_token(
    loop_on: MakeLoop, width: int, parked: bool
) -> None:
    loop, messages = loop_on(), []
    whole = run(loop, [user(LONG)], session="look", n=60).text
    stop = whole[30 : 30 + width]
    shown = whole[: whole.index(stop)]
    first = talk(loop, messages, LONG, n=60, stop=(stop,))
    assert (first.text, first.reason) == (shown, "stop")
    settle(loop)
    branch = memory_of(loop).branches[0]
    assert branch.tokens == first.prompt + list(shown.encode())
    assert branch.rows <= len(branch.tokens)
    assert loop.call(lambda: loop.engine.n_rows(loop.residency.find(branch))).result(WAIT) <= len(
        branch.tokens
    )
    if parked:
        evict(loop, pool=True)
    second = talk(loop, messages, "And?")
    assert second.prompt[:-8] == first.prompt + list(shown.encode())
    assert second.prefilled == 8
    assert second.ids == direct(second.prompt, 20)
    assert len(memory_of(loop).branches) == 1
    all_free(loop)


def test_a_stop_string_across_a_block_boundary(loop_on: MakeLoop) -> None:
    """Rows past the cut may be in a sealed block already; none of them may stay."""
    loop = loop_on()
    whole = run(loop, [user("short")], session="look", n=600)
    n_prompt = len(whole.prompt)
    at = 256 - n_prompt  # this reply token is the first of the second block
    stop = whole.text[at - 3 : at + 5]
    messages: Messages = []
    first = talk(loop, messages, "short", n=600, stop=(stop,))
    assert first.text == whole.text[: at - 3]
    settle(loop)
    branch = memory_of(loop).branches[0]
    assert (branch.blocks, branch.rows) == ([], 253)
    evict(loop, pool=True)
    second = talk(loop, messages, "And?")
    assert second.prefilled == 8
    assert second.ids == direct(second.prompt, 20)


# ---- branches


def test_a_side_request_costs_the_conversation_nothing(loop_on: MakeLoop) -> None:
    loop, messages = loop_on(), []
    first = talk(loop, messages, LONG)
    side = run(loop, [user("A title for this?")])
    assert side.cached <= 1
    follow = run(loop, [*messages, user("Summarize all that.")])
    assert follow.prefilled <= len("Summarize all that.") + 5
    second = talk(loop, messages, "And the ships?")
    assert second.prompt[: len(first.prompt) + len(first.ids)] == first.prompt + first.ids
    assert second.prefilled <= len("And the ships?") + 5
    assert second.ids == direct(second.prompt, 20)
    all_free(loop)


@pytest.mark.parametrize("parked", [False, True])
def test_regenerating_a_reply_keeps_the_prompt(loop_on: MakeLoop, parked: bool) -> None:
    loop = loop_on()
    first = run(loop, [user(LONG)])
    if parked:
        evict(loop, pool=True)
    again = run(loop, [user(LONG)])
    assert (again.ids, again.prefilled) == (first.ids, 1)
    other = run(loop, [user(LONG)], temperature=1.0, seed=4)
    assert other.prefilled == 1
    settle(loop)
    (branch,) = memory_of(loop).branches
    assert branch.tokens == other.prompt + other.ids
    assert [(r.start, r.stop) for r in branch.replies] == [(len(other.prompt), len(branch.tokens))]
    all_free(loop)


@pytest.mark.parametrize("parked", [False, True])
def test_an_edited_message_opens_a_branch_and_truncates_none(
    loop_on: MakeLoop, parked: bool
) -> None:
    loop, messages = loop_on(), []
    for turn in range(4):
        last = talk(loop, messages, f"{LONG[:200]} {turn}")
    settle(loop)
    tokens, rows = list(memory_of(loop).branches[0].tokens), memory_of(loop).branches[0].rows
    if parked:
        evict(loop, pool=True)
    edited = [*messages[:4], user("Rather the mountains.")]
    branched = run(loop, edited)
    assert branched.prefilled <= len("Rather the mountains.") + 5
    assert branched.ids == direct(branched.prompt, 20)
    settle(loop)
    left = memory_of(loop).branches[0]
    assert (left.tokens, left.rows) == (tokens, rows)
    assert len(memory_of(loop).branches) == 2
    onward = talk(loop, messages, "And the ships?")
    assert onward.prompt[: len(last.prompt) + len(last.ids)] == last.prompt + last.ids
    assert onward.prefilled <= len("And the ships?") + 5
    both = run(loop, [*edited, assistant(branched.text), user("And the snow?")])
    assert both.prefilled <= len("And the snow?") + 5
    assert both.ids == direct(both.prompt, 20)
    all_free(loop)


def test_a_branch_forks_with_one_sequence_only(loop_on: MakeLoop) -> None:
    """No second place: the source leaves, and the branch is restored from its encoded rows."""
    loop, messages = loop_on(FakeEngine(1)), []
    for turn in range(3):
        talk(loop, messages, f"{LONG[:200]} {turn}")
    branched = run(loop, [*messages[:2], user("Rather the mountains.")])
    assert branched.prefilled <= len("Rather the mountains.") + 5
    assert branched.ids == direct(branched.prompt, 20)
    assert talk(loop, messages, "And?").prefilled <= 9
    all_free(loop)


def test_a_branch_that_does_not_fit_beside_its_source(loop_on: MakeLoop) -> None:
    """Enough sequences, but not enough cells for both: the source leaves in time."""
    loop, messages = loop_on(FakeEngine(3, n_cells=900)), []
    talk(loop, messages, "short")
    for _ in range(3):
        talk(loop, messages, LONG[:200])
    branched = run(loop, [*messages[:2], user(LONG[:500])])
    assert isinstance(branched.last, TurnFinished)
    assert branched.ids == direct(branched.prompt, 20)
    assert talk(loop, messages, "And?").prefilled <= 9
    all_free(loop)


# ---- order, limits, cancel


def test_two_turns_of_one_agent_queue(loop_on: MakeLoop) -> None:
    engine = SlowEngine(4)
    loop = loop_on(engine)
    engine.gate.clear()
    first = start(loop, [user("one")], turn_id="1")
    second = start(loop, [user("two")], turn_id="2")
    other = start(loop, [user("three")], session="b", turn_id="3")
    engine.gate.set()
    assert isinstance(other.result().last, TurnFinished)
    a, b = first.result(), second.result()
    assert a.ids == direct(a.prompt, 20)
    assert b.ids == direct(b.prompt, 20)
    all_free(loop)


def test_queued_turns_run_in_the_order_they_came(loop_on: MakeLoop) -> None:
    loop = loop_on()
    streams = [start(loop, [user(f"{number}")], turn_id=str(number)) for number in range(6)]
    for stream in streams:
        assert isinstance(stream.result().last, TurnFinished)
    settle(loop)
    branches = sorted(memory_of(loop).branches, key=lambda b: b.last_used)
    assert [b.tokens[1] for b in branches] == list(b"2345")  # the four youngest, oldest first


def test_cancel_ends_a_running_turn_and_keeps_what_was_said(loop_on: MakeLoop) -> None:
    loop, messages = loop_on(FakeEngine(4, step_delay=0.001)), [user(LONG)]
    stream = start(loop, messages, n=2000)
    stream.take(20)
    loop.cancel("turn")
    answer = stream.result()
    assert answer.reason == "cancelled"
    assert 20 <= len(answer.ids) < 2000
    assert answer.text == bytes(answer.ids).decode()
    messages += [assistant(answer.text)]
    after = talk(loop, messages, "Go on.")
    assert after.prefilled <= len("Go on.") + 5
    all_free(loop)


def test_cancel_of_a_waiting_turn(loop_on: MakeLoop) -> None:
    engine = SlowEngine(1)
    loop = loop_on(engine)
    running = start(loop, [user("one")], session="a", turn_id="1")
    running.take(1)
    waiting = start(loop, [user("two")], session="b", turn_id="2")
    queued = start(loop, [user("three")], session="a", turn_id="3")
    loop.cancel("2")
    loop.cancel("3")
    loop.cancel("unknown")
    assert waiting.result().reason == "cancelled"
    assert queued.result().reason == "cancelled"
    assert isinstance(running.result().last, TurnFinished)
    all_free(loop)


def test_cancel_during_restore_frees_sequence_and_worker(
    loop_on: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More cancelled restores than there are workers, each with more blocks than fit in flight."""
    loop, messages = loop_on(FakeEngine(2)), []
    talk(loop, messages, LONG * 5)
    whole, entered, gate = loop.engine.load, threading.Event(), threading.Event()

    def load(seq_id: int, begin: int, rows: Any) -> None:
        entered.set()
        assert gate.wait(WAIT)
        whole(seq_id, begin, rows)

    monkeypatch.setattr(loop.engine, "load", load)
    for number in range(6):
        evict(loop, pool=True)
        entered.clear()
        gate.clear()
        stream = start(loop, [*messages, user("And?")], turn_id=f"c{number}")
        assert entered.wait(WAIT)
        loop.cancel(f"c{number}")
        gate.set()
        assert stream.result().reason == "cancelled"
    began = time.monotonic()
    answer = talk(loop, messages, "And now?")
    assert isinstance(answer.last, TurnFinished)
    assert time.monotonic() - began < 5
    all_free(loop)


def test_a_full_queue_refuses_with_overloaded(loop_on: MakeLoop) -> None:
    engine = SlowEngine(1)
    config = LoopConfig(scheduler=SchedulerConfig(max_waiting=3))
    loop = loop_on(engine, loop=config)
    running = start(loop, [user("one")], n=5)
    running.take(1)
    engine.gate.clear()
    waiting = [start(loop, [user("x")], session=f"s{number}") for number in range(3)]
    with pytest.raises(Overloaded) as caught:
        start(loop, [user("x")], session="s3")
    assert caught.value.retry_after > 0
    engine.gate.set()
    for stream in [running, *waiting]:
        assert isinstance(stream.result().last, TurnFinished)
    assert isinstance(run(loop, [user("again")]).last, TurnFinished)
    all_free(loop)


# ---- faults


def test_an_engine_fault_fails_the_turn_and_the_loop_serves_the_next(loop_on: MakeLoop) -> None:
    engine = SlowEngine(4, step_delay=0.001)
    loop, messages = loop_on(engine), []
    first = talk(loop, messages, LONG)
    settle(loop)
    stream = start(loop, [*messages, user("And the ships?")], n=3000)
    idle = run(loop, [user("idle")], session="idle")
    stream.take(50)
    engine.faults = 1
    broken = stream.result()
    assert isinstance(broken.last, TurnFailed)
    assert isinstance(broken.last.error, EngineFault)
    second = talk(loop, messages, "And the ships?")
    assert isinstance(second.last, TurnFinished)
    assert second.cached >= len(first.prompt) + len(first.ids) - 1
    assert second.ids == direct(second.prompt, 20)
    assert isinstance(idle.last, TurnFinished)
    all_free(loop)


def test_a_turn_that_failed_first_of_all_can_be_asked_again(loop_on: MakeLoop) -> None:
    engine = SlowEngine(4, step_delay=0.001)
    loop = loop_on(engine)
    stream = start(loop, [user(LONG)], n=3000)
    stream.take(5)
    engine.faults = 1
    assert isinstance(stream.result().last, TurnFailed)
    answer = run(loop, [user(LONG)])
    assert answer.ids == direct(answer.prompt, 20)
    all_free(loop)


def test_rows_the_engine_refuses_are_prefilled(
    loop_on: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    evict(loop, pool=True)
    whole = loop.engine.load

    def refuse(seq_id: int, begin: int, rows: Any) -> None:
        if begin:
            raise EngineFault("no")
        whole(seq_id, begin, rows)

    monkeypatch.setattr(loop.engine, "load", refuse)
    answer = talk(loop, messages, "And the ships?")
    assert answer.cached == 256
    assert answer.ids == direct(answer.prompt, 20)
    assert loop.memory.faults["engine_refused"] == 1
    all_free(loop)


def test_a_sink_that_raises_harms_nobody_else(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(4, step_delay=0.001))
    other = start(loop, [user("steady")], session="b", n=100)
    other.take(3)
    bad = Stream(start(loop, [user("x")], session="c", n=1).request)

    def sink(item: object) -> None:
        raise RuntimeError("nobody listens")

    loop.submit(bad.request, sink)
    answer = other.result()
    assert answer.ids == direct(answer.prompt, 100)
    assert isinstance(run(loop, [user("again")]).last, TurnFinished)
    all_free(loop)


def test_a_negative_seed_harms_nobody(loop_on: MakeLoop) -> None:
    loop = loop_on()
    answer = run(loop, [user("x")], temperature=1.0, seed=-5)
    assert isinstance(answer.last, TurnFinished)


# ---- migration


def endless(step_delay: float = 0.0) -> FakeEngine:
    """A model that never ends its reply by itself."""
    engine = FakeEngine(4, step_delay=step_delay)
    engine.vocab.eog = frozenset()
    return engine


def freeze(loop: ReplicaLoop) -> None:
    loop.call(lambda: loop.handoff.freeze(agent_id())).result(WAIT)[1].result(WAIT)


def resumed(loop: ReplicaLoop, stream: Stream, **options: Any) -> Answer:
    """The same turn again elsewhere, from what the first attempt emitted."""
    before = stream.answer
    resume = Resume(tuple(before.prompt), tuple(before.ids))
    messages = [dict(m) for m in stream.request.messages]
    return start(loop, messages, attempt=1, resume=resume, **options).result()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cut", [3, 120, 300])
def test_a_running_turn_moves_and_loses_no_token(
    loop_on: MakeLoop, tmp_path: Path, temperature: float, cut: int
) -> None:
    options: dict[str, Any] = {"n": 420, "temperature": temperature, "seed": 40}
    undisturbed = run(loop_on(endless(), store=tmp_path / "alone"), [user(LONG)], **options)
    source = loop_on(endless(0.0005))
    target = loop_on(endless(), node="n1")
    stream = start(source, [user(LONG)], **options)
    stream.take(cut)
    freeze(source)
    frozen = len(stream.answer.ids)
    claimed = target.memory.open(agent_id())
    assert claimed.origin == "remote"
    source.call(lambda: source.handoff.release(agent_id())).result(WAIT)
    moved = stream.result()
    assert isinstance(moved.last, TurnMoved)
    assert len(moved.ids) >= frozen
    answer = resumed(target, stream, **options)
    assert moved.ids + answer.ids == undisturbed.ids
    assert moved.text + answer.text == undisturbed.text
    assert answer.cache == "remote"
    assert answer.prompt == undisturbed.prompt
    assert target.memory.faults == {}
    restored = target.served["cached_tokens"]
    assert restored == len(undisturbed.prompt)
    settle(source)
    assert source.memory.get(agent_id()) is None
    all_free(source)
    all_free(target)


def test_a_move_restores_the_replys_rows_too(loop_on: MakeLoop) -> None:
    """Everything but the last emitted token arrives as rows; the target prefills one token."""
    source, messages = loop_on(FakeEngine(4, step_delay=0.0005)), [user(LONG)]
    engine = SlowEngine(4)
    target = loop_on(engine, node="n1")
    stream = start(source, messages, n=400)
    stream.take(100)
    freeze(source)
    target.memory.open(agent_id())
    source.call(lambda: source.handoff.release(agent_id())).result(WAIT)
    stream.result()
    engine.gate.clear()
    fed: list[int] = []
    step = engine.step

    def counting(chunks: list[Chunk]) -> dict[int, Logits]:
        fed.append(sum(len(c.token_ids) for c in chunks))
        return step(chunks)

    engine.step = counting  # type: ignore[method-assign, assignment]
    engine.gate.set()
    answer = resumed(target, stream, n=400)
    assert len(stream.answer.ids) + len(answer.ids) == 400
    assert fed[0] == 1
    assert max(fed) == 1


def test_a_waiting_turn_moves(loop_on: MakeLoop) -> None:
    source = loop_on(FakeEngine(4, step_delay=0.001))
    stream = start(source, [user("one")], n=3000, turn_id="1")
    stream.take(5)
    queued = start(source, [user("two")], turn_id="2")
    freeze(source)
    later = start(source, [user("three")], turn_id="3")
    loop_on(node="n1").memory.open(agent_id())
    source.call(lambda: source.handoff.release(agent_id())).result(WAIT)
    for each in (stream, queued, later):
        assert isinstance(each.result().last, TurnMoved)
    all_free(source)


def test_a_frozen_agent_takes_no_step_and_the_others_do(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(4, step_delay=0.0005))
    stream = start(loop, [user("one")], n=3000)
    stream.take(5)
    freeze(loop)
    sequence = loop._book.active[agent_id()].sequence
    assert sequence is not None
    n = len(sequence.tokens)
    other = run(loop, [user("two")], session="b", n=50)
    assert isinstance(other.last, TurnFinished)
    assert len(sequence.tokens) == n
    loop.call(lambda: loop.handoff.thaw(agent_id())).result(WAIT)
    assert len(stream.take(n + 20)) >= n + 20
    loop.cancel("turn")
    assert stream.result().reason == "cancelled"


def test_a_freeze_that_nobody_ends_thaws_by_a_new_claim(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(4, step_delay=0.0005), loop=LoopConfig(freeze_timeout_s=0.3))
    stream = start(loop, [user("one")], n=500)
    stream.take(5)
    epoch = loop.memory.store.epoch(agent_id(), loop.engine.key)
    freeze(loop)
    answer = stream.result()
    assert answer.ids == direct(answer.prompt, 500)
    assert loop.memory.store.epoch(agent_id(), loop.engine.key) == epoch + 1
    settle(loop)
    card = memory_of(loop).card
    assert card is not None
    assert card.epoch == epoch + 1
    assert not loop.memory.faults
    asked = [user("one"), assistant(answer.text), user("two")]
    assert run(loop, asked).prefilled <= 8
    loop.close()
    assert run(loop_on(), asked).prefilled <= 8


@pytest.mark.parametrize("tokens_per_s", [50.0, 5000.0])
def test_what_would_be_computed_again_for_long_is_stored_before_its_block_is_full(
    loop_on: MakeLoop, tokens_per_s: float
) -> None:
    """At most 0.7 s of prefill are lost; where a block takes no longer, it is one commit."""
    loop = loop_on(FakeEngine(4, step_delay=0.001))
    size = loop.memory.key.spec.block_tokens
    loop.rates.expect(tokens_per_s, 1.0)
    stream = start(loop, [user("one")], n=5000)
    stream.take(size - len(stream.take(1) and stream.answer.prompt) - 2)  # a block, nearly
    loop.memory.commits.settle(memory_of(loop)).result(WAIT)
    known = stream.answer.prompt + stream.answer.ids
    card = memory_of(loop).card
    assert card is not None
    stored = card.branches[0].rows if card.branches else 0
    if tokens_per_s > 1000:
        assert stored % size == 0  # none, or the block has been filled meanwhile
    else:
        assert len(known) - stored <= 0.7 * tokens_per_s + 2
        again = resumed(loop_on(node="n1"), stream, n=size).prefilled
        assert again <= max(len(known) - stored, 0)  # more may have been stored meanwhile
    loop.cancel("turn")
    stream.result()


def test_many_freezes_and_thaws(loop_on: MakeLoop) -> None:
    """Thawed at once, while the freeze's commit may be under way: nothing is lost or fenced."""
    loop = loop_on(FakeEngine(4, step_delay=0.0002))
    stream = start(loop, [user("one")], n=900)
    for number in range(15):
        stream.take(40 * number + 1)
        loop.call(lambda: loop.handoff.freeze(agent_id())).result(WAIT)
        loop.call(lambda: loop.handoff.thaw(agent_id())).result(WAIT)
        loop.call(lambda: loop.handoff.thaw(agent_id())).result(WAIT)
        loop.memory.persister.flush().result(WAIT)
        assert memory_of(loop).state == "owned"
    answer = stream.result()
    assert answer.ids == direct(answer.prompt, 900)
    settle(loop)
    assert not loop.memory.faults
    all_free(loop)


def test_a_frozen_agent_claimed_elsewhere_is_released_when_it_thaws(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(4, step_delay=0.0005))
    stream = start(loop, [user("one")], n=2000)
    stream.take(5)
    freeze(loop)
    other = loop_on(node="n1")
    other.memory.open(agent_id())
    loop.call(lambda: loop.handoff.thaw(agent_id())).result(WAIT)
    assert isinstance(stream.result().last, TurnMoved)
    assert loop.memory.get(agent_id()) is None
    answer = resumed(other, stream, n=2000)
    assert stream.answer.ids + answer.ids == direct(stream.answer.prompt, 2000)
    all_free(loop)


def test_freeze_of_an_agent_that_is_not_owned(loop_on: MakeLoop) -> None:
    loop = loop_on()
    with pytest.raises(AgentMoved):
        loop.call(lambda: loop.handoff.freeze(agent_id())).result(WAIT)


@pytest.mark.parametrize("disturb", ["release", "fault"])
def test_a_finished_turn_gets_no_item_after_its_last(loop_on: MakeLoop, disturb: str) -> None:
    """Released, or given up, while its rows wait for room in the persister's queue."""
    loop = loop_on()
    gate = threading.Event()
    loop.memory.persister._max_jobs = 0
    loop.memory.persister.submit(lambda: gate.wait(WAIT) and None)
    stream = start(loop, [user("one")])
    assert isinstance(stream.result().last, TurnFinished)
    if disturb == "release":
        loop.call(lambda: loop.handoff.release(agent_id())).result(WAIT)
    else:
        loop.call(lambda: loop._ends.give_up(EngineFault("broken"))).result(WAIT)
    loop.memory.persister._max_jobs = 64
    gate.set()
    assert isinstance(run(loop, [user("two")], session="x").last, TurnFinished)
    assert not stream.violations
    all_free(loop)


def test_a_turn_that_drains_while_its_agent_is_frozen_is_committed_before(
    loop_on: MakeLoop,
) -> None:
    """The future of a freeze is done when the card is there, with all of the last turn."""
    loop = loop_on()
    gate = threading.Event()
    loop.memory.persister._max_jobs = 0
    loop.memory.persister.submit(lambda: gate.wait(WAIT) and None)
    messages: Messages = []
    answer = talk(loop, messages, LONG)
    _, frozen = loop.call(lambda: loop.handoff.freeze(agent_id())).result(WAIT)
    loop.memory.persister._max_jobs = 64
    gate.set()
    frozen.result(WAIT)
    other = loop_on(node="n1")
    memory = other.memory.open(agent_id())
    assert memory.branches[0].tokens == answer.prompt + answer.ids
    assert memory.branches[0].rows == len(answer.prompt) + len(answer.ids) - 1
    settle(loop)
    assert not loop.memory.faults
    loop.call(lambda: loop.handoff.release(agent_id())).result(WAIT)
    all_free(loop)


# ---- zombies


def test_a_zombie_commits_nothing_that_is_read(loop_on: MakeLoop) -> None:
    zombie = loop_on(FakeEngine(4, step_delay=0.001))
    messages: Messages = []
    talk(zombie, messages, LONG)
    settle(zombie)
    stream = start(zombie, [*messages, user("And the ships?")], n=2500)
    stream.take(10)
    heir = loop_on(node="n1")
    mine = run(heir, [*messages, user("Something else.")])
    assert mine.prefilled < 30
    settle(heir)
    stopped = stream.result()
    assert isinstance(stopped.last, TurnMoved)
    assert len(stopped.ids) < 2500
    settle(zombie)
    assert zombie.memory.faults["fenced"] >= 1
    third = loop_on(node="n2")
    memory = third.memory.open(agent_id())
    tokens = [b.tokens for b in memory.branches]
    assert mine.prompt + mine.ids in tokens
    assert all(stopped.ids[:200] != t[-len(stopped.ids) :][:200] for t in tokens)
    assert isinstance(run(zombie, [*messages, user("Awake?")]).last, TurnFinished)
    all_free(zombie)


def test_a_zombie_notices_at_its_next_turn(loop_on: MakeLoop) -> None:
    zombie, messages = loop_on(), []
    talk(zombie, messages, LONG)
    settle(zombie)
    heir = loop_on(node="n1")
    talk(heir, messages, "And the ships?")
    settle(heir)
    last = talk(zombie, messages, "And the gulls?")  # it claims the agent back, with what is new
    assert last.prefilled <= len("And the gulls?") + 5
    assert last.ids == direct(last.prompt, 20)
    assert not zombie.memory.faults


# ---- many random turns


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_random_turns_lose_nothing(loop_on: MakeLoop, seed: int) -> None:
    """Agents, branches, cancels, evictions, restarts; every finished text is a fresh engine's."""
    rng = random.Random(seed)
    loop = loop_on(FakeEngine(2, n_ctx=1500, n_cells=2500))
    reference = loop_on(FakeEngine(2, n_ctx=1500))  # remembers nothing: no turn persists
    talks: dict[str, list[Messages]] = {f"s{i}": [[]] for i in range(4)}
    checked = 0
    for number in range(34):
        batch = []
        for session in rng.sample(sorted(talks), rng.randrange(1, 4)):
            lines = talks[session]
            messages = list(rng.choice(lines))
            if messages and rng.random() < 0.2:
                del messages[rng.randrange(0, len(messages), 2) :]
            messages.append(user(f"{number} {LONG[: rng.randrange(200)]}"))
            options = {"temperature": rng.choice([0.0, 1.0]), "seed": number, "n": 30}
            stop = (rng.choice("abcdef") + rng.choice("xyz"),) if rng.random() < 0.3 else ()
            turn_id = f"{session}.{number}"
            stream = start(loop, messages, session=session, turn_id=turn_id, stop=stop, **options)
            if rng.random() < 0.2:
                loop.cancel(turn_id)
            batch.append((session, messages, stream, options, stop))
        for session, messages, stream, options, stop in batch:
            answer = stream.result()
            assert isinstance(answer.last, TurnFinished)
            if answer.started and answer.reason != "cancelled":
                checked += 1
                alone = run(reference, messages, session="x", persist=False, stop=stop,
                            **options)  # fmt: skip
                if alone.prompt == answer.prompt:
                    assert (answer.ids, answer.text) == (alone.ids, alone.text)
            if len(answer.prompt if answer.started else []) < 1200:
                talks[session].append([*messages, assistant(answer.text)])
        action = rng.random()
        if action < 0.2:
            evict(loop, pool=True)
        elif action < 0.3:
            settle(loop)
            loop.close()
            loop = loop_on(FakeEngine(2, n_ctx=1500, n_cells=2500))
    assert checked > 20
    assert not loop.memory.faults
    all_free(loop)


def test_logits_are_copied_where_they_are_kept(loop_on: MakeLoop) -> None:
    """An engine may reuse its logits: valid until the next step."""

    class Reusing(FakeEngine):
        def step(self, chunks: Any) -> dict[int, Logits]:
            for old in getattr(self, "last", {}).values():
                old[:] = np.nan
            self.last = {k: v.copy() for k, v in super().step(chunks).items()}
            return self.last

    loop = loop_on(Reusing(4))
    streams = [start(loop, [user(f"{i} {LONG}")], session=f"s{i}") for i in range(4)]
    for stream in streams:
        answer = stream.result()
        assert answer.ids == direct(answer.prompt, 20)
