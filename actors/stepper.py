"""One engine step: schedule -> run -> accept. Called by the loop, on its thread.

What a step yields leaves as items of its turns. Rows of drafts that were refused are cut off before
anybody looks at the sequence: rows 0 .. n_rows - 1 are those of its tokens, always.
"""

from __future__ import annotations

import logging
import time

from actors.book import Book, Turn
from actors.cells import Cells
from actors.ends import Ends
from actors.engines.base import Engine, Logits
from actors.errors import EngineFault, InvalidRequest
from actors.exporter import Exporter
from actors.rates import Overhead
from actors.scheduler import Scheduled, Scheduler
from actors.sequence import Sequence
from actors.speculation import Speculator
from actors.turn import Progress, Tokens, TurnFailed

logger = logging.getLogger(__name__)


class Stepper:
    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler[Turn],
        book: Book,
        cells: Cells,
        exporter: Exporter,
        ends: Ends,
        speculator: Speculator,
        overhead: Overhead,
    ) -> None:
        self._engine, self._scheduler, self._book = engine, scheduler, book
        self._cells, self._exporter, self._ends = cells, exporter, ends
        self._speculator, self._overhead = speculator, overhead

    def step(self) -> bool:
        """False when nothing can run."""
        scheduled = self._schedule()
        if not scheduled:
            return False
        chunks = [entry.chunk() for entry in scheduled]
        began = time.perf_counter()
        try:
            logits = self._engine.step(chunks)
        except EngineFault as error:
            logger.error("an engine step failed: %s", error)
            self._ends.give_up(error)
            return True
        seconds = time.perf_counter() - began
        self._overhead.step(seconds)
        taken = 0
        for entry in scheduled:
            sequence = entry.sequence
            turn = self._book.by_sequence[id(sequence)]
            sequence.n_rows += entry.n_tokens
            if sequence.n_rows < len(sequence.tokens):
                done, total = sequence.n_rows, len(sequence.tokens)
                turn.emit(Progress(turn.request.attempt, done, total))
            else:
                taken += self._accept(turn, entry, logits[sequence.seq_id])
            if id(sequence) in self._book.by_sequence:
                self._exporter.filled(turn)
        self._cells.charge(taken)
        self._scheduler.measure(scheduled, seconds, taken)
        self._speculator.measure(scheduled, seconds)
        return True

    def _schedule(self) -> list[Scheduled]:
        without = self._cells.for_step()
        decodes, prefills = self._scheduler.active(without)
        room = self._scheduler.draft_room(len(decodes), len(prefills))
        before = self._speculator.model_s
        drafts = self._speculator.plan(decodes, room, alone=not prefills)
        self._overhead.engine_s += self._speculator.model_s - before
        return self._scheduler.schedule(without, drafts)

    def _accept(self, turn: Turn, entry: Scheduled, logits: Logits) -> int:
        """Draw a token from the logits of the sequence's last one, and from those of each drafted
        one as long as it was what had been drawn. Returns how many were."""
        sequence, text, taken = entry.sequence, "", 0
        index = len(sequence.tokens) - sequence.n_prompt
        try:
            for row, guess in zip(logits, (*entry.draft, None), strict=True):
                sequence.n_rows += taken > 0
                text += sequence.take(row, self._engine.vocab.eog)
                taken += 1
                if sequence.finish_reason or sequence.tokens[-1] != guess:
                    break
        except (InvalidRequest, EngineFault) as error:  # of its grammar: the others go on
            del sequence.new_ids[taken:]
            self._emit(turn, sequence, index, text)
            self._ends.end(turn, TurnFailed(turn.request.attempt, error))
            return taken
        self._speculator.record(sequence, len(entry.draft), taken - 1)
        if self._emit(turn, sequence, index, text):
            text = ""
        if sequence.finish_reason:
            self._ends.finish(turn, sequence, text)  # cuts the rows, too
        elif taken <= len(entry.draft):
            self._cut(turn, sequence)
        return taken

    def _emit(self, turn: Turn, sequence: Sequence, index: int, text: str) -> bool:
        """What was drawn, as one item; False if that was nothing."""
        ids, sequence.new_ids = tuple(sequence.new_ids), []
        logprobs, sequence.new_logprobs = tuple(sequence.new_logprobs), []
        if ids:
            turn.emit(Tokens(turn.request.attempt, index, ids, text, logprobs))
        return bool(ids)

    def _cut(self, turn: Turn, sequence: Sequence) -> None:
        """Take back the rows of drafts that were refused."""
        if self._engine.can_truncate(sequence.seq_id, sequence.n_rows):
            self._engine.truncate(sequence.seq_id, sequence.n_rows)
        else:  # the engine kept fewer rows than it had: go on from what is stored
            logger.warning("turn %s leaves the engine: rows cannot be taken back", turn.request.id)
            self._cells.leave(turn)
