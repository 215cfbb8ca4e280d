"""One llama_batch, filled in place: its arrays as numpy views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np

from actors.engines.base import Chunk
from actors.errors import EngineFault


class Batch:
    """`raw` is what llama_decode takes."""

    def __init__(self, size: int) -> None:
        """size: tokens it can hold."""
        self.raw: Any = llama.llama_batch_init(size, 0, 1)
        self._tokens = np.ctypeslib.as_array(self.raw.token, (size,))
        self._positions = np.ctypeslib.as_array(self.raw.pos, (size,))
        self._wanted = np.ctypeslib.as_array(self.raw.logits, (size,))
        np.ctypeslib.as_array(self.raw.n_seq_id, (size,))[:] = 1

    def fill(self, chunks: Sequence[Chunk]) -> tuple[int, dict[int, range]]:
        """(number of tokens, seq_id -> places of the tokens whose logits are wanted). Raises
        EngineFault for more tokens than it holds."""
        n = sum(len(chunk.token_ids) for chunk in chunks)
        if n > self._tokens.size:
            raise EngineFault(f"a step of {n} tokens, the batch holds {self._tokens.size}")
        n, places = 0, {}
        self._wanted[:] = 0
        for chunk in chunks:
            end = n + len(chunk.token_ids)
            self._tokens[n:end] = chunk.token_ids
            self._positions[n:end] = np.arange(chunk.start, chunk.start + end - n)
            for i in range(n, end):
                self.raw.seq_id[i][0] = chunk.seq_id
            if chunk.n_logits:
                self._wanted[end - chunk.n_logits : end] = 1
                places[chunk.seq_id] = range(end - chunk.n_logits, end)
            n = end
        self.raw.n_tokens = n
        return n, places

    def free(self) -> None:
        llama.llama_batch_free(self.raw)
