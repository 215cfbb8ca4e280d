"""The Engine on MLX: mlx-lm's models over caches that hold the stored form.

Cells are float16, or with `cells` = a codec's name that codec's codes: rows are encoded once, as
soon as they exist, by the codec's own encoder, and export and import are slices. Sliding layers
stay in float16. Sequences that decode in one step are one batch (mlx_batches); a longer chunk is
computed by itself. One thread owns MLX: what is lazy is evaluated before a call returns, because
an unevaluated array belongs to the thread that made it.

Float16 cells store in a codec all the same, and compute the prompt in floats. Cells of codes cost a
quarter of the memory; what a token sees in codes and what in floats depends on its position alone
(mlx_cache), so every chunking and every batch gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from actors.engines import mlx_models
from actors.engines.base import Chunk, Engine, Logits, count_rows
from actors.engines.mlx_batches import Batches
from actors.engines.mlx_cells import Cells
from actors.errors import EngineFault, ModelUnavailable
from storage import codec
from storage.codec import Tensors, decode_rows, encode_rows, get_codec, merge_parts
from storage.spec import KVRows, Part

_N_BATCH = 512
_FAULTS = (RuntimeError, ValueError, MemoryError)  # what MLX raises


class MlxEngine(Engine):
    """n_seq_max sequences of n_cells tokens in all; see Engine for the calls.

    Raises ModelUnavailable for a model mlx-lm or this engine cannot serve.
    """

    name = "mlx"

    def __init__(
        self,
        path: Path,
        *,
        n_seq_max: int,
        n_ctx: int,
        n_cells: int,
        cells: str = "f16",
        packed: bool | None = None,
    ) -> None:
        """n_ctx: tokens per sequence, at most the model's; cells: a codec; `packed` as
        mlx_models.load."""
        self.device = "cpu" if mx.default_device() == mx.Device(mx.cpu) else "metal"
        self._codec = get_codec(cells)
        self.loads_encoded = "" if cells == "f16" else cells
        self.exports_encoded = self.loads_encoded
        self._network = mlx_models.load(path, packed=packed)
        self.key, self.vocab = self._network.key, self._network.vocab
        self._spec = self.key.spec
        self.window = self._spec.window
        self._slides = [layer.kind == "sliding" for layer in self._spec.layers]
        self.n_seq_max, self.n_cells = n_seq_max, n_cells
        self.n_ctx = min(n_ctx, self._network.n_ctx, n_cells)
        self.n_batch = _N_BATCH
        self.kv_bytes = 0  # allocated as rows come
        try:
            self._cells = Cells(self.key, self._codec)
            self._batches = Batches(n_seq_max, self._cells.new)
            self._check_state()
        except ModelUnavailable:
            self._network.close()
            raise

    # ---- before it is ready

    def _check_state(self) -> None:
        """Two tokens out and in again: the model's rows are those of the spec."""
        try:
            self.step([Chunk(0, [0, 0], 0, 0)])
            rows = self._both(0, 2)
            wanted = [(g.n_kv_heads, g.key_dim, g.value_dim) for g in self._spec.groups]
            found = [(x.k.shape[2], x.k.shape[3], x.v.shape[3]) for x in rows]
            if found != wanted or any(count_rows((x,)) != 2 for x in rows):
                raise EngineFault(f"rows of heads and dims {found}, the spec says {wanted}")
            self.truncate(0, 0)
            self.load(0, 0, rows)
            self.truncate(0, 0)
        except EngineFault as error:
            reason = f"cannot export and import this model's cache: {error}"
            raise ModelUnavailable(reason) from error

    def _both(self, start: int, stop: int) -> KVRows:
        full, sliding = self.export(0, start, stop), self.export_window(0, start, stop)
        return merge_parts(self._spec, full, sliding)

    # ---- computing

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        n = sum(len(chunk.token_ids) for chunk in chunks)
        if n > self.n_batch + self.n_seq_max:
            raise EngineFault(f"a step of {n} tokens, a batch holds {self.n_batch}")
        rows = sum(map(self.n_rows, range(self.n_seq_max)))
        if rows + n > self.n_cells:
            raise EngineFault(f"{n} more tokens than the {rows} in {self.n_cells} cells")
        for chunk in chunks:
            self._check_start(chunk)
        try:
            found = self._compute(chunks)
        except _FAULTS as error:  # some layers may have the rows: a failed step leaves nothing
            for chunk in chunks:
                self._batches.empty(chunk.seq_id)
            raise EngineFault(f"a step of {n} tokens failed: {error}") from error
        self.kv_bytes = self._batches.nbytes
        return found

    def _check_start(self, chunk: Chunk) -> None:
        held = self.n_rows(chunk.seq_id)
        if chunk.start != held:
            raise EngineFault(f"position {chunk.start} after {held} rows")
        if not self.can_truncate(chunk.seq_id, held):
            first = self.window_start(chunk.seq_id)
            raise EngineFault(
                f"position {held} needs sliding rows that are not there, from {first}"
            )

    def _compute(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        logits: dict[int, mx.array] = {}
        single = {chunk.seq_id: chunk for chunk in chunks if len(chunk.token_ids) == 1}
        for batch in self._batches.together(list(single)) if single else []:
            ids = [single[i].token_ids for i in batch.members]
            hidden = self._network.hidden(mx.array(ids), batch.caches)
            wanted = [n for n, i in enumerate(batch.members) if single[i].n_logits]
            if wanted:
                rows = self._network.logits(hidden[mx.array(wanted)])
                logits |= {batch.members[n]: rows[at] for at, n in enumerate(wanted)}
            mx.eval([cache.fields for cache in batch.caches], list(logits.values()))
        for chunk in chunks:
            if chunk.seq_id in single:
                continue
            caches = self._batches.alone(chunk.seq_id)
            hidden = self._network.hidden(mx.array([list(chunk.token_ids)]), caches)
            if chunk.n_logits:
                logits[chunk.seq_id] = self._network.logits(hidden[0, -chunk.n_logits :])
            mx.eval([cache.fields for cache in caches], list(logits.values()))
        return {seq_id: np.array(x) for seq_id, x in logits.items()}

    # ---- rows

    def export(self, seq_id: int, start: int, stop: int) -> KVRows:
        if self.loads_encoded:
            tensors = self.export_encoded(seq_id, start, stop)
            return decode_rows(self._spec, self._codec, tensors)
        self._check_range(seq_id, start, stop)
        return self._rows(seq_id, start, stop, "full")

    def export_window(self, seq_id: int, start: int, stop: int) -> KVRows:
        self._check_range(seq_id, start, stop)
        first = max(start, self.window_start(seq_id), stop - self.window)
        return self._rows(seq_id, min(first, stop), stop, "sliding")

    def export_encoded(self, seq_id: int, start: int, stop: int) -> Tensors:
        """The full part as the codec stores it, code by code, of whatever rows."""
        if not self.exports_encoded:
            raise EngineFault("float16 cells give no encoded rows")
        self._check_range(seq_id, start, stop)
        caches, place = self._batches.find(seq_id)
        try:
            return self._cells.encoded(caches, place, start, stop)
        except _FAULTS as error:
            raise EngineFault(f"rows {start}..{stop} cannot be read: {error}") from error

    def _check_range(self, seq_id: int, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.n_rows(seq_id):
            raise EngineFault(f"rows {start}..{stop} of {self.n_rows(seq_id)}")

    def _rows(self, seq_id: int, start: int, stop: int, part: Part) -> KVRows:
        caches, place = self._batches.find(seq_id)
        try:
            return self._cells.rows(caches, place, start, stop, part)
        except _FAULTS as error:
            raise EngineFault(f"rows {start}..{stop} cannot be read: {error}") from error

    def load(self, seq_id: int, start: int, rows: KVRows) -> None:
        n_rows = self._cells.check(rows)
        tensors = encode_rows(self._spec, self._codec, rows)
        tensors |= encode_rows(self._spec, get_codec("f16"), rows, "sliding")
        self._load(seq_id, start, n_rows, tensors)

    def load_encoded(self, seq_id: int, start: int, tensors: Tensors) -> None:
        """Tensors of sliding layers may be among them; those are decoded."""
        if not self.loads_encoded:
            raise EngineFault("float16 cells take no encoded rows")
        full = {name: x for name, x in tensors.items() if name.startswith("full.")}
        sliding = {name: x for name, x in tensors.items() if name not in full}
        if sliding:
            rows = decode_rows(self._spec, self._codec, sliding, "sliding")
            full |= encode_rows(self._spec, get_codec("f16"), rows, "sliding")
        self._load(seq_id, start, codec.count_rows(full), full)

    def _load(self, seq_id: int, start: int, n_rows: int, tensors: Tensors) -> None:
        if self.n_rows(seq_id) != start:
            raise EngineFault(f"load at {start} after {self.n_rows(seq_id)} rows")
        if not n_rows:
            raise EngineFault("a load of no rows")
        if sum(map(self.n_rows, range(self.n_seq_max))) + n_rows > self.n_cells:
            raise EngineFault(f"{n_rows} rows do not fit in {self.n_cells} cells")
        copies = [cache.copy() for cache in self._batches.alone(seq_id)]
        try:
            self._cells.append(copies, n_rows, tensors)
        except _FAULTS as error:
            raise EngineFault(f"{n_rows} rows cannot be loaded: {error}") from error
        self._batches.replace(seq_id, copies)
        self.kv_bytes = self._batches.nbytes

    # ---- sequences

    def fork(self, source: int, target: int, n_rows: int) -> None:
        if self.n_rows(target):
            raise EngineFault(f"fork into sequence {target}, which is not empty")
        if not self.can_truncate(source, n_rows):
            raise EngineFault(f"sequence {source} cannot be forked at {n_rows}: no window there")
        self._batches.fork(source, target, n_rows)

    def window_start(self, seq_id: int) -> int:
        if not self.window:
            return 0
        caches, place = self._batches.find(seq_id)
        held = min(c.n_held(place) for c, s in zip(caches, self._slides, strict=True) if s)
        return self.n_rows(seq_id) - held

    def truncate(self, seq_id: int, n_rows: int) -> None:
        held = self.n_rows(seq_id)
        if 0 < held <= n_rows:
            return
        if not self.can_truncate(seq_id, n_rows):
            raise EngineFault(f"sequence {seq_id} cannot be cut to {n_rows} rows: no window there")
        if n_rows:
            for cache in self._batches.alone(seq_id):
                cache.trim(held - n_rows)
        else:
            self._batches.empty(seq_id)
        self.kv_bytes = self._batches.nbytes

    def n_rows(self, seq_id: int) -> int:
        return self._batches.n_rows(seq_id)

    def close(self) -> None:
        self._network.close()
        self._network.close = lambda: None
        self._batches = Batches(self.n_seq_max, self._cells.new)
        mx.clear_cache()
