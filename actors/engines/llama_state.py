"""llama.cpp's sequence-state bytes <-> K/V arrays. Pure numpy; knows no llama.cpp library.

The bytes of `llama_state_seq_get_data` (llama-kv-cache.cpp, state_write; llama-cpp-python 0.3.36)
for caches with one stream (kv_unified):

    u32 magic, i32 seq_id, then for each cache (one, or full and sliding, llama-kv-cache-iswa.cpp):
    u32 n_stream = 1, u32 cell_count; if there are cells:
    per cell   i32 pos, u32 n_seq_id = 1, i32 seq_id
    u32 v_trans (1: without flash attention), u32 n_layer
    per layer  i32 ggml type, u64 row size, cell_count rows of K
    per layer  i32 ggml type, u64 row size, cell_count rows of V; no V at all for MLA
               v_trans: i32 ggml type, u32 value size, u32 n values, n rows of cell_count values

Rows are of float16, or of quantized blocks that are not looked into here (llama_q4 does).
A sliding cache gives only the cells that the sequence's last token sees.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import EngineFault

MAGIC = 0xAF143CD8
_LAYER = 12  # bytes of a layer's header

Side = NDArray[Any]  # (n_layers, T, blocks of a row), of a CellType's dtype
KV = tuple[Side, Side]


@dataclass(frozen=True)
class CellType:
    """How ggml keeps a row: in blocks of some values."""

    name: str
    number: int  # ggml_type
    dtype: np.dtype[Any]  # of a block
    values: int  # of a block


F16 = CellType("f16", 1, np.dtype("<f2"), 1)
Q4_0 = CellType("q4_0", 2, np.dtype("V18"), 32)
Q4_1 = CellType("q4_1", 3, np.dtype("V20"), 32)
Q8_0 = CellType("q8_0", 8, np.dtype("V34"), 32)
CELL_TYPES = {cell_type.name: cell_type for cell_type in (F16, Q8_0, Q4_1, Q4_0)}


@dataclass(frozen=True)
class Rows:
    """One side, K or V, of the layers of a stack."""

    layers: tuple[int, ...]
    blocks: int  # of a row; 0: the cache does not hold this side
    type: CellType
    transposed: bool = False  # kept value by value, all cells of one after the other

    @property
    def places(self) -> tuple[int, ...]:
        """Of the layers that are held."""
        return self.layers if self.blocks else ()

    @property
    def row_bytes(self) -> int:
        return self.blocks * self.type.dtype.itemsize

    @property
    def head(self) -> bytes:
        if self.transposed:
            return struct.pack("<iII", self.type.number, self.type.dtype.itemsize, self.blocks)
        return struct.pack("<iQ", self.type.number, self.row_bytes)

    def empty(self, n_cells: int) -> Side:
        return np.empty((len(self.layers), n_cells, self.blocks), self.type.dtype)


@dataclass(frozen=True)
class Stack:
    """Layers of one geometry in a cache, which may hold several such stacks."""

    places: tuple[int, ...]  # of the layers, in the cache's own order
    k_row: int  # values of one token
    v_row: int  # 0: the cache holds no V
    type: CellType = F16
    v_trans: bool = False

    @property
    def k(self) -> Rows:
        return Rows(self.places, self.k_row // self.type.values, self.type)

    @property
    def v(self) -> Rows:
        return Rows(self.places, self.v_row // self.type.values, self.type, self.v_trans)


Cache = tuple[Stack, ...]


@dataclass(frozen=True)
class Cells:
    """What one cache holds of a sequence: T positions start, start + 1, …; K and V per stack."""

    start: int  # 0 when T = 0
    kv: tuple[KV, ...]

    @property
    def n_rows(self) -> int:
        return int(self.kv[0][0].shape[1])


def parse(raw: bytes | memoryview, caches: Sequence[Cache]) -> list[Cells]:
    """The cells of each cache, in order of position. Raises EngineFault on any other content.

    Arrays of a stack whose layers lie at equal distances are views of `raw`.
    """
    try:
        magic, _ = struct.unpack_from("<Ii", raw)
        if magic != MAGIC:
            raise EngineFault(f"state with magic {magic:#x}")
        found, offset = [], 8
        for cache in caches:
            cells, offset = _cells(raw, offset, cache)
            found.append(cells)
    except (struct.error, ValueError) as error:
        raise EngineFault(f"state of {len(raw)} bytes ends too early: {error}") from error
    if offset != len(raw):
        raise EngineFault(f"state has {len(raw) - offset} bytes more than its cells")
    return found


def _cells(raw: bytes | memoryview, offset: int, cache: Cache) -> tuple[Cells, int]:
    n_stream, n_cells = struct.unpack_from("<II", raw, offset)
    if n_stream != 1:
        raise EngineFault(f"state of {n_stream} streams")
    offset += 8
    if not n_cells:
        return Cells(0, tuple((s.k.empty(0), s.v.empty(0)) for s in cache)), offset
    positions = np.frombuffer(raw, "<i4", 3 * n_cells, offset).reshape(n_cells, 3)[:, 0]
    offset += 12 * n_cells
    v_trans, n_layers = struct.unpack_from("<II", raw, offset)
    if v_trans != cache[0].v_trans:
        raise EngineFault(f"state with v_trans = {v_trans}: flash attention is not as asked for")
    if n_layers != sum(len(s.places) for s in cache):
        raise EngineFault(f"state has {n_layers} layers: not those of the spec")
    k, offset = _sides(raw, offset + 8, n_cells, [s.k for s in cache])
    v, offset = _sides(raw, offset, n_cells, [s.v for s in cache])
    order = np.argsort(positions, kind="stable")
    start = int(positions[order[0]])
    if not np.array_equal(positions[order], np.arange(start, start + n_cells)):
        raise EngineFault(f"state does not hold {n_cells} positions from {start} on")
    if not np.array_equal(order, np.arange(n_cells)):  # cells come in the order of their place
        k, v = [x[:, order] for x in k], [x[:, order] for x in v]
    return Cells(start, tuple(zip(k, v, strict=True))), offset


def _sides(
    raw: bytes | memoryview, offset: int, n_cells: int, sides: Sequence[Rows]
) -> tuple[list[Side], int]:
    """K or V of every stack, and where they end."""
    offsets, end = _offsets(offset, n_cells, sides)
    if end > len(raw):
        raise EngineFault(f"state ends {end - len(raw)} bytes too early")
    found = []
    for side in sides:
        dtype, at = side.type.dtype, [offsets[place] for place in side.places]
        shape, strides = (len(at), n_cells, side.blocks), set(np.diff(at).tolist())
        if not at:
            found.append(side.empty(n_cells))
            continue
        if len(strides) <= 1:
            stride = strides.pop() if strides else 0
            heads = np.ndarray((len(at), _LAYER), "u1", raw, at[0], (stride, 1))
            inner = (stride, side.row_bytes, dtype.itemsize)
            if side.transposed:
                inner = (stride, dtype.itemsize, n_cells * dtype.itemsize)
            rows = np.ndarray(shape, dtype, raw, at[0] + _LAYER, inner)
        else:  # layers of different geometries take turns
            heads = np.stack([np.frombuffer(raw, "u1", _LAYER, o) for o in at])
            flat = [np.frombuffer(raw, dtype, n_cells * side.blocks, o + _LAYER) for o in at]
            rows = np.stack(flat)
            if side.transposed:
                rows = rows.reshape(len(at), side.blocks, n_cells).swapaxes(1, 2)
            rows = rows.reshape(shape)
        if (heads != np.frombuffer(side.head, "u1")).any():
            kind = f"{side.type.name} rows of {side.blocks * side.type.values} values"
            raise EngineFault(f"state with other layers than {kind}")
        found.append(rows)
    return found, end


def _offsets(offset: int, n_cells: int, sides: Sequence[Rows]) -> tuple[dict[int, int], int]:
    """Where each place's header is, and where the last place's rows end."""
    offsets = {}
    for place, size in sorted((place, side.row_bytes) for side in sides for place in side.places):
        offsets[place] = offset
        offset += _LAYER + n_cells * size
    return offsets, offset


def build(
    seq_id: int, caches: Sequence[tuple[Cache, Cells]], buffer: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """State bytes that put the cells of each cache into a sequence; in `buffer` if they fit."""
    heads, size = [], 8
    for cache, cells in caches:
        n = cells.n_rows
        head = struct.pack("<II", 1, n)
        if n:
            meta = np.empty((n, 3), "<i4")
            meta[:, 0] = np.arange(cells.start, cells.start + n)
            meta[:, 1], meta[:, 2] = 1, seq_id
            head += meta.tobytes() + struct.pack(
                "<II", cache[0].v_trans, sum(len(s.places) for s in cache)
            )
            sides = (side for s in cache for side in (s.k, s.v))
            size += sum(len(side.places) * (_LAYER + n * side.row_bytes) for side in sides)
        heads.append(head)
        size += len(head)
    fits = buffer is not None and buffer.size >= size
    raw = buffer[:size] if buffer is not None and fits else np.empty(size, np.uint8)
    raw[:8] = np.frombuffer(struct.pack("<Ii", MAGIC, seq_id), np.uint8)
    offset = 8
    for head, (cache, cells) in zip(heads, caches, strict=True):
        raw[offset : offset + len(head)] = np.frombuffer(head, np.uint8)
        offset += len(head)
        if cells.n_rows:
            k, v = zip(*cells.kv, strict=True)
            offset = _put(raw, offset, [s.k for s in cache], k)
            offset = _put(raw, offset, [s.v for s in cache], v)
    return raw


def _put(raw: NDArray[np.uint8], offset: int, sides: Sequence[Rows], held: Sequence[Side]) -> int:
    offsets, end = _offsets(offset, held[0].shape[1], sides)
    for side, layers in zip(sides, held, strict=True):
        for place, rows in zip(side.places, layers, strict=False):
            at = offsets[place] + _LAYER
            raw[at - _LAYER : at] = np.frombuffer(side.head, np.uint8)
            out = raw[at : at + rows.nbytes].view(side.type.dtype)
            turned = rows.T if side.transposed else rows
            np.copyto(out.reshape(turned.shape), turned)
    return end


def to_half_split(k: Side, rope_dims: int, offset: int = 0) -> Side:
    """Interleaved rope pairs (x0 y0 x1 y1 …) -> halves (x0 x1 … y0 y1 …), on the last axis; only
    the `rope_dims` dims from the even `offset` on are turned by rope.

    A pair is read as one uint32 word, x in its low half: several times faster than strided copies.
    """
    out, half, end = np.empty(k.shape, "<f2"), offset + rope_dims // 2, offset + rope_dims
    pairs, halves = k[..., offset:end].view("<u4"), out.view("<u2")
    np.copyto(halves[..., offset:half], pairs, casting="unsafe")
    np.copyto(halves[..., half:end], pairs >> np.uint32(16), casting="unsafe")
    out[..., :offset], out[..., end:] = k[..., :offset], k[..., end:]
    return out


def to_interleaved(k: Side, rope_dims: int, offset: int = 0) -> Side:
    """Inverse of to_half_split."""
    out, half, end = np.empty(k.shape, "<f2"), offset + rope_dims // 2, offset + rope_dims
    pairs, halves = out[..., offset:end].view("<u4"), k.view("<u2")
    np.copyto(pairs, halves[..., half:end])
    pairs <<= np.uint32(16)
    pairs |= halves[..., offset:half]
    out[..., :offset], out[..., end:] = k[..., :offset], k[..., end:]
    return out
