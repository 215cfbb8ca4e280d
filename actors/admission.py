"""From waiting to the engine: prepare a turn on a worker, give it a sequence and the rows it has.

Turns of one agent go one after another, in the order they came; which agent is next, the scheduler
says. A turn that had to leave the engine comes back the same way, to where it was. Says what is to
be done with each turn; the loop does it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from actors.book import Book, Turn
from actors.cells import Cells
from actors.engines.base import Engine
from actors.errors import ActorError, AgentMoved, EngineFault
from actors.matching import Match
from actors.memory import Memory
from actors.prepare import Prepared, Preparer
from actors.residency import Residency
from actors.restorer import Restorer
from actors.scheduler import Scheduler
from actors.sharing import Sharing, Source
from actors.turn import CacheState, StreamItem, TurnFailed, TurnMoved
from storage.card import OpenTurn
from storage.errors import Fenced, StorageError

_AGAIN_S = 0.02  # what is not seen to change is noticed then
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begin:
    """The turn's sequence holds all rows it has: it may run."""

    turn: Turn
    seq_id: int
    cache: CacheState


@dataclass(frozen=True)
class End:
    """The turn ends before it ran. `broken`: the engine failed, and with it all that runs."""

    turn: Turn
    item: StreamItem
    broken: EngineFault | None = None


class Admission:
    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        residency: Residency,
        scheduler: Scheduler[Turn],
        book: Book,
        cells: Cells,
        restorer: Restorer,
        prepare: Preparer,
        workers: ThreadPoolExecutor,
        wake: Callable[[], None],
    ) -> None:
        self._engine, self._memory, self._residency = engine, memory, residency
        self._scheduler, self._book, self._cells = scheduler, book, cells
        self._restorer, self._sharing = restorer, Sharing(engine, residency, book)
        self._prepare, self._workers, self._wake = prepare, workers, wake
        self._prepared = 0
        self._seen, self._again = (-1, -1, -1), 0.0

    def poll(self) -> Iterator[Begin | End]:
        """Start to prepare what has arrived, end what cannot run, place the others in order. Looks
        only where something has changed: a queue is long when rounds are short."""
        waiting, now = self._scheduler.waiting, time.monotonic()
        seen = (self._residency.changes, waiting.changes, self._prepared)
        if seen == self._seen and now < self._again:
            return
        self._seen, self._again = seen, now + _AGAIN_S
        for turn in waiting:
            agent = turn.request.agent
            if turn.prepared is not None:
                ended = self._end(turn) if turn.prepared.done() else None
            elif turn.cancelled:
                ended = End(turn, turn.stopped(0, ""))
            elif self._book.active.setdefault(agent, turn) is turn:  # else they queue
                ended = None
                turn.prepared = self._workers.submit(self._prepare, turn.request)
                turn.prepared.add_done_callback(self._note_prepared)
            else:
                ended = None
            if ended is not None:
                yield ended
        if waiting and self._residency.has_place:
            yield from self._place_in_order()

    def _note_prepared(self, _: object) -> None:
        self._prepared += 1
        self._wake()

    def _end(self, turn: Turn) -> End | None:
        """The end of a turn that is prepared, or never will be, but cannot run."""
        assert turn.prepared is not None
        if turn.cancelled:
            return End(turn, turn.stopped(0, ""))
        error = turn.prepared.exception()
        if error is not None:
            return _refusal(turn, error)
        if turn.ready.memory.state != "owned":
            return End(turn, TurnMoved(turn.request.attempt))
        return None

    def _place_in_order(self) -> Iterator[Begin | End]:
        waiting = self._scheduler.waiting
        blocked: list[Turn] = []  # those that do not fit yet
        for turn in waiting.order():
            if turn.prepared is None or not turn.prepared.done():
                continue
            ended = self._end(turn)  # it may have been prepared since poll looked
            if ended is not None:
                yield ended
                continue
            try:
                began = self._place(turn, turn.ready, blocked)
            except EngineFault as fault:
                yield End(turn, TurnFailed(turn.request.attempt, fault), fault)
                return
            if began is not None:
                yield began
            if turn in waiting and not turn.holds_off:
                blocked.append(turn)
                if waiting.holds_back(turn):
                    return

    def _place(self, turn: Turn, ready: Prepared, blocked: list[Turn]) -> Begin | None:
        """None: it has to wait for room, for its rows, or for another's that it can share."""
        match, engine = ready.match, self._engine
        if turn.sequence is not None:
            match = Match(match.branch, None, match.branch.exported)
        most = len(ready.tokens) - 1  # the last token is always computed
        keep, n_runs = min(match.keep, most), 0 if turn.sequence else ready.n_runs
        stored = max(n_runs, min(keep, (match.source or match.branch).exported))
        held = self._held(match, keep)
        n_held = min(keep, engine.n_rows(held)) if held is not None else 0
        source = self._sharing.find(turn, n_held, stored)
        turn.holds_off = source is not None and not source.ready
        if turn.holds_off:
            return None
        seq_id = self._sequence_for(ready, match, keep, held, source)
        if seq_id is None:
            return None
        self._scheduler.waiting.place(turn, blocked)
        if match.dropped is not None:
            self._residency.drop(match.dropped)
        begin = engine.n_rows(seq_id)
        in_ram = self._memory.rows.in_ram(match.source or match.branch, keep, begin)
        if turn.sequence is None:
            open_turn = OpenTurn(turn.request.id, ready.n_prompt)
            self._memory.enter(ready.memory, match, open_turn, ready.tokens)
        if n_runs:
            self._memory.rows.begin(ready.memory, match.branch, ready.runs)
            in_ram = ready.away == "hot"
        if source is not None:
            self._memory.rows.share(ready.memory, match.branch, source.branch, source.n)
        self._sharing.note(seq_id, turn)
        stored = min(match.branch.exported, most)
        limit = turn.request.restore_tokens
        if limit is not None and not in_ram and turn.sequence is None:
            stored = min(stored, limit)
        return self._begin(turn, seq_id, stored, in_ram=in_ram)

    def _begin(self, turn: Turn, seq_id: int, stored: int, *, in_ram: bool) -> Begin | None:
        """None: the rows that are stored, but not in the sequence, come first."""
        ready, n_rows = turn.ready, self._engine.n_rows(seq_id)
        if stored > n_rows:
            away = ready.away if ready.runs else ready.memory.origin
            self._restorer.begin(turn, seq_id, stored, "hot" if in_ram else away, away)
            return None
        return Begin(turn, seq_id, "hot" if n_rows else "cold")

    def _held(self, match: Match, keep: int) -> int | None:
        """The idle sequence that can go on after the first `keep` tokens, or be forked there."""
        engine, residency = self._engine, self._residency
        held = residency.find(match.source or match.branch)
        if held is not None and not engine.can_truncate(held, min(keep, engine.n_rows(held))):
            if match.source is None:  # its rows are stored: go on from a checkpoint
                residency.free(held)
            return None
        return held

    def _sequence_for(
        self, ready: Prepared, match: Match, keep: int, held: int | None, source: Source | None
    ) -> int | None:
        """A sequence with what the engine has of the prompt's rows; None: no room."""
        engine, residency = self._engine, self._residency
        cells = self._cells.to_begin(ready)
        residency.make_way(held, source.seq_id if source is not None else None)
        if source is not None:
            seq_id = residency.fork(source.seq_id, match.branch, cells, source.n)
            if seq_id is not None and match.source is None:
                residency.drop(match.branch)
            return seq_id
        if held is None:
            return residency.acquire(match.branch, cells)
        n = min(keep, engine.n_rows(held))
        if match.source is None:
            return held if residency.resume(held, cells, n) else None
        return residency.fork(held, match.branch, cells, n)


def _refusal(turn: Turn, error: BaseException) -> End:
    attempt = turn.request.attempt
    if isinstance(error, (AgentMoved, Fenced)):
        return End(turn, TurnMoved(attempt))
    if isinstance(error, (ActorError, StorageError)):
        return End(turn, TurnFailed(attempt, error))
    logger.error("preparing a turn failed", exc_info=error)
    return End(turn, TurnFailed(attempt, EngineFault(f"preparing failed: {error!r}")))
