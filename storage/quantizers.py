"""Quantizers: float16 vectors of one kind (keys, or values) <-> the fields that are stored.

Pure functions on numpy arrays; a vector is one head of one token, and no group reaches across
vectors. The bit layout is MLX's: uint32 words of eight nibbles or four bytes, least significant
first, along the head dim; one float16 scale and bias per group; `x = q * scale + bias`. Vectors may
be rotated over the head dim by a Hadamard matrix before quantization (and after decoding: it is
its own inverse). The C extension `storage._codec` does the same arithmetic fast; numpy is the
reference and fallback. Called by storage.codec; actors.engines.mlx_codec does the same in MLX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

try:
    from storage import _codec as _fast
except ImportError:  # not compiled: same results, some fifty times slower
    _fast = None  # type: ignore[assignment]

Fields = dict[str, NDArray[Any]]  # "codes" -> (..., width)

MAX_DIM = 1024  # of storage/_codec.c
MAX_HALF = np.float32(65504)  # what rotation takes beyond float16 saturates
PIECE_BYTES = 512 * 1024  # of float16: less than that is not worth a thread's attention


class Quantizer(Protocol):
    """One way to store float16 vectors."""

    def fields(self, dim: int) -> dict[str, tuple[np.dtype[Any], int]]:
        """Stored fields of a vector of length `dim`: name -> (dtype, width). Raises ValueError for
        a dim it cannot store."""
        ...

    def describe(self, dim: int) -> dict[str, int]:
        """Parameters a foreign reader needs for vectors of this length; written to the card."""
        ...

    def encode(self, x: NDArray[np.float16], executor: Executor | None = None) -> Fields:
        """(..., dim) float16, finite, -> field -> (..., width)."""
        ...

    def decode(
        self, fields: Mapping[str, NDArray[Any]], dim: int, executor: Executor | None = None
    ) -> NDArray[np.float16]:
        """Inverse of encode, up to quantization: field -> (..., width) to (..., dim) float16;
        finite if the fields are."""
        ...


@dataclass(frozen=True)
class F16:
    """No loss: the float16 values as they are."""

    def fields(self, dim: int) -> dict[str, tuple[np.dtype[Any], int]]:
        return {"data": (np.dtype("<f2"), dim)}

    def describe(self, dim: int) -> dict[str, int]:
        return {}

    def encode(self, x: NDArray[np.float16], executor: Executor | None = None) -> Fields:
        return {"data": np.ascontiguousarray(x)}

    def decode(
        self, fields: Mapping[str, NDArray[Any]], dim: int, executor: Executor | None = None
    ) -> NDArray[np.float16]:
        return fields["data"]


@dataclass(frozen=True)
class Affine:
    """4 or 8 bits per value, and per group a scale and a bias: 4.5 or 8.5 bits at group 64.

    `longest` is the longest block of the Hadamard rotation; 1 leaves vectors as they are.
    """

    bits: Literal[4, 8]
    longest: int

    def fields(self, dim: int) -> dict[str, tuple[np.dtype[Any], int]]:
        groups = dim // self.group(dim)
        return {
            "codes": (np.dtype("<u4"), dim * self.bits // 32),
            "scales": (np.dtype("<f2"), groups),
            "biases": (np.dtype("<f2"), groups),
        }

    def describe(self, dim: int) -> dict[str, int]:
        return {"bits": self.bits, "group": self.group(dim), "hadamard": self.hadamard(dim)}

    @staticmethod
    def group(dim: int) -> int:
        """The largest group length MLX knows (64, 32) that divides the head dim."""
        if dim > MAX_DIM:
            raise ValueError(f"cannot quantize a head dim of {dim}: it is over {MAX_DIM}")
        for group in (64, 32):
            if dim % group == 0:
                return group
        raise ValueError(f"cannot quantize a head dim of {dim}: it is no multiple of 32")

    def hadamard(self, dim: int) -> int:
        """The rotation's block length: the largest power of two that divides the head dim, at most
        `longest`."""
        return min(dim & -dim, self.longest)

    def encode(self, x: NDArray[np.float16], executor: Executor | None = None) -> Fields:
        dim = x.shape[-1]
        group, block = self.group(dim), self.hadamard(dim)
        lead = x.shape[:-1]
        out: Fields = {n: np.empty((*lead, w), dtype) for n, (dtype, w) in self.fields(dim).items()}

        def piece(part: slice) -> None:
            vectors = np.ascontiguousarray(x[part])
            codes, scales, biases = (array[part] for array in out.values())
            if _fast:
                _fast.encode(vectors, codes, scales, biases, self.bits, group, block)
                return
            found = encode_numpy(vectors.reshape(-1, dim), self.bits, group, block)
            for target, array in zip((codes, scales, biases), found, strict=True):
                target[...] = array.reshape(target.shape)

        _over_layers(piece, x.shape, executor)
        return out

    def decode(
        self, fields: Mapping[str, NDArray[Any]], dim: int, executor: Executor | None = None
    ) -> NDArray[np.float16]:
        stored = [fields[name] for name in ("codes", "scales", "biases")]
        return dequantize(stored, dim, self.bits, self.hadamard(dim), executor)


def dequantize(
    fields: Sequence[NDArray[Any]],
    dim: int,
    bits: int,
    block: int,
    executor: Executor | None = None,
) -> NDArray[np.float16]:
    """codes (..., dim * bits / 32), scales and biases (..., groups), of any number of groups, ->
    (..., dim) float16, turned back by Hadamard matrices of length `block`."""
    out = np.empty((*fields[0].shape[:-1], dim), "<f2")
    group = dim // fields[1].shape[-1]

    def piece(part: slice) -> None:
        codes, scales, biases = (np.ascontiguousarray(array[part]) for array in fields)
        if _fast:
            _fast.decode(out[part], codes, scales, biases, bits, group, block)
            return
        found = decode_numpy(codes, scales, biases, bits, group, block)
        out[part] = found.reshape(out[part].shape)

    _over_layers(piece, out.shape, executor)
    return out


def _over_layers(
    piece: Callable[[slice], None], shape: tuple[int, ...], executor: Executor | None
) -> None:
    """Call `piece` for all of the first axis: at once, or in runs spread over the executor."""
    layers, size = shape[0], 2 * int(np.prod(shape, dtype=np.int64))
    n = min(layers, size // PIECE_BYTES) if len(shape) > 1 else 1
    if executor is None or n < 2:
        piece(slice(None))
        return
    cuts = [layers * i // n for i in range(n + 1)]
    list(executor.map(piece, map(slice, cuts, cuts[1:])))


def _rotate(x: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """(N, D) -> (N, D), every run of `block` values times the orthonormal Hadamard matrix.

    Butterflies in the order of storage/_codec.c, so that both give the same bits.
    """
    n, dim = x.shape
    h = 1
    while h < block:
        pairs = x.reshape(n, dim // (2 * h), 2, h)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        x = np.stack([a + b, a - b], axis=2)
        h *= 2
    return x.reshape(n, dim) * np.float32(block**-0.5)


def encode_numpy(
    x: NDArray[np.float16], bits: int, group: int, block: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The reference encoder: min/max range per group.

    (N, D) float16 -> codes (N, D * bits / 32), scales and biases (N, D / group).
    """
    n, dim = x.shape
    per_word, levels = 32 // bits, np.float32(2**bits - 1)
    grouped = _rotate(x.astype(np.float32), block).reshape(n, dim // group, group)
    low = np.clip(grouped.min(axis=-1), -MAX_HALF, MAX_HALF) + np.float32(0)  # -0 becomes 0
    high = np.clip(grouped.max(axis=-1), -MAX_HALF, MAX_HALF) + np.float32(0)
    scales = ((high - low) / levels).astype("<f2")
    biases = low.astype("<f2")
    s = scales.astype(np.float32)[..., None]
    inverse = np.divide(np.float32(1), s, out=np.zeros_like(s), where=s != 0)
    q = np.rint(np.clip((grouped - biases.astype(np.float32)[..., None]) * inverse, 0, levels))
    words = q.astype(np.uint32).reshape(n, dim // per_word, per_word)
    words = (words << np.arange(0, 32, bits, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    return words.astype("<u4"), scales, biases


def decode_numpy(
    codes: NDArray[np.uint32],
    scales: NDArray[np.float16],
    biases: NDArray[np.float16],
    bits: int,
    group: int,
    block: int,
) -> NDArray[np.float16]:
    """The reference decoder: (..., D * bits / 32), (..., D / group) twice -> (N, D) float16."""
    dim = codes.shape[-1] * 32 // bits
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    q = (codes[..., None] >> shifts & np.uint32(2**bits - 1)).astype(np.float32)
    s, b = (x.astype(np.float32).reshape(-1, dim // group, 1) for x in (scales, biases))
    x = _rotate((q.reshape(-1, dim // group, group) * s + b).reshape(-1, dim), block)
    return np.clip(x, -MAX_HALF, MAX_HALF).astype("<f2")


def all_finite(x: NDArray[np.float16]) -> bool:
    """No infinity and no NaN, by the bits: two reductions at the speed of memory."""
    # Read as int16, what is not finite and positive is 0x7c00 or more; as uint16, what is not
    # finite and negative is 0xfc00 or more.
    return not x.size or bool(x.view("<i2").max() < 0x7C00 and x.view("<u2").max() < 0xFC00)
