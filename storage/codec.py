"""Codecs: KV rows in float16 <-> the tensors that are stored.

A codec is a name, one quantizer for keys and one for values (storage.quantizers). Pure functions on
numpy arrays; a row is one token, and no group reaches across tokens, so encoded rows can be cut and
joined along the token axis without touching a code (invariant I7).
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage.errors import CorruptData
from storage.quantizers import F16, MAX_DIM, Affine, Fields, Quantizer, all_finite
from storage.spec import GroupRows, KVRows, LayerGroup, ModelCacheSpec, Part

Tensors = dict[str, NDArray[Any]]  # "full.0.k.codes" -> (n_layers, T, n_kv_heads, width)
Side = Literal["k", "v"]


@dataclass(frozen=True)
class Codec:
    """How rows are stored. `name` is hashed into every block id."""

    name: str
    keys: Quantizer
    values: Quantizer

    def quantizer(self, side: Side) -> Quantizer:
        return self.keys if side == "k" else self.values

    def fields(self, side: Side, dim: int) -> dict[str, tuple[np.dtype[Any], int]]:
        """Stored fields of a vector of length `dim`: name -> (dtype, width). Raises ValueError for
        a dim it cannot store."""
        return self.quantizer(side).fields(dim)

    def describe(self, side: Side, dim: int) -> dict[str, int]:
        """Parameters a foreign reader needs for vectors of this length; written to the card."""
        return self.quantizer(side).describe(dim)

    def encode(
        self, side: Side, x: NDArray[np.float16], executor: Executor | None = None
    ) -> Fields:
        """(..., dim) float16 -> field -> (..., width)."""
        return self.quantizer(side).encode(x, executor)

    def decode(
        self,
        side: Side,
        fields: Mapping[str, NDArray[Any]],
        dim: int,
        executor: Executor | None = None,
    ) -> NDArray[np.float16]:
        """Inverse of encode, up to quantization: field -> (..., width) to (..., dim) float16."""
        return self.quantizer(side).decode(fields, dim, executor)


# llama.cpp rotates the values of a quantized cache in blocks of 64, and keys in the largest power
# of two that divides the head dim: with the same rotations codes can go into its cells as they are.
# In 8 bits, too: outlier channels are what it is for (a third less error on SmolLM2's keys).
_KEYS, _VALUES = MAX_DIM, 64

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("q4", Affine(4, _KEYS), Affine(4, _VALUES)),
        Codec("k8v4", Affine(8, _KEYS), Affine(4, _VALUES)),
        Codec("q8", Affine(8, _KEYS), Affine(8, _VALUES)),
        Codec("f16", F16(), F16()),
    )
}


def get_codec(name: str) -> Codec:
    """Raises ValueError naming the known codecs."""
    try:
        return CODECS[name]
    except KeyError:
        known = ", ".join(sorted(CODECS))
        raise ValueError(f"unknown codec {name!r}; known: {known}") from None


def _vectors(spec: ModelCacheSpec, part: Part) -> list[tuple[str, Side, int, LayerGroup, int]]:
    """(tensor prefix, side, group index, group, dim) of every non-empty K and V."""
    sides: tuple[Side, Side] = ("k", "v")
    return [
        (f"{group.name}.{side}", side, index, group, dim)
        for index, group in enumerate(spec.groups)
        if group.part == part
        for side, dim in zip(sides, (group.key_dim, group.value_dim), strict=True)
        if dim
    ]


def codec_parameters(spec: ModelCacheSpec, codec: Codec) -> dict[str, dict[str, int]]:
    """What a card says of the codec: "full.0.k" -> parameters."""
    parts: tuple[Part, Part] = ("full", "sliding")
    return {
        prefix: codec.describe(side, dim)
        for part in parts
        for prefix, side, _, _, dim in _vectors(spec, part)
    }


def refused_layers(spec: ModelCacheSpec, codec: Codec) -> dict[str, list[int]]:
    """Why it cannot store a layer's rows -> the layers."""
    refused: dict[str, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        try:
            codec.fields("k", layer.key_dim)
            codec.fields("v", layer.value_dim)
        except ValueError as error:
            refused.setdefault(str(error), []).append(index)
    return refused


def row_bytes(spec: ModelCacheSpec, codec: Codec) -> int:
    """Bytes of one token's encoded row in the layers that do not slide."""
    return sum(
        len(group.layers) * group.n_kv_heads * width * np.dtype(dtype).itemsize
        for _, side, _, group, dim in _vectors(spec, "full")
        for dtype, width in codec.fields(side, dim).values()
    )


def encode_rows(
    spec: ModelCacheSpec,
    codec: Codec,
    rows: KVRows,
    part: Part = "full",
    executor: Executor | None = None,
) -> Tensors:
    """Quantize the rows of one part; with an executor (never the one the caller runs on, which it
    could wait for forever), layers side by side."""
    return {
        f"{prefix}.{field}": array
        for prefix, side, index, _, _ in _vectors(spec, part)
        for field, array in codec.encode(
            side, rows[index].k if side == "k" else rows[index].v, executor
        ).items()
    }


def decode_rows(
    spec: ModelCacheSpec,
    codec: Codec,
    tensors: Tensors,
    part: Part = "full",
    executor: Executor | None = None,
) -> KVRows:
    """The rows of one part; groups of the other part come back with T = 0. `executor` as in
    encode_rows."""
    sides: dict[str, NDArray[np.float16]] = {}
    n_rows = count_rows(tensors)
    for prefix, side, _, _, dim in _vectors(spec, part):
        fields = {f: tensors[f"{prefix}.{f}"] for f in codec.fields(side, dim)}
        sides[prefix] = codec.decode(side, fields, dim, executor)
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
    """For everything that is read from a store. Raises CorruptData unless names, dtypes and shapes
    are what spec, codec and length say, and every float16 is finite."""
    expected = {
        f"{prefix}.{field}": (dtype, (len(group.layers), n_rows, group.n_kv_heads, width))
        for prefix, side, _, group, dim in _vectors(spec, part)
        for field, (dtype, width) in codec.fields(side, dim).items()
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
        if dtype == "<f2" and not all_finite(found):
            raise CorruptData(path, f"tensor {name} holds an infinity or a NaN")
