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
from typing import TypeVar

from actors.engines.base import Chunk, Engine
from actors.errors import ActorError, AgentMoved, EngineFault
from actors.memory import AgentMemory, Memory
from actors.prepare import Prepared, Preparer
from actors.prompt import ChatTemplate
from actors.rates import Rates
from actors.residency import Residency
from actors.scheduler import Scheduled, Scheduler, SchedulerConfig
from actors.sequence import Sequence, TextStream, sample, visible_ids
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
from storage.card import AgentId, OpenTurn, Reply
from storage.codec import decode_rows
from storage.errors import Fenced, StorageError
from storage.spec import KVRows

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class LoopConfig:
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    default_max_tokens: int = 1024
    freeze_timeout_s: float = 15.0  # a frozen agent then claims itself back
    restore_timeout_s: float = 60.0


@dataclass(eq=False)
class Turn:
    """One submitted turn on its way through the loop."""

    request: TurnRequest
    sink: Callable[[StreamItem], None]
    began: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    prepared: Future[Prepared] | None = None
    sequence: Sequence | None = None
    restore: _Restore | None = None
    last_item: float = field(default_factory=time.monotonic)

    def emit(self, item: StreamItem) -> None:
        self.last_item = time.monotonic()
        try:
            self.sink(item)
        except Exception:  # nobody listens any more; the others' turns go on
            logger.exception("the sink of turn %s failed", self.request.id)

    @property
    def ready(self) -> Prepared:
        """Only for a turn that has been placed."""
        assert self.prepared is not None
        return self.prepared.result(timeout=0)


@dataclass(eq=False)
class _Restore:
    """Rows on their way from pool or store into an empty sequence."""

    seq_id: int
    rows: queue.Queue[tuple[KVRows, bool] | None]
    began: float = field(default_factory=time.monotonic)
    loaded: int = 0
    from_store: bool = False
    abandoned: bool = False


class ReplicaLoop:
    """See the module docstring. All public methods may be called from any thread."""

    def __init__(self, engine: Engine, memory: Memory, config: LoopConfig, node: str) -> None:
        self.engine, self.memory, self.node = engine, memory, node
        self.rates = Rates()
        self.scheduler: Scheduler[Turn] = Scheduler(config.scheduler)
        self.residency = Residency(engine)
        self.served = {"turns": 0, "prompt_tokens": 0, "cached_tokens": 0, "reply_tokens": 0}
        self._config = config
        template = ChatTemplate(engine.vocab)
        self._prepare = Preparer(engine, memory, template, config.default_max_tokens)
        self._workers = ThreadPoolExecutor(4, "prepare")
        self._active: dict[AgentId, Turn] = {}  # the one turn of an agent that is under way
        self._restoring: list[Turn] = []
        self._draining: list[Turn] = []
        self._by_sequence: dict[int, Turn] = {}  # id(sequence) -> turn
        self._frozen: dict[AgentId, float] = {}  # agent -> deadline
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
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
        """Run a function on the loop's thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        self._wake.set()
        return future

    def close(self, timeout: float = 30.0) -> None:
        """Stop stepping, store what is queued, free the engine."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout)
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.memory.persister.close(timeout)
        self.engine.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def queue_seconds(self) -> float:
        """Estimate of the time until a new turn could begin."""
        missing = sum(len(s.tokens) - s.n_rows for s in self.scheduler.running if s.is_prefill)
        full = len(self.scheduler.running) >= self.engine.n_seq_max
        turns = len(self.scheduler.waiting) + full
        return missing / self.rates.prefill_tokens_per_s + turns * self.rates.turn_s

    # ---- migration, called through `call`

    def freeze(self, agent: AgentId) -> Future[None]:
        """Stop the agent at this token boundary; the future is done when its card is committed.

        Raises AgentMoved when the agent is not owned here.
        """
        memory = self.memory.get(agent)
        if memory is None or memory.state != "owned":
            raise AgentMoved(f"agent {agent} is not owned here")
        memory.state = "frozen"
        self._frozen[agent] = time.monotonic() + self._config.freeze_timeout_s
        turn = self._active.get(agent)
        if turn is not None and turn.sequence is not None:
            turn.sequence.paused = True
            self._export(turn, turn.sequence.n_rows, wait=False)
        self.memory.commit_later(memory)
        return self.memory.persister.flush()

    def release(self, agent: AgentId) -> None:
        """Another replica owns the agent now: its turns move, its cells are freed."""
        self._frozen.pop(agent, None)
        memory = self.memory.get(agent)
        turns = [t for t in self.scheduler.waiting if t.request.agent == agent]
        if (active := self._active.get(agent)) is not None and active not in turns:
            turns.append(active)
        for turn in turns:
            if turn in self.scheduler.waiting:
                self.scheduler.waiting.remove(turn)
            self._end(turn, TurnMoved(turn.request.attempt))
        if memory is not None:
            for branch in memory.branches:
                self.residency.drop(branch)
            self.memory.forget(memory)

    def thaw(self, agent: AgentId) -> None:
        """The migration failed: claim the agent back and go on, or release it."""
        memory = self.memory.get(agent)
        if memory is not None and memory.state == "frozen":
            self._frozen[agent] = time.monotonic() + self._config.freeze_timeout_s
            self.memory.persister.submit(lambda: self._reclaim(memory))

    def _reclaim(self, memory: AgentMemory) -> None:
        """On the persister's thread: no commit of the epoch before may be under way."""
        if memory.state != "frozen":
            return
        try:
            self.memory.reclaim(memory)
        except Fenced:
            self.call(lambda: self.release(memory.agent))
        except StorageError as error:  # nobody owns it: stay frozen, try again at the deadline
            logger.warning("cannot claim frozen agent %s back: %s", memory.agent, error)
        else:
            self.call(lambda: self._unpause(memory))

    def _unpause(self, memory: AgentMemory) -> None:
        self._frozen.pop(memory.agent, None)
        turn = self._active.get(memory.agent)
        if turn is not None and turn.sequence is not None:
            turn.sequence.paused = False

    def drop(self, agent: AgentId) -> None:
        """Free what a deleted agent holds here. Raises AgentMoved while a turn of it runs."""
        if agent in self._active:
            raise AgentMoved(f"agent {agent} has a turn under way")
        memory = self.memory.get(agent)
        if memory is not None:
            for branch in memory.branches:
                self.residency.drop(branch)

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

    def _round(self) -> bool:
        """One round; False when there was nothing to do."""
        while not self._calls.empty():
            self._calls.get()()
        self._tend()
        placed = self._place_waiting()
        loaded = self._load_restored()
        stepped = self._step()
        drained = self._drain()
        return placed or loaded or stepped or drained

    def _tend(self) -> None:
        """Signs of life for turns that wait, and frozen agents whose migration never came back."""
        now = time.monotonic()
        for turn in [*self.scheduler.waiting, *self._restoring]:
            if now - turn.last_item > 1:
                turn.emit(Progress(turn.request.attempt, 0, 0))
        for turn in list(self._by_sequence.values()):
            if turn.ready.memory.state == "released":  # fenced: another replica owns the agent
                self._end(turn, TurnMoved(turn.request.attempt))
        for agent, deadline in list(self._frozen.items()):
            if now > deadline:
                self.thaw(agent)

    def _place_waiting(self) -> bool:
        placed = False
        for turn in list(self.scheduler.waiting):
            agent = turn.request.agent
            if self._active.get(agent, turn) is not turn:
                continue  # turns of one agent queue
            if turn.cancelled:
                self.scheduler.waiting.remove(turn)
                self._end(turn, TurnFinished(turn.request.attempt, 0, "", "cancelled"))
            elif turn.prepared is None:
                self._active[agent] = turn
                turn.prepared = self._workers.submit(self._prepare, turn.request)
                turn.prepared.add_done_callback(lambda _: self._wake.set())
            elif turn.prepared.done():
                error = turn.prepared.exception()
                if error is not None:
                    self.scheduler.waiting.remove(turn)
                    self._refuse(turn, error)
                elif self._place(turn, turn.ready):
                    self.scheduler.waiting.remove(turn)
                    placed = True
        return placed

    def _refuse(self, turn: Turn, error: BaseException) -> None:
        attempt = turn.request.attempt
        if isinstance(error, (AgentMoved, Fenced)):
            self._end(turn, TurnMoved(attempt))
        elif isinstance(error, (ActorError, StorageError)):
            self._end(turn, TurnFailed(attempt, error))
        else:
            logger.error("preparing a turn failed", exc_info=error)
            self._end(turn, TurnFailed(attempt, EngineFault(f"preparing failed: {error!r}")))

    def _place(self, turn: Turn, ready: Prepared) -> bool:
        """Give the turn a sequence, with the rows its agent has; False when there is no room."""
        if ready.memory.state != "owned":
            self._refuse(turn, AgentMoved(f"agent {turn.request.agent} was migrated"))
            return True
        match, engine = ready.match, self.engine
        cells = min(engine.n_ctx, ready.n_prompt + ready.max_tokens)
        keep = min(match.keep, len(ready.tokens) - 1)  # the last token is always computed
        held = self.residency.find(match.source or match.branch)
        if held is not None and match.source is None:
            seq_id: int | None = held
            if not self.residency.resume(held, cells):
                return False
            engine.truncate(held, min(keep, engine.n_rows(held)))
        else:
            seq_id = self.residency.acquire(match.branch, cells, keep=held)
            if seq_id is not None and held is not None:
                engine.fork(held, seq_id, min(keep, engine.n_rows(held)))
            elif seq_id is None and held is not None:  # no second place: the source must leave
                held, seq_id = None, self.residency.acquire(match.branch, cells)
        if seq_id is None:
            return False
        if match.dropped is not None:
            self.residency.drop(match.dropped)
        open_turn = OpenTurn(turn.request.id, ready.n_prompt)
        self.memory.enter(ready.memory, match, open_turn, ready.tokens)
        if held is None and match.branch.exported and keep:
            self._begin_restore(turn, seq_id, keep)
        else:
            self._begin(turn, seq_id, "hot" if engine.n_rows(seq_id) else "cold")
        return True

    # ---- restore

    def _begin_restore(self, turn: Turn, seq_id: int, keep: int) -> None:
        restore = turn.restore = _Restore(seq_id, queue.Queue(maxsize=2))
        self._restoring.append(turn)
        self._workers.submit(self._read_rows, turn.ready, restore, keep)

    def _read_rows(self, ready: Prepared, restore: _Restore, keep: int) -> None:
        """Worker: fetch, verify and decode block by block, at most two ahead of the engine."""
        timeout = self._config.restore_timeout_s
        memory, spec = self.memory, self.memory.key.spec
        try:
            memory.persister.flush().result(timeout)
            for tensors, in_ram in memory.read_rows(ready.memory, ready.match.branch, keep):
                if not self._offer(restore, (decode_rows(spec, memory.codec, tensors), in_ram)):
                    return
        except Exception:
            logger.exception("restoring %s failed; the rest is prefilled", ready.memory.agent)
        self._offer(restore, None)

    def _offer(self, restore: _Restore, item: tuple[KVRows, bool] | None) -> bool:
        """Worker: hand an item to the loop; False when nobody will take it."""
        while self.alive and not restore.abandoned:
            try:
                restore.rows.put(item, timeout=0.1)
            except queue.Full:
                continue
            self._wake.set()
            return True
        return False

    def _load_restored(self) -> bool:
        loaded = False
        for turn in list(self._restoring):
            restore = turn.restore
            assert restore is not None
            try:
                item = restore.rows.get_nowait()
            except queue.Empty:
                continue
            loaded = True
            if item is not None and not turn.cancelled:
                rows, in_ram = item
                try:
                    self.engine.load(restore.seq_id, restore.loaded, rows)
                    restore.loaded += rows[0].k.shape[1]
                    restore.from_store |= not in_ram
                    continue
                except EngineFault as error:
                    logger.warning("the engine refused restored rows: %s", error)
                    self.memory.faults["engine_refused"] += 1
                    self.engine.truncate(restore.seq_id, restore.loaded)
            restore.abandoned = True
            self._restoring.remove(turn)
            self._begin(turn, restore.seq_id, self._cache_state(turn, restore))
        return loaded

    def _cache_state(self, turn: Turn, restore: _Restore) -> CacheState:
        if not restore.loaded:
            return "cold"
        self.rates.restore(restore.loaded, time.monotonic() - restore.began)
        return turn.ready.memory.origin if restore.from_store else "hot"

    # ---- running

    def _begin(self, turn: Turn, seq_id: int, cache: CacheState) -> None:
        ready, request = turn.ready, turn.request
        n_rows = self.engine.n_rows(seq_id)
        text = TextStream(self.engine.vocab, request.sampling.stop)
        for token in ready.tokens[ready.n_prompt :]:
            text.push(token)
        sequence = Sequence(
            request.id, ready.tokens, ready.n_prompt, request.sampling, ready.max_tokens,
            text, seq_id, n_rows, paused=ready.memory.state != "owned",
        )  # fmt: skip
        turn.sequence = sequence
        self.scheduler.running.append(sequence)
        self._by_sequence[id(sequence)] = turn
        self.served["prompt_tokens"] += ready.n_prompt
        self.served["cached_tokens"] += min(n_rows, ready.n_prompt)
        prompt = tuple(ready.tokens[: ready.n_prompt])
        cached = min(n_rows, ready.n_prompt)
        turn.emit(TurnStarted(request.attempt, prompt, cached, cache, self.node))
        if turn.cancelled:
            sequence.finish_reason = "cancelled"
        elif text.stopped:
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
            turn = self._by_sequence[id(sequence)]
            sequence.n_rows += entry.n_tokens
            if sequence.n_rows < len(sequence.tokens):
                done, total = sequence.n_rows, len(sequence.tokens)
                turn.emit(Progress(turn.request.attempt, done, total))
            else:
                position = len(sequence.tokens)
                token = sample(logits[sequence.seq_id], sequence.params, position)
                self._accept(turn, sequence, token)
            self._export_filled(turn, sequence)
        return True

    def _measure(self, scheduled: list[Scheduled], seconds: float) -> None:
        prefilled = sum(s.n_tokens for s in scheduled if s.n_tokens > 1)
        if prefilled:
            self.rates.prefill(prefilled, seconds)
        else:
            self.rates.decode(seconds)

    def _accept(self, turn: Turn, sequence: Sequence, token: int) -> None:
        index = len(sequence.reply)
        text = sequence.accept(token, self.engine.vocab.eog)
        ids, sequence.new_ids = tuple(sequence.new_ids), []
        if ids:
            turn.emit(Tokens(turn.request.attempt, index, ids, text))
            text = ""
        if sequence.finish_reason:
            self._finish(turn, sequence, text)

    def _finish(self, turn: Turn, sequence: Sequence, text: str) -> None:
        """Answer first; then the branch keeps what was visible, and its rows are handed over."""
        ready, reply = turn.ready, sequence.reply
        assert sequence.finish_reason is not None
        turn.emit(TurnFinished(turn.request.attempt, len(reply), text, sequence.finish_reason))
        self.served["turns"] += 1
        self.served["reply_tokens"] += len(reply)
        self.rates.turn(time.monotonic() - turn.began)
        n, tail = len(reply), ""
        if sequence.text.stopped:
            n, tail = visible_ids(self.engine.vocab, reply, sequence.text.text)
        del sequence.tokens[sequence.n_prompt + n :]
        sequence.n_rows = min(sequence.n_rows, len(sequence.tokens))
        self.engine.truncate(sequence.seq_id, sequence.n_rows)
        branch = ready.match.branch
        if branch.exported > len(sequence.tokens):
            self.memory.cut(ready.memory, branch, len(sequence.tokens))
        branch.replies.append(Reply(sequence.n_prompt, len(sequence.tokens), tail))
        branch.turn, branch.last_used = None, time.time()
        self.scheduler.running.remove(sequence)
        self._draining.append(turn)

    # ---- rows to the persister

    def _export_filled(self, turn: Turn, sequence: Sequence) -> None:
        """Persist whole blocks while the turn still runs."""
        if turn.ready.memory.card is None or sequence.finish_reason:
            return
        size = self.memory.key.spec.block_tokens
        filled = sequence.n_rows // size * size
        if filled > turn.ready.match.branch.exported and self._export(turn, filled, wait=True):
            self.memory.commit_later(turn.ready.memory)

    def _export(self, turn: Turn, stop: int, *, wait: bool) -> bool:
        """Hand rows up to `stop` over, at most a block at a time; False if the queue is full
        (with `wait`) and some are left."""
        branch, sequence = turn.ready.match.branch, turn.sequence
        assert sequence is not None
        size = self.memory.key.spec.block_tokens
        while branch.exported < stop:
            if wait and not self.memory.persister.has_room:
                return False
            start = branch.exported
            end = min(stop, (start // size + 1) * size)
            rows = self.engine.export(sequence.seq_id, start, end)
            self.memory.append(turn.ready.memory, branch, start, rows)
        return True

    def _drain(self) -> bool:
        drained = False
        for turn in list(self._draining):
            memory, sequence = turn.ready.memory, turn.sequence
            assert sequence is not None
            if memory.card is None or memory.state == "released":
                self.residency.free(sequence.seq_id)
            elif self._export(turn, sequence.n_rows, wait=True):
                if memory.state == "owned":  # a frozen agent's card is written, maybe claimed
                    self.memory.commit_later(memory)
                self.residency.park(sequence.seq_id)
            else:
                continue
            self._forget_turn(turn)
            drained = True
        return drained

    # ---- ends

    def _cancel(self, turn_id: str) -> None:
        for turn in [*self.scheduler.waiting, *self._restoring, *self._by_sequence.values()]:
            if turn.request.id == turn_id:
                turn.cancelled = True
                sequence = turn.sequence
                if sequence is not None and sequence in self.scheduler.running:
                    sequence.finish_reason = "cancelled"
                    self._finish(turn, sequence, sequence.text.finish())

    def _end(self, turn: Turn, item: StreamItem) -> None:
        """The turn leaves without finishing: its sequence is freed, the agent's memory is not. One
        that has finished, and only drains, has sent its last item."""
        drains = turn in self._draining
        seq_id = turn.sequence.seq_id if turn.sequence else None
        if turn.restore is not None and turn in self._restoring:
            turn.restore.abandoned = True
            seq_id = turn.restore.seq_id
        if seq_id is not None:
            self.residency.free(seq_id)
        self._forget_turn(turn)
        if not drains:
            turn.emit(item)

    def _forget_turn(self, turn: Turn) -> None:
        if self._active.get(turn.request.agent) is turn:
            del self._active[turn.request.agent]
        if turn.sequence is not None:
            self._by_sequence.pop(id(turn.sequence), None)
            if turn.sequence in self.scheduler.running:
                self.scheduler.running.remove(turn.sequence)
        for turns in (self._restoring, self._draining):
            if turn in turns:
                turns.remove(turn)

    def _give_up(self, error: EngineFault) -> None:
        """The engine broke: fail what runs and empty it; the agents' encoded rows are safe."""
        for turn in [*self._restoring, *self._by_sequence.values()]:
            branch = turn.ready.match.branch
            self._end(turn, TurnFailed(turn.request.attempt, error))
            branch.turn = None
        self.residency.evict_idle()


def _chunk(scheduled: Scheduled) -> Chunk:
    sequence, n = scheduled.sequence, scheduled.n_tokens
    start = sequence.n_rows
    tokens = sequence.tokens[start : start + n]
    return Chunk(sequence.seq_id, tokens, start, start + n == len(sequence.tokens))
