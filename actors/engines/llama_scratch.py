"""Rows out of and into the sequences of one llama.cpp context, as state bytes.

They pass through a scratch sequence, so that the rest of a sequence is not touched. Buffers are
reused: touching new pages costs more than the copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from actors.engines import llama_state
from actors.engines.llama_state import Cache, Cells
from actors.errors import EngineFault

WHOLE, SLIDING_ONLY = 0, llama.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


class Scratch:
    """`seq_id`: of the scratch sequence, which is empty between calls."""

    def __init__(self, context: Any, seq_id: int) -> None:
        self._context, self._seq_id = context, seq_id
        self._memory = llama.llama_get_memory(context)
        self._state = np.empty(0, np.uint8)
        self._built = np.empty(0, np.uint8)

    def copy_out(
        self, seq_id: int, start: int, stop: int, caches: Sequence[Cache], flags: int
    ) -> list[Cells]:
        """What the caches hold of rows start..stop; views that the next call overwrites."""
        llama.llama_memory_seq_cp(self._memory, seq_id, self._seq_id, start, stop)
        try:
            state = self._get(self._seq_id, flags)
        finally:
            llama.llama_memory_seq_rm(self._memory, self._seq_id, -1, -1)
        return llama_state.parse(state.data, caches)

    def copy_in(
        self, seq_id: int, start: int, stop: int, caches: Sequence[tuple[Cache, Cells]]
    ) -> None:
        """Append the cells to a sequence, of which they become rows start..stop. Raises EngineFault
        unless all are there afterwards; the sequence is then as it was."""
        raw = llama_state.build(self._seq_id, caches, self._built)
        if raw.size > self._built.size:
            self._built = raw
        last = caches[-1][1]  # the cache that llama.cpp's position calls see
        wanted = (last.start, stop - 1) if last.n_rows else (-1, -1)
        try:
            got = self._set(raw, self._seq_id, WHOLE)
            size = llama.llama_state_seq_get_size(self._context, self._seq_id)  # counts the cells
            if not got == size == raw.size or self.held(self._seq_id) != wanted:
                raise EngineFault(
                    f"rows {start}..{stop} were not restored ({got} of {raw.size} bytes)"
                )
            llama.llama_memory_seq_cp(self._memory, self._seq_id, seq_id, start, stop)
        finally:
            llama.llama_memory_seq_rm(self._memory, self._seq_id, -1, -1)

    def unshare(self, seq_id: int) -> None:
        """Give a sequence sliding cells of its own. llama.cpp never takes back a cell that two
        sequences share, so shared ones would fill the sliding cache as both go on."""
        state = self._get(seq_id, SLIDING_ONLY)
        before = self.held(seq_id)[1]
        got = self._set(state, seq_id, SLIDING_ONLY)
        if got != state.size or self.held(seq_id)[1] != before:
            llama.llama_memory_seq_rm(self._memory, seq_id, -1, -1)
            raise EngineFault(f"the window of a fork was not copied ({got} of {state.size} bytes)")

    def gather(self, seq_id: int) -> None:
        """Move the only sequence there is to the first cells, in order. Raises EngineFault; what
        it then holds is to be thrown away."""
        before = self.held(seq_id)
        state = self._get(seq_id, WHOLE)
        self._state = np.empty(0, np.uint8)  # as large as the sequence: not to be kept
        self.clear()
        got = self._set(state, seq_id, WHOLE)
        if got != state.size or self.held(seq_id) != before:
            raise EngineFault(f"a sequence was lost on the way ({got} of {state.size} bytes)")

    def clear(self) -> None:
        """Every sequence is empty, and the first cells are the next."""
        llama.llama_memory_clear(self._memory, False)

    def held(self, seq_id: int) -> tuple[int, int]:
        """First and last position; (-1, -1): none."""
        first = llama.llama_memory_seq_pos_min(self._memory, seq_id)
        return first, llama.llama_memory_seq_pos_max(self._memory, seq_id)

    def _get(self, seq_id: int, flags: int) -> NDArray[np.uint8]:
        size = llama.llama_state_seq_get_size_ext(self._context, seq_id, flags)
        if size > self._state.size:
            self._state = np.empty(size, np.uint8)
        state = self._state[:size]
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        got = llama.llama_state_seq_get_data_ext(self._context, pointer, size, seq_id, flags)
        if got != size:
            raise EngineFault(f"state gave {got} of {size} bytes")
        return state

    def _set(self, state: NDArray[np.uint8], seq_id: int, flags: int) -> int:
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return int(
            llama.llama_state_seq_set_data_ext(self._context, pointer, state.size, seq_id, flags)
        )
