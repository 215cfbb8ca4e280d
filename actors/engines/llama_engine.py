"""The Engine on llama.cpp, through llama-cpp-python's low-level API.

One context, unified KV; sequence n_seq_max is a scratch sequence through which rows enter and
leave without touching the rest. Keys of architectures with interleaved rope are reordered at this
edge. Refuses, before it is ready, models whose cache it cannot carry.

Cells of another `kv_type` than f16 are ggml's blocks: rows that are computed here are quantized by
llama.cpp as soon as they exist, rows that are loaded when they enter. Into those of q4_1 the q4
codec's tensors go as they are.

Models with sliding-window layers have two caches in one context. llama.cpp gives every sequence
window + (n_ubatch, shared) cells in the sliding one and takes back those that no window reaches,
its own or an idle neighbour's, when a step needs them: what is left of a window must be asked for.
Its position calls see the sliding cache only. `swa_full` would keep every cell (Gemma 3 270M: 5/6
of the layers; with 4 sequences and 32K cells 4 times the memory) and make no call simpler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from actors.engines import llama_context, llama_lora, llama_spec, llama_state
from actors.engines.base import Chunk, Engine, Logits, Vocab, count_rows
from actors.engines.llama_batch import Batch
from actors.engines.llama_front import Front
from actors.engines.llama_lora import Lora
from actors.engines.llama_rows import Layout
from actors.engines.llama_scratch import SLIDING_ONLY, WHOLE, Scratch
from actors.engines.llama_state import Cells
from actors.engines.llama_threads import Threads
from actors.engines.llama_vocab import LlamaVocab
from actors.engines.options import MAX_UBATCH, EngineOptions
from actors.errors import EngineFault, ModelUnavailable
from storage import codec
from storage.codec import Tensors, merge_parts
from storage.spec import CompatibilityKey, KVRows

_TILE = 64  # queries that flash attention takes together (ggml-cpu/ops.cpp)


class LlamaEngine(Engine):
    """n_seq_max sequences that share n_cells cells; see Engine for the calls.

    Raises ModelUnavailable for a file llama.cpp cannot load or a cache this engine cannot carry.
    """

    name = "llama.cpp"
    exports_encoded = ""  # rows that llama.cpp has quantized are in no codec's codes
    device = "cpu"
    idle_rows_cost = True  # order of the cells, and time where llama.cpp is not patched

    def __init__(
        self,
        path: Path,
        *,
        n_seq_max: int,
        n_ctx: int,
        n_cells: int,
        n_threads: int,
        kv_type: str = "f16",
        flash_attention: bool = True,
        n_ubatch: int = MAX_UBATCH,
        lora: Lora | None = None,
    ) -> None:
        """n_ctx: tokens per sequence, at most the model's; n_cells: tokens of all sequences."""
        llama_context.init_backend()
        self._context: Any = None
        self._model: Any = llama_context.open_model(path)
        spec, self._rope = llama_spec.read(self._model, path)  # refuses before the file is hashed
        self.key = CompatibilityKey(
            *llama_spec.digests(path), rope=self._rope.parameters, spec=spec
        )
        self._lora = lora
        if lora:
            self.key = replace(self.key, weights=lora.weights(self.key.weights))
            self._adapter = llama_lora.load(self._model, lora)
        self.window = max(layer.window for layer in spec.layers)
        self.vocab: Vocab = LlamaVocab(self._model)
        self._n_ctx = min(n_ctx, llama.llama_model_n_ctx_train(self._model))
        self.n_seq_max = n_seq_max
        self.n_batch = MAX_UBATCH
        self.reopen(EngineOptions(n_threads, flash_attention, kv_type, n_ubatch), n_cells)

    def reopen(self, options: EngineOptions, n_cells: int) -> None:
        """Compute in another way, with the same weights: every sequence is empty then. Raises
        ModelUnavailable for what this model does not allow; only `reopen` and `close` work then."""
        llama_context.check_options(options)
        self._free_context()
        self._layout = self._layout_of(options)
        self.tile = _TILE if options.flash_attention and options.kv_type == "f16" else 0
        self.loads_encoded = self._layout.codec.name if self._layout.codec else ""
        self._sliding = self._layout.sliding
        n_batch, n_seq_max = self.n_batch + self.n_seq_max, self.n_seq_max + 1
        sizes = n_cells, n_batch, n_seq_max
        self._context = llama_context.open_context(self._model, options, *sizes)
        if self._lora:
            llama_lora.apply(self._context, self._adapter, self._lora)
        self.threads = Threads(options.threads, llama_context.using(self._context))
        self._batch = Batch(n_batch)
        self.n_cells = llama.llama_n_ctx(self._context)
        self.n_ctx = min(self._n_ctx, n_cells)
        self._sliding_cells = self._count_sliding(options, self.n_cells)
        self.kv_bytes = self._layout.bytes(self.n_cells, self._sliding_cells)
        self._memory = llama.llama_get_memory(self._context)
        self._scratch = Scratch(self._context, self.n_seq_max)
        self._front = Front(self._scratch, moves=not self._sliding)
        self._rows = [0] * self.n_seq_max
        self._run = [0] * self.n_seq_max  # first position of the sliding rows loaded without a gap
        self._check_state()

    def planned_bytes(self, options: EngineOptions, n_cells: int) -> int:
        """kv_bytes of an engine of these options. Raises ModelUnavailable."""
        cells = -(-n_cells // 256) * 256
        return self._layout_of(options).bytes(cells, self._count_sliding(options, cells))

    def _layout_of(self, options: EngineOptions) -> Layout:
        flash = options.flash_attention
        return Layout(self.key.spec, self._rope, options.kv_type, v_trans=not flash)

    def _count_sliding(self, options: EngineOptions, n_cells: int) -> int:
        """llama-kv-cache-iswa.cpp: a window for each sequence, one micro-batch, rounded up."""
        wanted = self.window * (self.n_seq_max + 1) + options.ubatch
        return min(n_cells, -(-wanted // 256) * 256)

    def _check_state(self) -> None:
        """Two tokens out and in again: this build's state bytes are the ones llama_state knows."""
        try:
            self.step([Chunk(0, [0, 0], 0, 0)])
            rows = self._first_two()
            self.truncate(0, 0)
            self.load(0, 0, rows)
            if self.loads_encoded:
                same = _same(self.export_encoded(0, 0, 2), self._encode(rows))
            else:
                same = self._layout.same(rows, self._first_two())
            if not same:
                raise EngineFault("rows do not come back as they went in")
            self.truncate(0, 0)
        except EngineFault as error:
            raise ModelUnavailable(f"cannot export and import this cache: {error}") from error

    def _first_two(self) -> KVRows:
        return merge_parts(self.key.spec, self.export(0, 0, 2), self.export_window(0, 0, 2))

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        for chunk in chunks:
            self._check_start(chunk)
        self._look(chunks)
        n = self._batch.fill(chunks)
        with self.threads.computing():
            code = llama.llama_decode(self._context, self._batch.raw)
        for chunk in chunks:
            if code:  # part of the batch may be computed: a failed step leaves nothing
                llama.llama_memory_seq_rm(self._memory, chunk.seq_id, chunk.start, -1)
            else:
                self._rows[chunk.seq_id] += len(chunk.token_ids)
                self._front.place(len(chunk.token_ids))
        if code:
            raise EngineFault(f"llama_decode of {n} tokens failed with {code}")
        return self._batch.logits(self._context, self.vocab.size)

    def _look(self, chunks: Sequence[Chunk]) -> None:
        try:
            self._front.look(chunks, self._rows)
        except EngineFault:
            self.truncate(chunks[0].seq_id, 0)
            raise

    def _check_start(self, chunk: Chunk) -> None:
        """llama.cpp itself computes on, silently wrong, where sliding cells are missing."""
        held = self._rows[chunk.seq_id]
        if chunk.start != held:
            raise EngineFault(f"position {chunk.start} after {held} rows")
        if not self.can_truncate(chunk.seq_id, held):
            first = self.window_start(chunk.seq_id)
            raise EngineFault(f"position {held} needs sliding rows, which begin at {first}")

    def export(self, seq_id: int, start: int, stop: int) -> KVRows:
        self._check_range(seq_id, start, stop)
        caches = [self._layout.full, self._sliding] if self._sliding else [self._layout.full]
        cells = self._scratch.copy_out(seq_id, start, stop, caches, WHOLE)[0]
        if (cells.start, cells.n_rows) != (start, stop - start):
            raise EngineFault(f"state of {cells.n_rows} rows from {cells.start}, not from {start}")
        return self._layout.rows("full", cells)

    def export_window(self, seq_id: int, start: int, stop: int) -> KVRows:
        self._check_range(seq_id, start, stop)
        first = max(start, self.window_start(seq_id), stop - self.window)
        if first >= stop:
            return self._layout.rows("sliding", None)
        cells = self._scratch.copy_out(seq_id, first, stop, [self._sliding], SLIDING_ONLY)[0]
        if (cells.start, cells.n_rows) != (first, stop - first):
            raise EngineFault(f"state of {cells.n_rows} rows from {cells.start}, not from {first}")
        return self._layout.rows("sliding", cells)

    def _check_range(self, seq_id: int, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self._rows[seq_id]:
            raise EngineFault(f"rows {start}..{stop} of {self._rows[seq_id]}")

    def load(self, seq_id: int, start: int, rows: KVRows) -> None:
        if self.loads_encoded:
            self.load_encoded(seq_id, start, self._encode(rows))
            return
        stop = start + count_rows(rows)
        full = self._layout.cells("full", rows, stop, stop - start)
        caches = [(self._layout.full, full)]
        if self._sliding:
            sliding = self._layout.cells("sliding", rows, stop, self.window)
            caches.append((self._sliding, sliding))
        self._append(seq_id, start, stop, caches)
        if self._sliding and sliding.start > start:
            self._run[seq_id] = sliding.start  # rows before it are missing

    def load_encoded(self, seq_id: int, start: int, tensors: Tensors) -> None:
        if not self.loads_encoded:
            raise EngineFault(f"{self._layout.type.name} cells take no encoded rows")
        stop = start + codec.count_rows(tensors)
        cells = self._layout.encoded_cells(tensors, stop)
        self._append(seq_id, start, stop, [(self._layout.full, cells)])

    def export_encoded(self, seq_id: int, start: int, stop: int) -> Tensors:
        """What load_encoded has put there, code by code. Raises EngineFault for other rows: those
        computed here have a range per 32 values, the codec's one per 64."""
        self._check_range(seq_id, start, stop)
        cells = self._scratch.copy_out(seq_id, start, stop, [self._layout.full], WHOLE)[0]
        try:
            return self._layout.encoded(cells)
        except ValueError as error:
            raise EngineFault(f"rows {start}..{stop} were not loaded: {error}") from error

    def _encode(self, rows: KVRows) -> Tensors:
        return codec.encode_rows(self.key.spec, codec.get_codec(self.loads_encoded), rows)

    def _append(
        self, seq_id: int, start: int, stop: int, caches: list[tuple[llama_state.Cache, Cells]]
    ) -> None:
        if self._rows[seq_id] != start:
            raise EngineFault(f"load at {start} after {self._rows[seq_id]} rows")
        n_rows = caches[0][1].n_rows
        if stop == start or n_rows != stop - start:
            raise EngineFault(f"{n_rows} full rows to fill {start}..{stop}")
        self._scratch.copy_in(seq_id, start, stop, caches)
        self._rows[seq_id] = stop
        self._front.place(n_rows)

    def fork(self, source: int, target: int, n_rows: int) -> None:
        if self._rows[target]:
            raise EngineFault(f"fork into sequence {target}, which is not empty")
        if not self.can_truncate(source, n_rows):
            raise EngineFault(f"sequence {source} cannot be forked at {n_rows}: no window there")
        llama.llama_memory_seq_cp(self._memory, source, target, 0, n_rows)
        if self._sliding and self._sliding_cells < self.n_cells:
            self._scratch.unshare(target)
        self._rows[target], self._run[target] = n_rows, self._run[source]

    def window_start(self, seq_id: int) -> int:
        if not self._sliding:
            return 0
        first, last = self._scratch.held(seq_id)
        if last + 1 != self._rows[seq_id]:  # none at the end: loaded without, or lost
            return self._rows[seq_id]
        return max(first, self._run[seq_id], 0)

    def truncate(self, seq_id: int, n_rows: int) -> None:
        if 0 < self._rows[seq_id] <= n_rows:
            return
        if not self.can_truncate(seq_id, n_rows):
            raise EngineFault(f"sequence {seq_id} cannot be cut to {n_rows} rows: no window there")
        llama.llama_memory_seq_rm(self._memory, seq_id, n_rows or -1, -1)
        self._rows[seq_id] = n_rows
        if not n_rows:
            self._run[seq_id] = 0
        if not any(self._rows):
            self._front.clear()

    def n_rows(self, seq_id: int) -> int:
        return self._rows[seq_id]

    def close(self) -> None:
        self._free_context()
        if self._model:
            llama.llama_model_free(self._model)
            self._model = None

    def _free_context(self) -> None:
        if self._context:
            llama.llama_free(self._context)
            self._context = None


def _same(a: Mapping[str, NDArray[Any]], b: Mapping[str, NDArray[Any]]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)
