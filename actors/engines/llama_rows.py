"""Rows in the engine-neutral form <-> cells as llama.cpp holds them.

llama.cpp keeps full and latent layers in one cache and sliding ones in another, each in model
order; the neutral form stacks layers of one geometry. Keys change their order of rope dims here.
Cells of q4_1 also take the q4 codec's tensors as they are (llama_q4), for models where nothing is
lost: full layers of one head dim, a multiple of 64, and a rope whose pairs stay inside a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actors.engines import llama_q4
from actors.engines.llama_spec import Rope
from actors.engines.llama_state import (
    CELL_TYPES,
    KV,
    Q4_1,
    Cache,
    Cells,
    CellType,
    Side,
    Stack,
    to_half_split,
    to_interleaved,
)
from actors.errors import EngineFault, ModelUnavailable
from storage.codec import Side as SideName
from storage.codec import Tensors, get_codec
from storage.spec import GroupRows, KVRows, LayerGroup, ModelCacheSpec, Part

_GROUP = 64  # the q4 codec's, of every dim that passes _check_lossless


class Layout:
    """How one model's caches are laid out; `sliding` is empty for models without such layers."""

    def __init__(self, spec: ModelCacheSpec, rope: Rope, kv_type: str) -> None:
        """kv_type: "f16" or "q4_1". Raises ModelUnavailable for a model whose codes would lose."""
        self._groups, self._rope = spec.groups, rope
        self.type = CELL_TYPES[kv_type]
        self.codec = get_codec("q4") if self.type is Q4_1 else None  # whose tensors it takes
        if self.codec:
            _check_lossless(spec, rope)
        self.full: Cache = _stacks(spec.groups, "full", self.type)
        self.sliding: Cache = _stacks(spec.groups, "sliding", self.type)

    def rows(self, part: Part, cells: Cells | None) -> KVRows:
        """A copy of the cells as the rows of one part; the other part's groups have T = 0."""
        sides = iter(cells.kv if cells else ())
        none = np.empty(0, np.float16)
        rows = []
        for g in self._groups:
            k, v = next(sides, (none, none)) if g.part == part else (none, none)
            k, v = self._floats("k", k, g, g.key_dim), self._floats("v", v, g, g.value_dim)
            if self._rope.interleaved:
                k = to_half_split(k, self._rope.dims, self._rope.offset)
            else:
                k = k.copy()
            rows.append(GroupRows(k, v.copy()))
        return tuple(rows)

    def _floats(self, name: SideName, side: Side, g: LayerGroup, dim: int) -> NDArray[np.float16]:
        """Rows of one side as (n_layers, T, n_kv_heads, dim), rope pairs in llama.cpp's order."""
        n = side.shape[1] if side.ndim > 1 else 0
        shape = (len(g.layers), n, g.n_kv_heads)
        if self.codec is None or not n:
            return side.reshape(*shape, dim)
        blocks = np.ascontiguousarray(side).view(np.uint8).reshape(*shape, -1)
        return llama_q4.q4_1_to_f16(blocks, self.codec.describe(name, dim)["hadamard"])

    def encoded_cells(self, tensors: Tensors, stop: int) -> Cells:
        """The codec's tensors of rows that end before position `stop`, as cells."""
        kv = [(self._blocks("k", tensors, g), self._blocks("v", tensors, g)) for g in self._groups]
        if len({side.shape[1] for sides in kv for side in sides}) > 1:
            raise EngineFault("encoded rows of different lengths")
        return Cells(stop - kv[0][0].shape[1], tuple(kv))

    def _blocks(self, name: SideName, tensors: Tensors, g: LayerGroup) -> Side:
        fields = (tensors[f"{g.name}.{name}.{field}"] for field in ("codes", "scales", "biases"))
        raw = llama_q4.codes_to_q4_1(*fields, interleaved=self._turned(name))
        return raw.reshape(*raw.shape[:2], raw.shape[2] * raw.shape[3]).view(self.type.dtype)

    def encoded(self, cells: Cells) -> Tensors:
        """Inverse of encoded_cells. Raises ValueError for rows that the engine has computed."""
        tensors: Tensors = {}
        sides: tuple[SideName, SideName] = ("k", "v")
        for g, kv in zip(self._groups, cells.kv, strict=True):
            for name, side in zip(sides, kv, strict=True):
                raw = np.ascontiguousarray(side).view(np.uint8)
                raw = raw.reshape(*raw.shape[:2], g.n_kv_heads, -1)
                found = llama_q4.q4_1_to_codes(raw, _GROUP, interleaved=self._turned(name))
                names = [f"{g.name}.{name}.{field}" for field in ("codes", "scales", "biases")]
                tensors |= dict(zip(names, found, strict=True))
        return tensors

    def _turned(self, name: SideName) -> bool:
        return name == "k" and self._rope.interleaved

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

    def bytes(self, full_cells: int, sliding_cells: int) -> int:
        """What the two caches take."""
        pairs = ((self.full, full_cells), (self.sliding, sliding_cells))
        return sum(
            cells * len(stack.places) * (stack.k.row_bytes + stack.v.row_bytes)
            for cache, cells in pairs
            for stack in cache
        )


def _check_lossless(spec: ModelCacheSpec, rope: Rope) -> None:
    """As llama-kv-cache.cpp decides (0.3.36): rotated are keys and values of multiples of 64, all
    layers' or none, keys over the largest power of two, values over 64. Elsewhere the codec and
    llama.cpp turn rows differently."""

    def refuse(reason: str) -> ModelUnavailable:
        return ModelUnavailable(f"kv_type = q4_1: {spec.architecture} has {reason}; use f16")

    if any(layer.kind != "full" for layer in spec.layers):
        raise refuse("sliding or latent layers")
    dims = {(layer.key_dim, layer.value_dim) for layer in spec.layers}
    if len(dims) > 1:
        raise refuse(f"layers of different head dims {sorted(dims)}")
    key_dim, value_dim = dims.pop()
    try:
        llama_q4.check(key_dim, _GROUP, interleaved=rope.interleaved)
        llama_q4.check(value_dim, _GROUP, interleaved=False)
    except ValueError as error:
        raise refuse(str(error)) from error
    if rope.interleaved and (rope.offset, rope.dims) != (0, key_dim):
        raise refuse(f"interleaved rope over {rope.dims} of {key_dim} dims")


def _stacks(groups: Sequence[LayerGroup], part: Part, cell_type: CellType) -> Cache:
    """The cache of one part: its layers in model order, those of a group together."""
    members = [group for group in groups if group.part == part]
    places = {x: i for i, x in enumerate(sorted(x for group in members for x in group.layers))}
    return tuple(
        Stack(
            tuple(places[x] for x in group.layers),
            group.n_kv_heads * group.key_dim,
            group.n_kv_heads * group.value_dim,
            cell_type,
        )
        for group in members
    )
