"""How turns end: finished, cancelled, overdue, moved or failed. Runs on the loop's thread.

A turn's response ends before its rows are handed over; what was visible to the client is what the
agent remembers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from actors.book import Book, Turn
from actors.engines.base import Engine
from actors.errors import EngineFault, TurnTimeout
from actors.exporter import Exporter
from actors.memory import Memory
from actors.rates import Rates
from actors.residency import Residency
from actors.scheduler import Scheduler
from actors.sequence import Sequence, visible_ids
from actors.turn import StreamItem, TurnFailed, TurnFinished, TurnMoved
from storage.card import AgentId, Reply


class Ends:
    """`call` runs a function on the loop's thread; a turn may take `limit_s`; with `sync`, its last
    item waits until its memory is stored."""

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        residency: Residency,
        scheduler: Scheduler[Turn],
        book: Book,
        exporter: Exporter,
        rates: Rates,
        call: Callable[[Callable[[], None]], Any],
        limit_s: float,
        *,
        sync: bool,
    ) -> None:
        self._engine, self._memory, self._residency = engine, memory, residency
        self._scheduler, self._book, self._exporter = scheduler, book, exporter
        self._rates, self._call = rates, call
        self._limit_s, self._sync = limit_s, sync
        self.ending: list[Turn] = []  # answered, but for the word that all is stored
        self.turns = self.reply_tokens = 0  # finished

    def finish(self, turn: Turn, sequence: Sequence, text: str) -> None:
        """Answer first; then the branch keeps what was visible, and its rows are handed over."""
        ready, reply = turn.ready, sequence.reply
        assert sequence.finish_reason is not None
        last = TurnFinished(turn.request.attempt, len(reply), text, sequence.finish_reason)
        if turn.failure is not None:
            turn.emit(TurnFailed(turn.request.attempt, turn.failure))
        elif self._sync and ready.memory.card is not None:
            turn.last = last
        else:
            turn.emit(last)
        self.turns += 1
        self.reply_tokens += len(reply)
        self._rates.turn(time.monotonic() - turn.began)
        n, tail = len(reply), ""
        if sequence.text.stopped:
            n, tail = visible_ids(self._engine.vocab, reply, sequence.text.text)
        del sequence.tokens[sequence.n_prompt + n :]
        sequence.n_rows = min(sequence.n_rows, len(sequence.tokens))
        if not turn.preempted and self._engine.can_truncate(sequence.seq_id, sequence.n_rows):
            self._residency.truncate(sequence.seq_id, sequence.n_rows)
        branch = ready.match.branch
        if branch.exported > len(sequence.tokens):
            self._memory.rows.cut(ready.memory, branch, len(sequence.tokens))
        branch.replies.append(Reply(sequence.n_prompt, len(sequence.tokens), tail))
        branch.turn, branch.last_used = None, time.time()
        if sequence in self._scheduler.running:
            self._scheduler.running.remove(sequence)
        self._book.draining.append(turn)

    def drain(self) -> bool:
        """Hand over what finished turns have left; whether any is through."""
        drained = [turn for turn in self._book.draining if self._exporter.drain(turn)]
        for turn in drained:
            self._book.forget(turn)
            if turn.last is not None:
                self.ending.append(turn)
                self._memory.commits.settle(turn.ready.memory).add_done_callback(
                    partial(self._settled, turn)
                )
        return bool(drained)

    def _settled(self, turn: Turn, _: Future[None]) -> None:
        self._call(lambda: self.stored(turn))

    def stored(self, turn: Turn) -> None:
        """The turn waited for its memory to be stored (`sync`); a fault was counted and logged."""
        assert turn.last is not None
        self.ending.remove(turn)
        turn.emit(turn.last)

    def cancel(self, turn_id: str, attempt: int | None) -> None:
        """`attempt` None: every one. A later one may be here already when an earlier one ends."""
        for turn in [*self._scheduler.waiting, *self._book.in_engine()]:
            request = turn.request
            if request.id == turn_id and attempt in (None, request.attempt):
                self.stop(turn)

    def tend(self) -> None:
        """An end for turns that took too long, and for those whose agent is another replica's. Of a
        turn that took too long, the agent remembers what was said."""
        now, book = time.monotonic(), self._book
        for turn in list(book.by_sequence.values()):
            if turn.ready.memory.state == "released":
                self.end(turn, TurnMoved(turn.request.attempt))
        for turn in [*self._scheduler.waiting, *book.in_engine()]:
            late = now - turn.began > self._limit_s
            if late and not turn.cancelled and turn not in book.draining:
                turn.failure = TurnTimeout(f"the turn took longer than {self._limit_s:g} s")
                self.stop(turn)

    def stop(self, turn: Turn) -> None:
        """End it now if it has begun, else where it is placed, or at the next look at restores. Of
        one that waits, the preparation is not begun any more."""
        turn.cancelled = True
        self._scheduler.waiting.changes += 1
        if turn.prepared is not None:
            turn.prepared.cancel()
        sequence = turn.sequence
        if sequence is None or turn in self._book.restoring or turn in self._book.draining:
            return
        if turn in self._scheduler.waiting:
            self._scheduler.waiting.remove(turn)
        sequence.finish_reason = "cancelled"
        self.finish(turn, sequence, sequence.text.finish())

    def end(self, turn: Turn, item: StreamItem) -> None:
        """The turn leaves without finishing: its sequence is freed, the agent's memory is not. One
        that has finished, and only drains, has its own last item."""
        drains = turn in self._book.draining
        sequence = turn.sequence
        seq_id = sequence.seq_id if sequence and not turn.preempted else None
        if turn.restore is not None and turn in self._book.restoring:
            turn.restore.abandoned = True
            seq_id = turn.restore.seq_id
        if seq_id is not None:
            self._residency.free(seq_id)
        if turn in self._scheduler.waiting:
            self._scheduler.waiting.remove(turn)
        if sequence in self._scheduler.running:
            self._scheduler.running.remove(sequence)
        self._book.forget(turn)
        if not drains:
            turn.emit(item)
        elif turn.last is not None:
            turn.emit(turn.last)

    def move(self, agent: AgentId) -> None:
        """End every turn of an agent here; its owner is another replica."""
        turns = [*self._scheduler.waiting, *self._book.active.values()]
        for turn in dict.fromkeys(t for t in turns if t.request.agent == agent):
            self.end(turn, TurnMoved(turn.request.attempt))

    def give_up(self, error: EngineFault) -> None:
        """The engine broke: fail what runs and empty it; the agents' encoded rows are safe."""
        for turn in self._book.in_engine():
            self.end(turn, TurnFailed(turn.request.attempt, error))
        self._residency.free_all()

    def close(self) -> None:
        """The loop ends, and every turn with it."""
        for turn in [*self._scheduler.waiting, *self._book.in_engine()]:
            self.end(turn, TurnFailed(turn.request.attempt, EngineFault("the replica stops")))
        for turn in list(self.ending):
            self.stored(turn)
