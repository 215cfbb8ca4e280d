"""One llama_batch, filled in place: its arrays are numpy's."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from actors.engines.base import Chunk, Logits
from actors.errors import EngineFault


class Batch:
    """`raw` is what llama_decode takes; it points into arrays that live as long as this."""

    def __init__(self, size: int) -> None:
        """size: tokens it can hold."""
        self._tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        self._seq_ids = np.zeros(size, np.int32)
        self._n_seq_ids = np.ones(size, np.int32)
        self._n_logits: dict[int, int] = {}  # seq_id -> of its last tokens, how many are wanted
        # llama.cpp takes a list of sequences for each token: all are of one, in _seq_ids
        first = self._seq_ids.ctypes.data
        self._lists = first + np.arange(size, dtype=np.uintp) * self._seq_ids.itemsize
        self.raw: Any = llama.llama_batch(
            token=_pointer(self._tokens, ctypes.c_int32),
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(self._n_seq_ids, ctypes.c_int32),
            seq_id=_pointer(self._lists, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def fill(self, chunks: Sequence[Chunk]) -> int:
        """Returns the number of tokens. Raises EngineFault for more than it holds."""
        n = sum(len(chunk.token_ids) for chunk in chunks)
        if n > self._tokens.size:
            raise EngineFault(f"a step of {n} tokens, the batch holds {self._tokens.size}")
        lengths = [len(chunk.token_ids) for chunk in chunks]
        ends = list(accumulate(lengths))
        self._tokens[:n] = [token for chunk in chunks for token in chunk.token_ids]
        self._positions[:n] = [
            position
            for chunk, length in zip(chunks, lengths, strict=True)
            for position in range(chunk.start, chunk.start + length)
        ]
        self._seq_ids[:n] = np.repeat([chunk.seq_id for chunk in chunks], lengths)
        self._wanted[:n] = 0
        for chunk, end in zip(chunks, ends, strict=True):
            self._wanted[end - chunk.n_logits : end] = 1
        self._n_logits = {chunk.seq_id: chunk.n_logits for chunk in chunks if chunk.n_logits}
        self.raw.n_tokens = n
        return n

    def logits(self, context: Any, n_vocab: int) -> dict[int, Logits]:
        """Of the batch that was decoded last, by sequence; views that the next step overwrites.
        llama.cpp keeps the rows that were wanted one after another, in the batch's order."""
        if not self._n_logits:
            return {}
        size = sum(self._n_logits.values()) * n_vocab
        address = ctypes.addressof(llama.llama_get_logits(context).contents)
        rows = np.frombuffer(memoryview((ctypes.c_float * size).from_address(address)), np.float32)
        rows = rows.reshape(-1, n_vocab)
        found, first = {}, 0
        for seq_id, n in self._n_logits.items():
            found[seq_id] = rows[first : first + n]
            first += n
        return found


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
