"""Quantizers: KV rows in float16 <-> the tensors that are stored.

Pure functions on numpy arrays; a row is one token, and no group reaches across tokens, so encoded
rows can be cut and joined along the token axis without touching a code (invariant I7).

The q4 bit layout is MLX's: uint32 words of eight nibbles, least significant first, along the head
dim; one float16 scale and bias per group; `x = q * scale + bias`. Keys and values are rotated over
the head dim by a Hadamard matrix before quantization (and after decoding: it is its own inverse).
The C extension `storage._codec` does the same arithmetic fast; numpy is the reference and fallback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from storage.errors import CorruptData
from storage.spec import GroupRows, KVRows, ModelCacheSpec, Part

try:
    from storage import _codec as _fast
except ImportError:  # not compiled: same results, about ten times slower
    _fast = None  # type: ignore[assignment]

Tensors = dict[str, NDArray[Any]]  # "full.0.k.codes" -> (n_layers, T, n_kv_heads, width)


MAX_HALF = np.float32(65504)  # what rotation takes beyond float16 saturates


class Codec(Protocol):
    """One way to store float16 vectors. `name` is hashed into every block id."""

    name: str

    def fields(self, dim: int) -> dict[str, tuple[np.dtype[Any], int]]:
        """Stored fields of a vector of length `dim`: name -> (dtype, width). Raises ValueError for
        a dim it cannot store."""
        ...

    def describe(self, dim: int) -> dict[str, int]:
        """Parameters a foreign reader needs for vectors of this length; written to the card."""
        ...

    def encode(self, x: NDArray[np.float16]) -> Tensors:
        """(..., dim) float16 -> field -> (..., width)."""
        ...

    def decode(self, fields: Mapping[str, NDArray[Any]], dim: int) -> NDArray[np.float16]:
        """Inverse of encode, up to quantization: field -> (..., width) to (..., dim) float16."""
        ...


class F16:
    """No loss: the float16 values as they are."""

    name = "f16"

    def fields(self, dim: int) -> dict[str, tuple[np.dtype[Any], int]]:
        return {"data": (np.dtype("<f2"), dim)}

    def describe(self, dim: int) -> dict[str, int]:
        return {}

    def encode(self, x: NDArray[np.float16]) -> Tensors:
        return {"data": np.ascontiguousarray(x)}

    def decode(self, fields: Mapping[str, NDArray[Any]], dim: int) -> NDArray[np.float16]:
        return fields["data"]


class Q4:
    """Affine 4 bits per value, Hadamard-rotated; 4.5 bits with scale and bias at group 64."""

    name = "q4"

    def fields(self, dim: int) -> dict[str, tuple[np.dtype[Any], int]]:
        groups = dim // self.group(dim)
        return {
            "codes": (np.dtype("<u4"), dim // 8),
            "scales": (np.dtype("<f2"), groups),
            "biases": (np.dtype("<f2"), groups),
        }

    def describe(self, dim: int) -> dict[str, int]:
        return {"bits": 4, "group": self.group(dim), "hadamard": self.hadamard(dim)}

    @staticmethod
    def group(dim: int) -> int:
        """The largest group length MLX knows (64, 32) that divides the head dim."""
        for group in (64, 32):
            if dim % group == 0:
                return group
        raise ValueError(f"q4 cannot group a head dim of {dim}: it is no multiple of 32")

    @staticmethod
    def hadamard(dim: int) -> int:
        """The largest power of two that divides the head dim: the rotation's block length."""
        return dim & -dim

    def encode(self, x: NDArray[np.float16]) -> Tensors:
        dim = x.shape[-1]
        group, block = self.group(dim), self.hadamard(dim)
        rows = np.ascontiguousarray(x).reshape(-1, dim)
        codes, scales, biases = (
            _fast.encode_q4(rows, group, block) if _fast else encode_q4_numpy(rows, group, block)
        )
        lead = x.shape[:-1]
        return {
            "codes": np.frombuffer(codes, "<u4").reshape(*lead, dim // 8),
            "scales": np.frombuffer(scales, "<f2").reshape(*lead, dim // group),
            "biases": np.frombuffer(biases, "<f2").reshape(*lead, dim // group),
        }

    def decode(self, fields: Mapping[str, NDArray[Any]], dim: int) -> NDArray[np.float16]:
        group, block = self.group(dim), self.hadamard(dim)
        lead = fields["codes"].shape[:-1]
        codes = np.ascontiguousarray(fields["codes"])
        scales = np.ascontiguousarray(fields["scales"])
        biases = np.ascontiguousarray(fields["biases"])
        decode = _fast.decode_q4 if _fast else decode_q4_numpy
        out = decode(codes, scales, biases, group, block)
        return np.frombuffer(out, "<f2").reshape(*lead, dim)


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


def encode_q4_numpy(x: NDArray[np.float16], group: int, block: int) -> tuple[bytes, bytes, bytes]:
    """The reference encoder: min/max range per group. (N, D) float16 -> codes, scales, biases."""
    n, dim = x.shape
    grouped = _rotate(x.astype(np.float32), block).reshape(n, dim // group, group)
    low = np.clip(grouped.min(axis=-1), -MAX_HALF, MAX_HALF) + np.float32(0)  # -0 becomes 0
    high = np.clip(grouped.max(axis=-1), -MAX_HALF, MAX_HALF) + np.float32(0)
    scales = ((high - low) / np.float32(15)).astype(np.float16)
    biases = low.astype(np.float16)
    s = scales.astype(np.float32)[..., None]
    inverse = np.divide(np.float32(1), s, out=np.zeros_like(s), where=s != 0)
    q = np.rint(np.clip((grouped - biases.astype(np.float32)[..., None]) * inverse, 0, 15))
    words = q.astype(np.uint32).reshape(n, dim // 8, 8)
    words = (words << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    return words.astype("<u4").tobytes(), scales.tobytes(), biases.tobytes()


def decode_q4_numpy(
    codes: NDArray[np.uint32],
    scales: NDArray[np.float16],
    biases: NDArray[np.float16],
    group: int,
    block: int,
) -> bytes:
    """The reference decoder: (..., D/8), (..., D/group) twice -> float16 bytes of (..., D)."""
    dim = codes.shape[-1] * 8
    nibbles = (codes.reshape(-1, dim // 8, 1) >> np.arange(0, 32, 4, dtype=np.uint32)) & 15
    q = nibbles.astype(np.float32).reshape(-1, dim // group, group)
    s = scales.astype(np.float32).reshape(-1, dim // group, 1)
    b = biases.astype(np.float32).reshape(-1, dim // group, 1)
    return _rotate((q * s + b).reshape(-1, dim), block).astype(np.float16).tobytes()


CODECS: dict[str, Codec] = {"q4": Q4(), "f16": F16()}


def get_codec(name: str) -> Codec:
    """Raises ValueError naming the known codecs."""
    try:
        return CODECS[name]
    except KeyError:
        known = ", ".join(sorted(CODECS))
        raise ValueError(f"unknown codec {name!r}; known: {known}") from None


def _vectors(spec: ModelCacheSpec, part: Part) -> list[tuple[str, int, int, int, int]]:
    """(tensor prefix, group index, n_layers, n_kv_heads, dim) of every non-empty K and V."""
    rows = []
    for index, group in enumerate(spec.groups):
        if group.part == part:
            for side, dim in (("k", group.key_dim), ("v", group.value_dim)):
                if dim:
                    rows.append(
                        (f"{group.name}.{side}", index, len(group.layers), group.n_kv_heads, dim)
                    )
    return rows


def encode_rows(spec: ModelCacheSpec, codec: Codec, rows: KVRows, part: Part = "full") -> Tensors:
    """Quantize the rows of one part."""
    tensors: Tensors = {}
    for prefix, index, *_ in _vectors(spec, part):
        side = rows[index].k if prefix.endswith(".k") else rows[index].v
        for field, array in codec.encode(side).items():
            tensors[f"{prefix}.{field}"] = array
    return tensors


def decode_rows(
    spec: ModelCacheSpec, codec: Codec, tensors: Tensors, part: Part = "full"
) -> KVRows:
    """The rows of one part; groups of the other part come back with T = 0."""
    sides: dict[str, NDArray[np.float16]] = {}
    n_rows = count_rows(tensors)
    for prefix, _, _, _, dim in _vectors(spec, part):
        fields = {f: tensors[f"{prefix}.{f}"] for f in codec.fields(dim)}
        sides[prefix] = codec.decode(fields, dim)
    groups = []
    for g in spec.groups:
        lead = (len(g.layers), n_rows if g.part == part else 0, g.n_kv_heads)
        groups.append(
            GroupRows(
                k=sides.get(f"{g.name}.k", np.empty((*lead, g.key_dim), np.float16)),
                v=sides.get(f"{g.name}.v", np.empty((*lead, g.value_dim), np.float16)),
            )
        )
    return tuple(groups)


def merge_parts(spec: ModelCacheSpec, full: KVRows, sliding: KVRows) -> KVRows:
    """One KVRows from the groups of both parts."""
    return tuple(
        s if group.part == "sliding" else f
        for group, f, s in zip(spec.groups, full, sliding, strict=True)
    )


def count_rows(tensors: Tensors) -> int:
    """T, the length of the token axis."""
    return int(next(iter(tensors.values())).shape[1]) if tensors else 0


def slice_rows(tensors: Tensors, start: int, stop: int) -> Tensors:
    """Rows start..stop, codes as they are."""
    return {name: np.ascontiguousarray(x[:, start:stop]) for name, x in tensors.items()}


def concat_rows(pieces: list[Tensors]) -> Tensors:
    """Join along the token axis, codes as they are."""
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([p[name] for p in pieces], axis=1) for name in pieces[0]}


def tensor_bytes(tensors: Tensors) -> int:
    return sum(x.nbytes for x in tensors.values())


def check_tensors(
    spec: ModelCacheSpec, codec: Codec, tensors: Tensors, n_rows: int, path: str, part: Part
) -> None:
    """Raises CorruptData unless names, dtypes and shapes are what spec, codec and length say."""
    expected = {
        f"{prefix}.{field}": (dtype, (n_layers, n_rows, heads, width))
        for prefix, _, n_layers, heads, dim in _vectors(spec, part)
        for field, (dtype, width) in codec.fields(dim).items()
    }
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise CorruptData(path, f"tensors missing or unknown: {', '.join(odd)}")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or found.shape != shape:
            raise CorruptData(
                path, f"tensor {name} is {found.dtype}{found.shape}, not {dtype}{shape}"
            )
