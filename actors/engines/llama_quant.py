"""float16 rows <-> cells of ggml's quantized types, by ggml's own functions. Loses what the type
loses; rows that come out of such cells and go in again keep their codes, but for rare ties.

llama.cpp keeps rows of quantized caches turned by Hadamard matrices (llama-kv-cache.cpp, 0.3.36):
keys over the largest power of two in the head dim, values over 64, where the head dim is a multiple
of 64; never those of MLA, whose graph leaves the turning out. The state bytes do not say so.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from actors.engines.llama_state import CellType
from storage.codec import Side as SideName
from storage.spec import LayerGroup

_MAX_HALF = np.float32(65504)


def rotation(name: SideName, group: LayerGroup) -> int:
    """Length of the matrices that turn one side of the group's rows; 1: it is not turned."""
    dim = group.key_dim if name == "k" else group.value_dim
    if not group.value_dim or dim % 64:  # no values: MLA
        return 1
    return dim & -dim if name == "k" else 64


def to_cells(x: NDArray[np.float16], cell_type: CellType, block: int) -> NDArray[np.uint8]:
    """(..., D), rope pairs in llama.cpp's order -> (..., bytes of D values)."""
    turned = _turn(x.astype(np.float32), block)
    size = cell_type.dtype.itemsize
    raw = np.empty((*x.shape[:-1], x.shape[-1] // cell_type.values * size), np.uint8)
    if x.size:
        n_rows = x.size // x.shape[-1]
        _ggml().ggml_quantize_chunk(
            cell_type.number, turned.ctypes.data, raw.ctypes.data, 0, n_rows, x.shape[-1], None
        )
    return raw


def to_f16(raw: NDArray[np.uint8], cell_type: CellType, block: int) -> NDArray[np.float16]:
    """Inverse of to_cells."""
    raw = np.ascontiguousarray(raw)
    dim = raw.shape[-1] // cell_type.dtype.itemsize * cell_type.values
    x = np.empty((*raw.shape[:-1], dim), np.float32)
    if x.size:
        decode = getattr(_ggml(), f"dequantize_row_{cell_type.name}")
        decode(raw.ctypes.data, x.ctypes.data, x.size)
    return np.clip(_turn(x, block), -_MAX_HALF, _MAX_HALF).astype(np.float16)


def _turn(x: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Every run of `block` values of the last axis times the orthonormal Hadamard matrix, which is
    its own inverse; contiguous."""
    if block == 1:
        return np.ascontiguousarray(x)
    return (x.reshape(-1, block) @ _hadamard(block)).reshape(x.shape)


@cache
def _hadamard(block: int) -> NDArray[np.float32]:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix * np.float32(block**-0.5)


@cache
def _ggml() -> ctypes.CDLL:
    """libggml-base, which libllama has loaded."""
    from llama_cpp._ctypes_extensions import load_shared_library

    library: ctypes.CDLL = load_shared_library("ggml-base", Path(llama.__file__).parent / "lib")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, pointer, pointer, number, number, number, pointer,
    )  # fmt: skip
    for name in ("q8_0", "q4_0"):
        decode = getattr(library, f"dequantize_row_{name}")
        decode.restype, decode.argtypes = None, (pointer, pointer, number)
    return library
