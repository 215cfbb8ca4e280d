"""The replica's loop: the one thread that owns the engine.

    submit ─> waiting ─prepare (worker)─> placed ─restore (worker reads, loop loads)─> running
                 ^─────────────────────── no cells left ──────────────────────────────────┤
                                                           idle <─ draining <─finished ───┘

Every round: run calls from outside, place turns, load restored rows, one engine step, hand filled
blocks to the persister. Knows no Ray; the items of a turn go to its `sink`, which must not block.
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
from actors.cells import Cells
from actors.ends import Ends
from actors.engines.base import Engine
from actors.errors import AgentMoved, EngineFault
from actors.exporter import Exporter
from actors.futures import fulfil
from actors.handoff import Handoff
from actors.memory import Memory
from actors.preload import Preloader
from actors.prepare import Preparer
from actors.prompt import ChatTemplate
from actors.rates import Overhead, Rates
from actors.residency import Residency
from actors.restorer import Restorer
from actors.scheduler import Scheduler, SchedulerConfig
from actors.sequence import Sequence, TextStream
from actors.speculation import SpeculationConfig, Speculator
from actors.stepper import Stepper
from actors.turn import CacheState, StreamItem, TurnRequest, TurnStarted
from storage.card import AgentId

logger = logging.getLogger(__name__)
T = TypeVar("T")
_TEND_S = 0.02  # between two looks for deadlines


@dataclass(frozen=True)
class LoopConfig:
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    default_max_tokens: int = 1024
    freeze_timeout_s: float = 5.0  # a frozen agent then claims itself back
    preload_timeout_s: float = 30.0  # until a preloaded agent is claimed; then it is dropped
    restore_timeout_s: float = 60.0
    step_timeout_s: float = 120.0  # a round of the loop; then it is stuck
    turn_timeout_s: float = 600.0  # a turn here, waiting included; then it fails
    sync: bool = False  # a turn ends when its memory is in the store
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)


class ReplicaLoop:
    """See the module docstring. All public methods may be called from any thread."""

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        config: LoopConfig,
        node: str,
        draft: Engine | None = None,
    ) -> None:
        """`draft`: the engine of a draft model, which the loop owns, too. Long, because it wires
        all the parts."""
        self.engine, self.memory, self.node = engine, memory, node
        self.rates = Rates()
        self.scheduler: Scheduler[Turn] = Scheduler(config.scheduler, self.rates, tile=engine.tile)
        self.residency = Residency(engine)
        self.overhead = Overhead()
        self._prompts = {"prompt_tokens": 0, "cached_tokens": 0}
        self._tended, self._looked = 0.0, time.monotonic()
        self._step_timeout_s = config.step_timeout_s
        self._book = Book()
        self._preparers = ThreadPoolExecutor(4, "prepare")
        self._readers = ThreadPoolExecutor(4, "restore")  # slow ones keep nobody from preparing
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        template = ChatTemplate(engine.vocab)
        prepare = Preparer(engine, memory, template, config.default_max_tokens)
        self.warm = prepare.warm
        self._exporter = Exporter(engine, memory, self.residency, self.rates)
        self._restorer = Restorer(
            engine, memory, self.residency, self._book, self.rates, self._readers,
            self._wake.set, self._thread.is_alive, config.restore_timeout_s,
        )  # fmt: skip
        self.cells = Cells(engine, self.residency, self.scheduler, self._book, self._exporter)
        self._ends = Ends(
            engine, memory, self.residency, self.scheduler, self._book, self._exporter, self.rates,
            self.call, config.turn_timeout_s, sync=config.sync,
        )  # fmt: skip
        self.speculator = Speculator(
            config.speculation, engine, self.cells, config.scheduler.max_step_s, draft
        )
        self._stepper = Stepper(
            engine, self.scheduler, self._book, self.cells, self._exporter, self._ends,
            self.speculator, self.overhead,
        )  # fmt: skip
        self._admission = Admission(
            engine, memory, self.residency, self.scheduler, self._book, self.cells,
            self._restorer, prepare, self._preparers, self._wake.set,
        )  # fmt: skip
        self.handoff = Handoff(
            memory, self._book, self.residency, self._exporter, self.rates,
            self._ends.move, self.call, config.freeze_timeout_s,
        )  # fmt: skip
        self.preloader = Preloader(
            engine, memory, self.residency, self._book, self._restorer.loadable, self.call,
            config.preload_timeout_s,
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

    def cancel(self, turn_id: str, attempt: int | None = None) -> None:
        """End a turn at the next token boundary, or only this attempt at it; unknown ids are
        ignored."""
        self.call(lambda: self._ends.cancel(turn_id, attempt))

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the loop's thread, between two steps. The future fails with EngineFault
        when the loop has ended."""
        future: Future[T] = Future()
        self._calls.put(partial(fulfil, future, function))
        self._wake.set()
        if not self.alive and not future.done():
            future.set_exception(EngineFault("the replica's loop has ended"))
        return future

    def close(self, timeout: float = 30.0) -> None:
        """Stop stepping, store what is queued, free the engine."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)
        for workers in (self._preparers, self._readers):
            workers.shutdown(wait=False, cancel_futures=True)
        self.memory.commits.close(timeout)
        if not self.alive:  # else a step hangs: the process's end frees the engine
            self.engine.close()
            self.speculator.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stuck(self) -> bool:
        """Whether the engine does not come back from a step."""
        return time.monotonic() - self._looked > self._step_timeout_s

    @property
    def draining(self) -> int:
        """Finished turns whose rows the engine still has to hand over."""
        return len(self._book.draining)

    @property
    def served(self) -> dict[str, int]:
        """Counts since the start."""
        ends, drafts = self._ends, self.speculator
        return {
            "turns": ends.turns,
            **self._prompts,
            "reply_tokens": ends.reply_tokens,
            "draft_tokens": drafts.drafted,
            "draft_tokens_accepted": drafts.accepted,
        }

    def drop(self, agent: AgentId) -> None:
        """On the loop's thread: free what a deleted agent holds. Raises AgentMoved while a turn of
        it is under way."""
        if agent in self._book.active:
            raise AgentMoved(f"agent {agent} has a turn under way")
        self.handoff.drop(agent)

    def flush(self) -> Future[None]:
        """On the loop's thread: Commits.settle, for what could not be stored before, too."""
        self.memory.commits.again(self._book.active, at_once=True)
        return self.memory.commits.settle()

    # ---- the loop

    def _run(self) -> None:
        while not self._stopping:
            self._looked = time.monotonic()
            try:
                if not self._round():
                    self._wake.wait(timeout=0.25)
                    self._wake.clear()
            except Exception:
                logger.exception("the engine loop failed; its turns are given up")
                self._ends.give_up(EngineFault("the replica's loop failed"))
        # What give_up raises ends this thread: `alive` is then False, and the replica restarts.
        self._ends.close()

    def _round(self) -> bool:
        """One round; False when there was nothing to do."""
        began, in_engine = time.perf_counter(), self.overhead.engine_s
        for _ in range(self._calls.qsize()):  # those that calls make wait for the next round
            self._calls.get()()
        self._tend()
        admitted = self._admit()
        loaded, restored = self._restorer.poll()
        for turn in restored:
            assert turn.restore is not None
            self._begin(turn, turn.restore.seq_id, turn.restore.cache)
        stepped = self._stepper.step()
        drained = self._ends.drain()
        if stepped:
            in_engine = self.overhead.engine_s - in_engine
            self.overhead.outside_s += time.perf_counter() - began - in_engine
        return admitted or loaded or stepped or drained

    def _tend(self) -> None:
        now = time.monotonic()
        if now - self._tended >= _TEND_S:
            self._tended = now
            self._ends.tend()
            self.handoff.thaw_overdue()
            self.preloader.drop_overdue()
            self.memory.commits.again(self._book.active)

    def _admit(self) -> bool:
        admitted = False
        for action in self._admission.poll():
            admitted = True
            if isinstance(action, Begin):
                self._begin(action.turn, action.seq_id, action.cache)
            else:
                if action.broken is not None:
                    self._ends.give_up(action.broken)
                self._ends.end(action.turn, action.item)
        return admitted

    # ---- running

    def _begin(self, turn: Turn, seq_id: int, cache: CacheState) -> None:
        if turn.sequence is not None:
            self._go_on(turn, turn.sequence, seq_id)
            return
        ready, request = turn.ready, turn.request
        n_rows = self.engine.n_rows(seq_id)
        text = TextStream(self.engine.vocab, request.sampling.stop)
        for token in ready.tokens[ready.n_prompt :]:
            text.push(token)
        sequence = Sequence(
            request.id, ready.tokens, ready.n_prompt, request.sampling, ready.max_tokens, text,
            seq_id, n_rows, paused=ready.memory.state != "owned", grammar=ready.grammar,
            priority=request.priority, stops=self._exporter.stops(turn, n_rows), n_loaded=n_rows,
        )  # fmt: skip
        turn.sequence = sequence
        self.scheduler.start(sequence)
        self._book.by_sequence[id(sequence)] = turn
        self._prompts["prompt_tokens"] += ready.n_prompt
        cached = min(n_rows, ready.n_prompt)
        self._prompts["cached_tokens"] += cached
        prompt = tuple(ready.tokens[: ready.n_prompt])
        durable = durable_rows(ready.match.branch)
        started = prompt, cached, cache, self.node, durable, ready.call_format, n_rows
        turn.emit(TurnStarted(request.attempt, *started))
        if turn.cancelled:
            sequence.finish_reason = "cancelled"
        elif sequence.complete:
            sequence.finish_reason = "stop"
        elif len(sequence.reply) >= sequence.max_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason:
            self._ends.finish(turn, sequence, text.finish())

    def _go_on(self, turn: Turn, sequence: Sequence, seq_id: int) -> None:
        """A turn that had left the engine is back, with the rows that came with it."""
        sequence.seq_id = seq_id
        sequence.n_rows = sequence.n_loaded = self.engine.n_rows(seq_id)
        sequence.paused = turn.ready.memory.state != "owned"
        self.scheduler.start(sequence)
        self._book.by_sequence[id(sequence)] = turn
        if turn.cancelled:
            self._ends.stop(turn)
