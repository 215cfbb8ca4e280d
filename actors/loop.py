"""The replica's loop: the one thread that owns the engine.

    submit ─> waiting ─prepare (worker)─> placed ─restore (worker reads, loop loads)─> running
                                                    running ─finished─> draining ─> idle

Every round: run calls from outside, place turns, load restored rows, one engine step, hand filled
blocks to the persister. A turn's response ends before its rows are handed over. Knows no Ray; the
items of a turn go to its `sink`, which must not block.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from actors.admission import Admission, Begin
from actors.book import Book, Turn
from actors.branches import durable_rows
from actors.engines.base import Chunk, Engine, Logits
from actors.errors import AgentMoved, EngineFault, InvalidRequest
from actors.exporter import Exporter
from actors.handoff import Handoff
from actors.memory import Memory
from actors.prepare import Preparer
from actors.prompt import ChatTemplate
from actors.rates import Rates
from actors.residency import Residency
from actors.restorer import Restorer
from actors.scheduler import Scheduled, Scheduler, SchedulerConfig
from actors.sequence import Sequence, TextStream, visible_ids
from actors.turn import (
    CacheState,
    Progress,
    StreamItem,
    Tokens,
    TurnFailed,
    TurnFinished,
    TurnMoved,
    TurnRequest,
    TurnStarted,
)
from storage.card import AgentId, Reply

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class LoopConfig:
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    default_max_tokens: int = 1024
    freeze_timeout_s: float = 15.0  # a frozen agent then claims itself back
    restore_timeout_s: float = 60.0
    sync: bool = False  # a turn ends when its memory is in the store


class ReplicaLoop:
    """See the module docstring. All public methods may be called from any thread."""

    def __init__(self, engine: Engine, memory: Memory, config: LoopConfig, node: str) -> None:
        self.engine, self.memory, self.node = engine, memory, node
        self.rates = Rates()
        self.scheduler: Scheduler[Turn] = Scheduler(config.scheduler)
        self.residency = Residency(engine)
        self.served = {"turns": 0, "prompt_tokens": 0, "cached_tokens": 0, "reply_tokens": 0}
        self._sync = config.sync
        self._book = Book()
        self._ending: list[Turn] = []  # answered, but for the word that all is stored
        self._workers = ThreadPoolExecutor(4, "prepare")
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        template = ChatTemplate(engine.vocab)
        prepare = Preparer(engine, memory, template, config.default_max_tokens)
        self._exporter = Exporter(engine, memory, self.residency)
        self._restorer = Restorer(
            engine, memory, self._book, self.rates, self._workers,
            self._wake.set, self._thread.is_alive, config.restore_timeout_s,
        )  # fmt: skip
        self._admission = Admission(
            engine, memory, self.residency, self.scheduler, self._book,
            self._restorer, prepare, self._workers, self._wake.set,
        )  # fmt: skip
        self.handoff = Handoff(
            memory, self._book, self.residency, self._exporter,
            self._move, self.call, config.freeze_timeout_s,
        )  # fmt: skip
        self._thread.start()

    # ---- from outside

    def submit(self, request: TurnRequest, sink: Callable[[StreamItem], None]) -> None:
        """Queue a turn; its items go to `sink`, the last is finished, moved or failed.

        Raises Overloaded when the queue is full.
        """
        self.scheduler.check_room(self._calls.qsize())
        turn = Turn(request, sink)
        self.call(lambda: self.scheduler.waiting.append(turn))

    def cancel(self, turn_id: str) -> None:
        """End a turn at the next token boundary; unknown ids are ignored."""
        self.call(lambda: self._cancel(turn_id))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the loop's thread, between two steps. The future fails with EngineFault
        when the loop has ended."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        self._wake.set()
        if not self.alive and not future.done():
            future.set_exception(EngineFault("the replica's loop has ended"))
        return future

    def close(self, timeout: float = 30.0) -> None:
        """Stop stepping, store what is queued, free the engine."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.memory.close(timeout)
        if not self.alive:  # else a step hangs: the process's end frees the engine
            self.engine.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def draining(self) -> int:
        """Finished turns whose rows the engine still has to hand over."""
        return len(self._book.draining)

    def queue_seconds(self) -> float:
        """Estimate of the time until a new turn could begin."""
        missing = sum(len(s.tokens) - s.n_rows for s in self.scheduler.running if s.is_prefill)
        full = len(self.scheduler.running) >= self.engine.n_seq_max
        turns = len(self.scheduler.waiting) + full
        rates = self.rates.filled()
        return missing / rates.prefill_tokens_per_s + turns * rates.turn_s

    def drop(self, agent: AgentId) -> None:
        """On the loop's thread: free what a deleted agent holds. Raises AgentMoved while a turn of
        it is under way."""
        if agent in self._book.active:
            raise AgentMoved(f"agent {agent} has a turn under way")
        self.handoff.drop(agent)

    # ---- the loop

    def _run(self) -> None:
        while not self._stopping:
            try:
                if not self._round():
                    self._wake.wait(timeout=0.25)
                    self._wake.clear()
            except Exception:
                logger.exception("the engine loop failed; its turns are given up")
                self._give_up(EngineFault("the replica's loop failed"))
        # What _give_up raises ends this thread: `alive` is then False, and the replica restarts.
        for turn in [*self.scheduler.waiting, *self._book.in_engine()]:
            self._end(turn, TurnFailed(turn.request.attempt, EngineFault("the replica stops")))
        for turn in list(self._ending):
            self._stored(turn)

    def _round(self) -> bool:
        """One round; False when there was nothing to do."""
        while not self._calls.empty():
            self._calls.get()()
        self._tend()
        admitted = self._admit()
        loaded, restored = self._restorer.poll()
        for turn in restored:
            assert turn.restore is not None
            self._begin(turn, turn.restore.seq_id, turn.restore.cache)
        stepped = self._step()
        drained = self._drain()
        return admitted or loaded or stepped or drained

    def _tend(self) -> None:
        """Signs of life for turns that wait; an end for those whose agent is another replica's."""
        now = time.monotonic()
        waiting = [
            *self.scheduler.waiting, *self._book.restoring, *self.handoff.paused(),
            *(turn for turn in self._book.draining if turn.last), *self._ending,
        ]  # fmt: skip
        for turn in waiting:
            if now - turn.last_item > 1:
                turn.emit(Progress(turn.request.attempt, 0, 0))
        for turn in list(self._book.by_sequence.values()):
            if turn.ready.memory.state == "released":
                self._end(turn, TurnMoved(turn.request.attempt))
        self.handoff.thaw_overdue()

    def _admit(self) -> bool:
        admitted = False
        for action in self._admission.poll():
            admitted = True
            if isinstance(action, Begin):
                self._begin(action.turn, action.seq_id, action.cache)
                continue
            if action.broken is not None:
                self._give_up(action.broken)
            self._end(action.turn, action.item)
        return admitted

    # ---- running

    def _begin(self, turn: Turn, seq_id: int, cache: CacheState) -> None:
        ready, request = turn.ready, turn.request
        n_rows = self.engine.n_rows(seq_id)
        text = TextStream(self.engine.vocab, request.sampling.stop)
        for token in ready.tokens[ready.n_prompt :]:
            text.push(token)
        sequence = Sequence(
            request.id, ready.tokens, ready.n_prompt, request.sampling, ready.max_tokens,
            text, seq_id, n_rows, paused=ready.memory.state != "owned", grammar=ready.grammar,
        )  # fmt: skip
        turn.sequence = sequence
        self.scheduler.running.append(sequence)
        self._book.by_sequence[id(sequence)] = turn
        self.served["prompt_tokens"] += ready.n_prompt
        self.served["cached_tokens"] += min(n_rows, ready.n_prompt)
        prompt = tuple(ready.tokens[: ready.n_prompt])
        cached = min(n_rows, ready.n_prompt)
        durable = durable_rows(ready.match.branch)
        turn.emit(TurnStarted(request.attempt, prompt, cached, cache, self.node, durable))
        if turn.cancelled:
            sequence.finish_reason = "cancelled"
        elif sequence.complete:
            sequence.finish_reason = "stop"
        elif len(sequence.reply) >= sequence.max_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason:
            self._finish(turn, sequence, text.finish())

    def _step(self) -> bool:
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return False
        chunks = [_chunk(s) for s in scheduled]
        began = time.monotonic()
        try:
            logits = self.engine.step(chunks)
        except EngineFault as error:
            logger.error("an engine step failed: %s", error)
            self._give_up(error)
            return True
        self._measure(scheduled, time.monotonic() - began)
        for entry in scheduled:
            sequence = entry.sequence
            turn = self._book.by_sequence[id(sequence)]
            sequence.n_rows += entry.n_tokens
            if sequence.n_rows < len(sequence.tokens):
                done, total = sequence.n_rows, len(sequence.tokens)
                turn.emit(Progress(turn.request.attempt, done, total))
            else:
                self._accept(turn, sequence, logits[sequence.seq_id])
            if id(sequence) in self._book.by_sequence:
                self._exporter.filled(turn)
        return True

    def _measure(self, scheduled: list[Scheduled], seconds: float) -> None:
        prefilled = sum(s.n_tokens for s in scheduled if s.n_tokens > 1)
        if prefilled:
            self.rates.prefill(prefilled, seconds)
        else:
            self.rates.decode(seconds)

    def _accept(self, turn: Turn, sequence: Sequence, logits: Logits) -> None:
        index = len(sequence.reply)
        try:
            text = sequence.take(logits, self.engine.vocab.eog)
        except (InvalidRequest, EngineFault) as error:  # of its grammar: the others go on
            self._end(turn, TurnFailed(turn.request.attempt, error))
            return
        ids, sequence.new_ids = tuple(sequence.new_ids), []
        logprobs, sequence.new_logprobs = tuple(sequence.new_logprobs), []
        if ids:
            turn.emit(Tokens(turn.request.attempt, index, ids, text, logprobs))
            text = ""
        if sequence.finish_reason:
            self._finish(turn, sequence, text)

    def _finish(self, turn: Turn, sequence: Sequence, text: str) -> None:
        """Answer first; then the branch keeps what was visible, and its rows are handed over."""
        ready, reply = turn.ready, sequence.reply
        assert sequence.finish_reason is not None
        last = TurnFinished(turn.request.attempt, len(reply), text, sequence.finish_reason)
        if self._sync and ready.memory.card is not None:
            turn.last = last
        else:
            turn.emit(last)
        self.served["turns"] += 1
        self.served["reply_tokens"] += len(reply)
        self.rates.turn(time.monotonic() - turn.began)
        n, tail = len(reply), ""
        if sequence.text.stopped:
            n, tail = visible_ids(self.engine.vocab, reply, sequence.text.text)
        del sequence.tokens[sequence.n_prompt + n :]
        sequence.n_rows = min(sequence.n_rows, len(sequence.tokens))
        if self.engine.can_truncate(sequence.seq_id, sequence.n_rows):
            self.engine.truncate(sequence.seq_id, sequence.n_rows)
        branch = ready.match.branch
        if branch.exported > len(sequence.tokens):
            self.memory.rows.cut(ready.memory, branch, len(sequence.tokens))
        branch.replies.append(Reply(sequence.n_prompt, len(sequence.tokens), tail))
        branch.turn, branch.last_used = None, time.time()
        self.scheduler.running.remove(sequence)
        self._book.draining.append(turn)

    def _drain(self) -> bool:
        drained = [turn for turn in self._book.draining if self._exporter.drain(turn)]
        for turn in drained:
            self._book.forget(turn)
            if turn.last is not None:
                self._ending.append(turn)
                stored = self.memory.settle(turn.ready.memory)
                stored.add_done_callback(partial(self._call_stored, turn))
        return bool(drained)

    def _call_stored(self, turn: Turn, _: Future[None]) -> None:
        self.call(lambda: self._stored(turn))

    def _stored(self, turn: Turn) -> None:
        """The turn waited for its memory to be stored (`sync`); a fault was counted and logged."""
        assert turn.last is not None
        self._ending.remove(turn)
        turn.emit(turn.last)

    # ---- ends

    def _cancel(self, turn_id: str) -> None:
        for turn in [*self.scheduler.waiting, *self._book.in_engine()]:
            if turn.request.id == turn_id:
                turn.cancelled = True
                sequence = turn.sequence
                if sequence is not None and sequence in self.scheduler.running:
                    sequence.finish_reason = "cancelled"
                    self._finish(turn, sequence, sequence.text.finish())

    def _end(self, turn: Turn, item: StreamItem) -> None:
        """The turn leaves without finishing: its sequence is freed, the agent's memory is not. One
        that has finished, and only drains, has its own last item."""
        drains = turn in self._book.draining
        seq_id = turn.sequence.seq_id if turn.sequence else None
        if turn.restore is not None and turn in self._book.restoring:
            turn.restore.abandoned = True
            seq_id = turn.restore.seq_id
        if seq_id is not None:
            self.residency.free(seq_id)
        if turn in self.scheduler.waiting:
            self.scheduler.waiting.remove(turn)
        if turn.sequence in self.scheduler.running:
            self.scheduler.running.remove(turn.sequence)
        self._book.forget(turn)
        if not drains:
            turn.emit(item)
        elif turn.last is not None:
            turn.emit(turn.last)

    def _move(self, agent: AgentId) -> None:
        """End every turn of an agent here; its owner is another replica."""
        turns = [*self.scheduler.waiting, *self._book.active.values()]
        for turn in dict.fromkeys(t for t in turns if t.request.agent == agent):
            self._end(turn, TurnMoved(turn.request.attempt))

    def _give_up(self, error: EngineFault) -> None:
        """The engine broke: fail what runs and empty it; the agents' encoded rows are safe."""
        for turn in self._book.in_engine():
            self._end(turn, TurnFailed(turn.request.attempt, error))
        self.residency.free_all()


def _chunk(scheduled: Scheduled) -> Chunk:
    sequence, n = scheduled.sequence, scheduled.n_tokens
    start = sequence.n_rows
    tokens = sequence.tokens[start : start + n]
    return Chunk(sequence.seq_id, tokens, start, start + n == len(sequence.tokens))
