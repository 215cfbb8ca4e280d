"""Keep a lone sequence in the first cells.

For a token alone, flash attention gives every thread an equal run of the cells up to the last one
in use (ggml-cpu/ops.cpp, split along KV): where the first of them are others' or empty, one thread
does all the work. A sequence that is left alone behind others' cells moves to the front once its
steps have taken longer by about what moving takes: 0.04 ms a row of SmolLM2, against 0.002 ms a row
and step.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.engines.base import Chunk
from actors.engines.llama_scratch import Scratch

_ASTRAY = 256  # cells before it that are worth a move
_LONE_STEPS = 24


class Front:
    """`split`: whether this context computes so at all."""

    def __init__(self, scratch: Scratch, *, split: bool) -> None:
        self._scratch, self._split = scratch, split
        self._placed = 0  # cells handed out since there was no row
        self._lone = 0  # steps of a sequence that lies astray

    def place(self, n_rows: int) -> None:
        """Cells were handed out: the next ones after those before."""
        self._placed += n_rows

    def clear(self) -> None:
        """No row is left: begin with the first cells again."""
        self._scratch.clear()
        self._placed = 0

    def look(self, chunks: Sequence[Chunk], rows: Sequence[int]) -> None:
        """Before a step over these chunks; `rows` of every sequence. Raises EngineFault: that of
        the first chunk is then empty."""
        if not self._split or len(chunks) > 1 or len(chunks[0].token_ids) > 1:
            return
        seq_id = chunks[0].seq_id
        n_rows = rows[seq_id]
        if self._placed - n_rows <= max(_ASTRAY, n_rows // 4) or sum(rows) > n_rows:
            return
        self._lone += 1
        if self._lone > _LONE_STEPS:
            self._lone = 0
            self._scratch.gather(seq_id)
            self._placed = n_rows
