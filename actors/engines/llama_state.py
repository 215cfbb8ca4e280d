"""llama.cpp's sequence-state bytes <-> K/V arrays. Pure numpy; knows no llama.cpp library.

The bytes of `llama_state_seq_get_data` (llama-kv-cache.cpp, state_write; llama-cpp-python 0.3.36)
for a cache with one stream (kv_unified) and untransposed V (flash attention):

    u32 magic, i32 seq_id, u32 n_stream = 1, u32 cell_count
    per cell   i32 pos, u32 n_seq_id = 1, i32 seq_id
    u32 v_trans = 0, u32 n_layer
    per layer  i32 ggml type, u64 row size, cell_count rows of K
    per layer  i32 ggml type, u64 row size, cell_count rows of V
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from actors.errors import EngineFault

MAGIC = 0xAF143CD8
_F16 = 1  # ggml_type
_LAYER = 12  # bytes of a layer's header

Side = NDArray[np.float16]  # (n_layers, T, row) float16


def parse(raw: bytes | memoryview, start: int, stop: int) -> tuple[Side, Side]:
    """K and V of positions start..stop in order. Raises EngineFault on any other content."""
    try:
        return _parse(raw, start, stop)
    except (struct.error, ValueError) as error:
        raise EngineFault(f"state of {len(raw)} bytes ends too early: {error}") from error


def _parse(raw: bytes | memoryview, start: int, stop: int) -> tuple[Side, Side]:
    magic, _, n_stream, n_cells = struct.unpack_from("<IiII", raw)
    if magic != MAGIC or n_stream != 1 or n_cells != stop - start:
        raise EngineFault(f"state of {n_cells} cells in {n_stream} streams, magic {magic:#x}")
    cells = np.frombuffer(raw, "<i4", 3 * n_cells, 16).reshape(n_cells, 3)
    offset = 16 + 12 * n_cells
    v_trans, n_layers = struct.unpack_from("<II", raw, offset)
    if v_trans:
        raise EngineFault("state with transposed V: flash attention is off")
    offset += 8
    k, offset = _side(raw, offset, n_layers, n_cells)
    v, offset = _side(raw, offset, n_layers, n_cells)
    if offset != len(raw):
        raise EngineFault(f"state has {len(raw) - offset} bytes more than its cells")
    order = np.argsort(cells[:, 0], kind="stable")
    if not np.array_equal(cells[order, 0], np.arange(start, stop)):
        raise EngineFault(f"state does not hold positions {start} to {stop - 1}")
    if not np.array_equal(order, np.arange(n_cells)):  # cells come in the order of their place
        k, v = k[:, order], v[:, order]
    return k, v


def _side(raw: bytes | memoryview, offset: int, n_layers: int, n_cells: int) -> tuple[Side, int]:
    kind, row = struct.unpack_from("<iQ", raw, offset)
    stride = _LAYER + n_cells * row
    end = offset + n_layers * stride
    if kind != _F16 or end > len(raw):
        raise EngineFault(f"state with ggml type {kind}, row {row}: only f16 can be exported")
    shape, strides = (n_layers, n_cells, row // 2), (stride, row, 2)
    return np.ndarray(shape, "<f2", raw, offset + _LAYER, strides), end


def build(k: Side, v: Side, start: int, seq_id: int) -> NDArray[np.uint8]:
    """State bytes that put rows at positions start, start + 1, … of a sequence."""
    n_layers, n_cells, _ = k.shape
    cells = np.empty((n_cells, 3), "<i4")
    cells[:, 0] = np.arange(start, start + n_cells)
    cells[:, 1], cells[:, 2] = 1, seq_id
    head = struct.pack("<IiII", MAGIC, seq_id, 1, n_cells) + cells.tobytes()
    head += struct.pack("<II", 0, n_layers)
    sizes = [_LAYER + 2 * n_cells * side.shape[2] for side in (k, v)]
    raw = np.empty(len(head) + n_layers * sum(sizes), np.uint8)
    raw[: len(head)] = np.frombuffer(head, np.uint8)
    offset = len(head)
    for side, stride in zip((k, v), sizes, strict=True):
        row = 2 * side.shape[2]
        layers = raw[offset : offset + n_layers * stride].reshape(n_layers, stride)
        layers[:, :_LAYER] = np.frombuffer(struct.pack("<iQ", _F16, row), np.uint8)
        layers[:, _LAYER:] = np.ascontiguousarray(side).view(np.uint8).reshape(n_layers, -1)
        offset += n_layers * stride
    return raw


def to_half_split(k: NDArray[np.float16], rope_dims: int) -> NDArray[np.float16]:
    """Interleaved rope pairs (x0 y0 x1 y1 …) -> halves (x0 x1 … y0 y1 …), on the last axis.

    A pair is read as one uint32 word, x in its low half: several times faster than strided copies.
    """
    out, half = np.empty(k.shape, "<f2"), rope_dims // 2
    pairs, halves = k[..., :rope_dims].view("<u4"), out.view("<u2")
    np.copyto(halves[..., :half], pairs, casting="unsafe")
    np.copyto(halves[..., half:rope_dims], pairs >> np.uint32(16), casting="unsafe")
    out[..., rope_dims:] = k[..., rope_dims:]
    return out


def to_interleaved(k: NDArray[np.float16], rope_dims: int) -> NDArray[np.float16]:
    """Inverse of to_half_split."""
    out, half = np.empty(k.shape, "<f2"), rope_dims // 2
    pairs, halves = out[..., :rope_dims].view("<u4"), k.view("<u2")
    np.copyto(pairs, halves[..., half:rope_dims])
    pairs <<= np.uint32(16)
    pairs |= halves[..., :half]
    out[..., rope_dims:] = k[..., rope_dims:]
    return out
