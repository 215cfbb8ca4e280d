"""Keep a lone sequence in the first cells, in order.

llama.cpp puts the next tokens in the first cells that are free, before the rows they follow: sums
in another order, logits that differ in the first decimal. So a sequence that is left alone behind
cells that came free moves before its next step: 0.04 ms a row of SmolLM2. (As ggml is released,
it also gives every thread an equal run of the cells up to the last one in use: where the first of
them are empty, one thread does all the work of a token alone.)
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.engines.base import Chunk
from actors.engines.llama_scratch import Scratch

_ASTRAY = 256  # cells before it that are worth a move


class Front:
    """`moves`: whether a sequence's cells can be moved. Those of sliding layers would lose rows."""

    def __init__(self, scratch: Scratch, *, moves: bool) -> None:
        self._scratch, self._moves = scratch, moves
        self._placed = 0  # cells handed out since there was no row

    def place(self, n_rows: int) -> None:
        """Cells were handed out: the next ones after those before."""
        self._placed += n_rows

    def clear(self) -> None:
        """No row is left: begin with the first cells again."""
        self._scratch.clear()
        self._placed = 0

    def look(self, chunks: Sequence[Chunk], rows: Sequence[int]) -> None:
        """Before a step over these chunks; `rows` of every sequence. Raises EngineFault: the first
        chunk's, the only one there is, cannot go on."""
        if not self._moves or len(chunks) > 1:
            return
        seq_id = chunks[0].seq_id
        n_rows = rows[seq_id]
        if n_rows and self._placed - n_rows > max(_ASTRAY, n_rows // 4) and sum(rows) == n_rows:
            self._scratch.gather(seq_id)
            self._placed = n_rows
