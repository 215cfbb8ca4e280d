"""Rows in the engine-neutral form <-> cells as llama.cpp holds them.

llama.cpp keeps full and latent layers in one cache and sliding ones in another, each in model
order; the neutral form stacks layers of one geometry. Keys change their order of rope dims here.
Cells of q4_1 also take the q4 codec's tensors as they are (llama_q4), for models where nothing is
lost: full layers of one head dim, a multiple of 64, and a rope whose pairs stay inside a group.
Cells of q8_0 and q4_0 take float16 rows and quantize them (llama_quant).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actors.engines import llama_q4, llama_quant
from actors.engines.llama_spec import Rope
from actors.engines.llama_state import (
    CELL_TYPES,
    F16,
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

_LOSS = 0.01  # of rows that are quantized a second time, in their norm
_GROUP = 64  # the q4 codec's, of every dim that passes _check_lossless


class Layout:
    """How one model's caches are laid out; `sliding` is empty for models without such layers."""

    def __init__(
        self, spec: ModelCacheSpec, rope: Rope, kv_type: str, *, v_trans: bool = False
    ) -> None:
        """v_trans: without flash attention. Raises ModelUnavailable for cells that cannot hold the
        model's rows, and for a model whose codes would lose in q4_1."""
        self._groups, self._rope = spec.groups, rope
        self.type = CELL_TYPES[kv_type]
        self.codec = get_codec("q4") if self.type is Q4_1 else None  # whose tensors it takes
        if self.type is not F16:
            _check_blocks(spec, self.type)
        if self.codec:
            _check_lossless(spec, rope)
        self.full: Cache = _stacks(spec.groups, "full", self.type, v_trans)
        self.sliding: Cache = _stacks(spec.groups, "sliding", self.type, v_trans)

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
        if not n or not dim:
            return np.empty((*shape, dim), np.float16)
        if self.type is F16:
            return side.reshape(*shape, dim)
        blocks = np.ascontiguousarray(side).view(np.uint8).reshape(*shape, -1)
        if self.codec:
            return llama_q4.q4_1_to_f16(blocks, self.codec.describe(name, dim)["hadamard"])
        return llama_quant.to_f16(blocks, self.type, llama_quant.rotation(name, g))

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
            kv.append((self._side("k", k, g), self._side("v", v, g)))
        return Cells(stop - kv[0][0].shape[1], tuple(kv))

    def _side(self, name: SideName, x: NDArray[np.float16], g: LayerGroup) -> Side:
        """Inverse of _floats, for rows that are quantized here or not at all."""
        if self.type is not F16:
            raw = llama_quant.to_cells(x, self.type, llama_quant.rotation(name, g))
            return raw.reshape(*x.shape[:2], raw.shape[2] * raw.shape[3]).view(self.type.dtype)
        return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3])

    def same(self, a: KVRows, b: KVRows) -> bool:
        """Whether b is what these cells give back of rows a that they gave before."""
        sides = [(x, y) for g, h in zip(a, b, strict=True) for x, y in ((g.k, h.k), (g.v, h.v))]
        if self.type is F16:
            return all(np.array_equal(x, y) for x, y in sides)
        return all(_distance(x, y) <= _LOSS for x, y in sides)

    def bytes(self, full_cells: int, sliding_cells: int) -> int:
        """What the two caches take."""
        pairs = ((self.full, full_cells), (self.sliding, sliding_cells))
        # llama-kv-cache.cpp: transposed V is padded to the largest layer's
        widest = max(stack.v.row_bytes for cache, _ in pairs for stack in cache)

        def row_bytes(stack: Stack) -> int:
            padded = stack.v_trans and stack.v_row
            return stack.k.row_bytes + (widest if padded else stack.v.row_bytes)

        return sum(
            cells * len(stack.places) * row_bytes(stack)
            for cache, cells in pairs
            for stack in cache
        )


def _distance(a: NDArray[np.float16], b: NDArray[np.float16]) -> float:
    """Of b to a, as a share of a's norm."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    return float(np.linalg.norm(x - y) / max(float(np.linalg.norm(x)), 1e-9))


def _check_blocks(spec: ModelCacheSpec, cell_type: CellType) -> None:
    def refuse(reason: str) -> ModelUnavailable:
        return ModelUnavailable(
            f"kv_type = {cell_type.name}: {spec.architecture} has {reason}; use f16"
        )

    sides = {(layer.key_dim, layer.value_dim) for layer in spec.layers}
    if len(sides) > 1:  # then llama.cpp rotates some caches and others not
        raise refuse(f"layers of different head dims {sorted(sides)}")
    for dim in sides.pop():
        if dim % cell_type.values:
            raise refuse(f"a head dim of {dim}, no multiple of {cell_type.values}")


def _check_lossless(spec: ModelCacheSpec, rope: Rope) -> None:
    """As llama-kv-cache.cpp decides (0.3.36): rotated are keys and values of multiples of 64, all
    layers' or none, keys over the largest power of two, values over 64. Elsewhere the codec and
    llama.cpp turn rows differently."""

    def refuse(reason: str) -> ModelUnavailable:
        return ModelUnavailable(f"kv_type = q4_1: {spec.architecture} has {reason}; use f16")

    if any(layer.kind != "full" for layer in spec.layers):
        raise refuse("sliding or latent layers")
    key_dim, value_dim = spec.layers[0].key_dim, spec.layers[0].value_dim  # all have these
    try:
        llama_q4.check(key_dim, _GROUP, interleaved=rope.interleaved)
        llama_q4.check(value_dim, _GROUP, interleaved=False)
    except ValueError as error:
        raise refuse(str(error)) from error
    if rope.interleaved and (rope.offset, rope.dims) != (0, key_dim):
        raise refuse(f"interleaved rope over {rope.dims} of {key_dim} dims")


def _stacks(groups: Sequence[LayerGroup], part: Part, cell_type: CellType, v_trans: bool) -> Cache:
    """The cache of one part: its layers in model order, those of a group together."""
    members = [group for group in groups if group.part == part]
    places = {x: i for i, x in enumerate(sorted(x for group in members for x in group.layers))}
    return tuple(
        Stack(
            tuple(places[x] for x in group.layers),
            group.n_kv_heads * group.key_dim,
            group.n_kv_heads * group.value_dim,
            cell_type,
            v_trans,
        )
        for group in members
    )
