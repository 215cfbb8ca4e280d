"""The Engine on Hugging Face transformers: what the others are compared with.

Small and slow on purpose. A sequence is its rows, in the stored form, in numpy; for a step they are
put into a transformers DynamicCache, whose sliding layers keep the window alone, and the model runs
over it in float32, one sequence after another, as transformers has written it (hf_models loads it).
Used by tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from actors.engines import hf_models
from actors.engines.base import Chunk, Engine, Logits, count_rows
from actors.engines.mlx_gguf_spec import describe
from actors.errors import EngineFault, ModelUnavailable
from storage.codec import Tensors
from storage.spec import GroupRows, KVRows, Part

_N_BATCH = 512


class HfEngine(Engine):
    """n_seq_max sequences of n_cells tokens in all; see Engine for the calls.

    Raises ModelUnavailable for a model that transformers would not compute as llama.cpp does.
    """

    name = "hf"
    device = "cpu"
    loads_encoded = ""
    exports_encoded = ""

    def __init__(self, path: Path, *, n_seq_max: int, n_ctx: int, n_cells: int) -> None:
        """`path`: a GGUF. n_ctx: tokens per sequence, at most the model's."""
        described = describe(path)
        self.key, self.vocab, self._close = described.key, described.vocab, described.close
        self._spec = self.key.spec
        try:
            self._model = hf_models.load(path, self.key)
        except ModelUnavailable:
            self._close()
            raise
        self.window = self._spec.window
        self.n_seq_max, self.n_cells, self.n_batch = n_seq_max, n_cells, _N_BATCH
        self.n_ctx = min(n_ctx, described.n_ctx, n_cells)
        self.kv_bytes = n_cells * self._spec.f16_row_bytes
        self._rows = [self._none() for _ in range(n_seq_max)]

    def _none(self) -> KVRows:
        return tuple(
            GroupRows(
                np.zeros((len(g.layers), 0, g.n_kv_heads, g.key_dim), np.float16),
                np.zeros((len(g.layers), 0, g.n_kv_heads, g.value_dim), np.float16),
            )
            for g in self._spec.groups
        )

    # ---- computing

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        n = sum(len(chunk.token_ids) for chunk in chunks)
        if n > self.n_batch + self.n_seq_max:
            raise EngineFault(f"a step of {n} tokens, a batch holds {self.n_batch}")
        self._check_cells(n)
        for chunk in chunks:
            if chunk.start != self.n_rows(chunk.seq_id):
                raise EngineFault(f"position {chunk.start} after {self.n_rows(chunk.seq_id)} rows")
            self._check_window(chunk.seq_id)
        return {c.seq_id: x for c in chunks if (x := self._compute(c)) is not None}

    def _compute(self, chunk: Chunk) -> Logits | None:
        cache = self._cache(chunk.seq_id)
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([list(chunk.token_ids)]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=max(1, chunk.n_logits),
            )
            self._rows[chunk.seq_id] = self._read(cache)
        if not chunk.n_logits:
            return None
        logits: Logits = out.logits[0].float().numpy()
        return logits

    def generate(self, seq_id: int, token_ids: Sequence[int], n_tokens: int) -> list[int]:
        """transformers' own greedy generation after all of `token_ids`, the first of which the
        sequence holds, one or more it does not. The sequence is left as it is."""
        self._check_window(seq_id)
        held = self.n_rows(seq_id)
        if not held < len(token_ids):
            raise EngineFault(f"{len(token_ids)} tokens, {held} of them held: none to compute")
        ids = torch.tensor([list(token_ids)])
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache(seq_id),
            do_sample=False,
            max_new_tokens=n_tokens,
            eos_token_id=None,
        )
        return [int(x) for x in out[0, len(token_ids) :]]

    def _cache(self, seq_id: int) -> Any:
        cache: Any = DynamicCache(config=self._model.config)
        if not self.n_rows(seq_id):
            return cache
        for group, rows in zip(self._spec.groups, self._rows[seq_id], strict=True):
            for place, layer in enumerate(group.layers):
                cache.update(_states(rows.k[place]), _states(rows.v[place]), layer)
                if group.part == "sliding":
                    cache.layers[layer].cumulative_length = self.n_rows(seq_id)
        return cache

    def _read(self, cache: Any) -> KVRows:
        """All rows that a cache holds, rounded to float16."""

        def stacked(layers: Sequence[int], name: str) -> Any:
            held = [getattr(cache.layers[layer], name)[0].transpose(0, 1) for layer in layers]
            return torch.stack(held).half().numpy()

        return tuple(
            GroupRows(stacked(g.layers, "keys"), stacked(g.layers, "values"))
            for g in self._spec.groups
        )

    # ---- rows

    def export(self, seq_id: int, start: int, stop: int) -> KVRows:
        self._check_range(seq_id, start, stop)
        return self._slice(seq_id, start, stop, "full")

    def export_window(self, seq_id: int, start: int, stop: int) -> KVRows:
        self._check_range(seq_id, start, stop)
        first = max(start, self.window_start(seq_id), stop - self.window)
        return self._slice(seq_id, min(first, stop), stop, "sliding")

    def _slice(self, seq_id: int, start: int, stop: int, part: Part) -> KVRows:
        found, n_rows = [], self.n_rows(seq_id)
        for group, rows in zip(self._spec.groups, self._rows[seq_id], strict=True):
            first = n_rows - rows.k.shape[1]  # position of the first row that is held
            a, b = (start - first, stop - first) if group.part == part else (0, 0)
            found.append(GroupRows(rows.k[:, a:b].copy(), rows.v[:, a:b].copy()))
        return tuple(found)

    def export_encoded(self, seq_id: int, start: int, stop: int) -> Tensors:
        raise EngineFault("float16 rows are in no codec's codes")

    def load_encoded(self, seq_id: int, start: int, tensors: Tensors) -> None:
        raise EngineFault("float16 rows take no encoded ones")

    def load(self, seq_id: int, start: int, rows: KVRows) -> None:
        if start != self.n_rows(seq_id):
            raise EngineFault(f"load at {start} after {self.n_rows(seq_id)} rows")
        n_rows = count_rows(rows)
        if not n_rows:
            raise EngineFault("a load of no rows")
        self._check_cells(n_rows)
        found = []
        for group, old, new in zip(self._spec.groups, self._rows[seq_id], rows, strict=True):
            for x, y in ((old.k, new.k), (old.v, new.v)):
                if (x.shape[0], x.shape[2:]) != (y.shape[0], y.shape[2:]):
                    raise EngineFault(f"rows of shape {y.shape} for group {group.name}")
            short = new.k.shape[1] < n_rows
            if short and group.part == "full":
                raise EngineFault(f"{new.k.shape[1]} of {n_rows} rows of group {group.name}")
            first = old.k.shape[1] if short else 0  # rows before a gap are no window
            found.append(
                GroupRows(
                    np.concatenate([old.k[:, first:], new.k], axis=1),
                    np.concatenate([old.v[:, first:], new.v], axis=1),
                )
            )
        self._rows[seq_id] = self._windowed(tuple(found))

    def _windowed(self, rows: KVRows) -> KVRows:
        """Sliding groups cut to the rows that the next token sees."""
        keep = self.window - 1
        return tuple(
            GroupRows(x.k[:, -keep:], x.v[:, -keep:]) if g.part == "sliding" else x
            for g, x in zip(self._spec.groups, rows, strict=True)
        )

    # ---- sequences

    def fork(self, source: int, target: int, n_rows: int) -> None:
        if self.n_rows(target):
            raise EngineFault(f"fork into sequence {target}, which is not empty")
        if not self.can_truncate(source, n_rows):
            raise EngineFault(f"sequence {source} cannot be forked at {n_rows}: no window there")
        self._check_cells(n_rows)
        self._rows[target] = self._cut(source, n_rows)

    def window_start(self, seq_id: int) -> int:
        if not self.window:
            return 0
        groups = zip(self._spec.groups, self._rows[seq_id], strict=True)
        held = min(int(rows.k.shape[1]) for group, rows in groups if group.part == "sliding")
        return self.n_rows(seq_id) - held

    def truncate(self, seq_id: int, n_rows: int) -> None:
        if n_rows >= self.n_rows(seq_id) > 0:
            return
        if not self.can_truncate(seq_id, n_rows):
            raise EngineFault(f"sequence {seq_id} cannot be cut to {n_rows} rows: no window there")
        self._rows[seq_id] = self._cut(seq_id, n_rows)

    def _cut(self, seq_id: int, n_rows: int) -> KVRows:
        dropped = self.n_rows(seq_id) - n_rows
        return tuple(
            GroupRows(x.k[:, :stop], x.v[:, :stop])
            for x in self._rows[seq_id]
            for stop in [max(0, x.k.shape[1] - dropped)]
        )

    def n_rows(self, seq_id: int) -> int:
        return count_rows(self._rows[seq_id])

    def close(self) -> None:
        self._close()
        self._close = lambda: None
        self._rows = [self._none() for _ in self._rows]
        self._model = None

    # ---- what is refused

    def _check_range(self, seq_id: int, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.n_rows(seq_id):
            raise EngineFault(f"rows {start}..{stop} of {self.n_rows(seq_id)}")

    def _check_cells(self, n: int) -> None:
        used = sum(map(self.n_rows, range(self.n_seq_max)))
        if used + n > self.n_cells:
            raise EngineFault(f"{n} more rows than the {used} in {self.n_cells} cells")

    def _check_window(self, seq_id: int) -> None:
        held = self.n_rows(seq_id)
        if not self.can_truncate(seq_id, held):
            first = self.window_start(seq_id)
            raise EngineFault(
                f"position {held} needs sliding rows that are not there, from {first}"
            )


def _states(rows: Any) -> Any:
    """(T, heads, D) float16 -> (1, heads, T, D) float32."""
    return torch.from_numpy(np.ascontiguousarray(rows)).float().transpose(0, 1)[None]
