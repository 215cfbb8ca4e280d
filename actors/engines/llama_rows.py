"""Rows in the engine-neutral form <-> cells as llama.cpp holds them.

llama.cpp keeps full and latent layers in one cache and sliding ones in another, each in model
order; the neutral form stacks layers of one geometry. Keys change their order of rope dims here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.engines.llama_spec import Rope
from actors.engines.llama_state import KV, Cache, Cells, Stack, to_half_split, to_interleaved
from actors.errors import EngineFault
from storage.spec import GroupRows, KVRows, LayerGroup, ModelCacheSpec, Part


class Layout:
    """How one model's caches are laid out; `sliding` is empty for models without such layers."""

    def __init__(self, spec: ModelCacheSpec, rope: Rope) -> None:
        self._groups, self._rope = spec.groups, rope
        self.full: Cache = _stacks(spec.groups, "full")
        self.sliding: Cache = _stacks(spec.groups, "sliding")

    def rows(self, part: Part, cells: Cells | None) -> KVRows:
        """A copy of the cells as the rows of one part; the other part's groups have T = 0."""
        sides = iter(cells.kv if cells else ())
        none = np.empty(0, np.float16)
        rows = []
        for g in self._groups:
            k, v = next(sides, (none, none)) if g.part == part else (none, none)
            n = k.shape[1] if k.ndim > 1 else 0
            k = k.reshape(len(g.layers), n, g.n_kv_heads, g.key_dim)
            v = v.reshape(len(g.layers), n, g.n_kv_heads, g.value_dim)
            if self._rope.interleaved:
                k = to_half_split(k, self._rope.dims, self._rope.offset)
            else:
                k = k.copy()
            rows.append(GroupRows(k, v.copy()))
        return tuple(rows)

    def cells(self, part: Part, rows: KVRows, stop: int, most: int) -> Cells:
        """The last rows of one part, `most` or fewer, that end before position `stop`."""
        kv: list[KV] = []
        for g, x in zip(self._groups, rows, strict=True):
            if g.part != part:
                continue
            k, v = x.k[:, -most:], x.v[:, -most:]
            if self._rope.interleaved:
                k = to_interleaved(k, self._rope.dims, self._rope.offset)
            n = k.shape[1]
            if k.shape[:2] != v.shape[:2] or (kv and n != kv[0][0].shape[1]):
                raise EngineFault(f"{part} rows of different lengths")
            lead = (len(g.layers), n)
            k = k.reshape(*lead, g.n_kv_heads * g.key_dim)
            kv.append((k, v.reshape(*lead, g.n_kv_heads * g.value_dim)))
        return Cells(stop - kv[0][0].shape[1], tuple(kv))

    def merged(self, full: KVRows, sliding: KVRows) -> KVRows:
        """Rows of both parts, exported apart, as one."""
        pairs = zip(self._groups, full, sliding, strict=True)
        return tuple(y if g.part == "sliding" else x for g, x, y in pairs)

    def bytes(self, full_cells: int, sliding_cells: int) -> int:
        """What the two caches take in float16."""
        cells = {"full": full_cells, "sliding": sliding_cells}
        return sum(
            2 * cells[g.part] * len(g.layers) * g.n_kv_heads * (g.key_dim + g.value_dim)
            for g in self._groups
        )


def _stacks(groups: Sequence[LayerGroup], part: Part) -> Cache:
    """The cache of one part: its layers in model order, those of a group together."""
    members = [group for group in groups if group.part == part]
    places = {x: i for i, x in enumerate(sorted(x for group in members for x in group.layers))}
    return tuple(
        Stack(
            tuple(places[x] for x in group.layers),
            group.n_kv_heads * group.key_dim,
            group.n_kv_heads * group.value_dim,
        )
        for group in members
    )
