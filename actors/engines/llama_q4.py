"""The q4 codec's codes <-> rows of ggml's Q4_1, without loss. Knows no llama.cpp library.

Both say x = q * scale + bias with four bits for q. A group of 64 codes becomes two blocks of 32
with equal d and m:

    block_q4_1 (ggml-common.h): f16 d, f16 m, 16 bytes; byte j holds value j (low) and j + 16 (high)

llama.cpp turns keys and values of a quantized cache with a Hadamard matrix, as the codec does: keys
over the largest power of two in the head dim, values over 64. Its matrix (llama-kv-cache.cpp,
ggml_gen_hadamard) is the codec's, and commutes with the change between interleaved and half-split
order, which only permutes the bits of an index. So codes need no arithmetic, at most a permutation
of keys, and that one must stay inside a group. `storage._codec` moves the bits fast; numpy is the
reference and fallback.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from storage.quantizers import dequantize

try:
    from storage import _codec as _fast
except ImportError:  # not compiled: same results, some fifty times slower
    _fast = None  # type: ignore[assignment]

Codes = NDArray[np.uint32]  # (..., D/8), nibbles from the lowest bits on
Halves = NDArray[np.float16]  # (..., D/group)
_BLOCK = 32
_Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", (16,))])
BLOCK_BYTES = _Q4_1.itemsize


def check(dim: int, group: int, *, interleaved: bool) -> None:
    """Raises ValueError for a head dim whose codes do not fit without loss."""
    if dim % 64 or group % _BLOCK or dim % group:
        raise ValueError(f"head dim {dim} in groups of {group}: llama.cpp rotates multiples of 64")
    if interleaved and dim > group:
        raise ValueError(f"head dim {dim}: interleaved rope takes keys out of groups of {group}")


def codes_to_q4_1(
    codes: Codes, scales: Halves, biases: Halves, *, interleaved: bool = False
) -> NDArray[np.uint8]:
    """(..., D/8), (..., D/group) twice -> (..., D/32 * 20) bytes of Q4_1 blocks.

    interleaved: the keys of an architecture whose rope pairs lie side by side in llama.cpp.
    """
    dim = codes.shape[-1] * 8
    check(dim, dim // scales.shape[-1], interleaved=interleaved)
    if not _fast:
        return to_q4_1_numpy(codes, scales, biases, interleaved)
    raw = np.empty((*codes.shape[:-1], dim // _BLOCK * BLOCK_BYTES), np.uint8)
    whole = np.ascontiguousarray
    _fast.to_q4_1(raw, whole(codes), whole(scales), whole(biases), interleaved)
    return raw


def q4_1_to_codes(
    raw: NDArray[np.uint8], group: int, *, interleaved: bool = False
) -> tuple[Codes, Halves, Halves]:
    """Inverse of codes_to_q4_1. Raises ValueError for blocks of one group that differ in d or m:
    rows that llama.cpp has quantized itself go into groups of 32 only."""
    dim = raw.shape[-1] // BLOCK_BYTES * _BLOCK
    check(dim, group, interleaved=interleaved)
    codes, d, m = _unpack(raw, interleaved)
    sides = []
    for name, blocks in (("d", d), ("m", m)):
        side = blocks.reshape(*raw.shape[:-1], dim // group, group // _BLOCK)
        if (side.view(np.uint16) != side[..., :1].view(np.uint16)).any():
            raise ValueError(f"blocks of one group of {group} differ in {name}")
        sides.append(side[..., 0].copy())
    return codes, sides[0], sides[1]


def q4_1_to_f16(raw: NDArray[np.uint8], rotation: int) -> NDArray[np.float16]:
    """(..., D/32 * 20) bytes -> (..., D), turned back by Hadamard matrices of length `rotation`;
    rope pairs stay where llama.cpp has them."""
    return dequantize(
        _unpack(raw, interleaved=False), raw.shape[-1] // BLOCK_BYTES * _BLOCK, 4, rotation
    )


def _unpack(raw: NDArray[np.uint8], interleaved: bool) -> tuple[Codes, Halves, Halves]:
    """codes (..., D/8), and d and m of each block (..., D/32)."""
    if not _fast:
        return from_q4_1_numpy(raw, interleaved)
    lead, n_blocks = raw.shape[:-1], raw.shape[-1] // BLOCK_BYTES
    codes = np.empty((*lead, 4 * n_blocks), np.uint32)
    d, m = np.empty((*lead, n_blocks), np.float16), np.empty((*lead, n_blocks), np.float16)
    _fast.from_q4_1(np.ascontiguousarray(raw), codes, d, m, interleaved)
    return codes, d, m


def to_q4_1_numpy(
    codes: Codes, scales: Halves, biases: Halves, interleaved: bool
) -> NDArray[np.uint8]:
    """The reference of codes_to_q4_1."""
    lead, dim = codes.shape[:-1], codes.shape[-1] * 8
    q = (codes[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)).astype(np.uint8) & 15
    if interleaved:
        q = q.reshape(*lead, 2, dim // 2).swapaxes(-1, -2)
    q = q.reshape(*lead, dim // _BLOCK, 2, 16)
    blocks = np.empty((*lead, dim // _BLOCK), _Q4_1)
    blocks["qs"] = q[..., 0, :] | q[..., 1, :] << 4
    repeats = dim // _BLOCK // scales.shape[-1]
    blocks["d"] = np.repeat(scales, repeats, axis=-1)
    blocks["m"] = np.repeat(biases, repeats, axis=-1)
    return blocks.view(np.uint8).reshape(*lead, dim // _BLOCK * BLOCK_BYTES)


def from_q4_1_numpy(raw: NDArray[np.uint8], interleaved: bool) -> tuple[Codes, Halves, Halves]:
    """The reference of the way back: d and m of each block are (..., D/32)."""
    lead, dim = raw.shape[:-1], raw.shape[-1] // BLOCK_BYTES * _BLOCK
    blocks = np.ascontiguousarray(raw).view(_Q4_1)
    q = np.stack([blocks["qs"] & 15, blocks["qs"] >> 4], axis=-2).reshape(*lead, dim)
    if interleaved:
        q = q.reshape(*lead, dim // 2, 2).swapaxes(-1, -2).reshape(*lead, dim)
    words = q.reshape(*lead, dim // 8, 8).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)
    return words.sum(axis=-1, dtype=np.uint32), blocks["d"].copy(), blocks["m"].copy()
