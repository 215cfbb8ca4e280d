"""Cells for running turns: reserved a little ahead of what they hold, and taken from others when
they run out.

A turn is admitted with what it needs now. When it grows and nothing is free, idle branches leave
first, then the last of the running turns: its rows are handed over, it waits, and goes on later
where it was. The first of them is never asked to leave, so one always comes to its end.
"""

from __future__ import annotations

from actors.book import Book, Turn
from actors.engines.base import Engine
from actors.exporter import Exporter
from actors.prepare import Prepared
from actors.residency import Residency
from actors.scheduler import Scheduler
from actors.sequence import Sequence

_AHEAD = 64  # tokens a turn may go on before it asks again


class Cells:
    def __init__(
        self,
        engine: Engine,
        residency: Residency,
        scheduler: Scheduler[Turn],
        book: Book,
        exporter: Exporter,
    ) -> None:
        self._engine, self._residency, self._scheduler = engine, residency, scheduler
        self._book, self._exporter = book, exporter
        self.preemptions = 0

    def to_begin(self, ready: Prepared) -> int:
        """Cells with which a turn may enter the engine."""
        return self._ahead(ready.n_prompt + ready.max_tokens, len(ready.tokens), _AHEAD)

    def for_step(self) -> list[Sequence]:
        """See that every running sequence has the cells of its next token; returns those that have
        to sit the step out, because what they wait for is on its way out of the engine or into it.
        """
        running, without = self._scheduler.running, list[Sequence]()
        short = [s for s in running if not s.paused and not self._holds(s)]
        for turn in sorted(map(self._turn, short), key=_rank):
            sequence = turn.sequence
            assert sequence is not None
            if sequence in running and not self._fits(turn, sequence):
                without.append(sequence)
        return without

    def for_drafts(self, sequence: Sequence, k: int) -> int:
        """Of k drafted tokens, as many as have cells; nobody leaves for them."""
        residency, needed = self._residency, len(sequence.tokens)
        reserved = residency.reserved(sequence.seq_id)
        free = self._engine.n_cells - residency.cells_used
        most = sequence.n_prompt + sequence.max_tokens
        for ahead in (_AHEAD, 0):
            wanted = self._ahead(most, needed + k, ahead)
            if reserved < needed + k and wanted - reserved <= free:
                residency.grow(sequence.seq_id, wanted)
                reserved = wanted
        return max(0, min(k, reserved - needed))

    def charge(self, n_tokens: int) -> None:
        """Tokens that running turns have drawn."""
        self._residency.charge(n_tokens)

    def _turn(self, sequence: Sequence) -> Turn:
        return self._book.by_sequence[id(sequence)]

    def _holds(self, sequence: Sequence) -> bool:
        return self._residency.reserved(sequence.seq_id) >= len(sequence.tokens)

    def _fits(self, turn: Turn, sequence: Sequence) -> bool:
        """Make it so; the turn itself leaves when it is the last. False: not yet."""
        while not self._grow(sequence):
            others = [self._turn(s) for s in self._scheduler.running if not s.paused]
            last = max(others, key=_rank)
            if last is turn and self._book.restoring + self._book.draining + self._paused():
                return False  # their cells will be there, or may be taken, soon
            self.leave(last)
            if last is turn:
                break
        return True

    def _paused(self) -> list[Turn]:
        return [self._turn(s) for s in self._scheduler.running if s.paused]

    def _grow(self, sequence: Sequence) -> bool:
        needed, most = len(sequence.tokens), sequence.n_prompt + sequence.max_tokens
        return any(
            self._residency.grow(sequence.seq_id, self._ahead(most, needed, ahead))
            for ahead in (_AHEAD, _AHEAD // 4, 0)
        )

    def _ahead(self, most: int, needed: int, ahead: int) -> int:
        return max(needed, min(self._engine.n_ctx, most, needed + ahead))

    def leave(self, turn: Turn) -> None:
        """Out of the engine and back to the front of the queue."""
        sequence = turn.sequence
        assert sequence is not None
        self.preemptions += 1
        memory = turn.ready.memory
        if memory.card is not None and memory.state != "released" and sequence.n_rows:
            self._exporter.export(turn, sequence.n_rows, wait=False)
            self._exporter.checkpoint(turn)
        self._residency.free(sequence.seq_id)
        sequence.seq_id, sequence.n_rows = -1, 0
        self._scheduler.running.remove(sequence)
        del self._book.by_sequence[id(sequence)]
        self._scheduler.waiting.put_back(turn)


def _rank(turn: Turn) -> tuple[int, float]:
    """Higher priorities first, then those that came first."""
    return -turn.priority, turn.began
