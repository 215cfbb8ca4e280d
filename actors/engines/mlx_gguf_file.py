"""A GGUF's fields and tensors, as the file has them.

Reads the header itself: the gguf package unpacks every word of the vocabulary, which takes seconds.
llama.cpp has loaded the file before, so it is sound. Called by mlx_gguf and mlx_models.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray

from actors.errors import ModelUnavailable

Type = GGMLQuantizationType
_TYPES = {int(kind) for kind in Type}
_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """(rows, bytes of a row) uint8, and what it stands for."""

    shape: tuple[int, ...]
    type: Type
    rows: NDArray[np.uint8]

    def floats(self) -> NDArray[np.float32]:
        return np.asarray(dequantize(self.rows, self.type), np.float32).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """`fields` without arrays; tensors are views of the file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def refuse(self, reason: str) -> ModelUnavailable:
        return ModelUnavailable(f"{self.path}: {reason}, not supported by the mlx engine")


def read(path: Path) -> GgufFile:
    with path.open("rb") as file:
        raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    n_tensors, n_fields = struct.unpack_from("<QQ", raw, 8)
    at, fields = 24, {}
    for _ in range(n_fields):
        name, at = _string(raw, at)
        (kind,) = struct.unpack_from("<I", raw, at)
        value, at = _value(raw, at + 4, kind)
        if value is not None:
            fields[name.decode()] = value
    infos = []
    for _ in range(n_tensors):
        name, at = _string(raw, at)
        (n_dims,) = struct.unpack_from("<I", raw, at)
        *dims, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", raw, at + 4)
        infos.append((name.decode(), tuple(dims[::-1]), kind, offset))
        at += 4 + 8 * n_dims + 12
    alignment = fields.get("general.alignment", 32)
    start, tensors = -(-at // alignment) * alignment, {}
    for tensor, shape, kind, offset in infos:
        if kind not in _TYPES:
            raise ModelUnavailable(
                f"{path}: {tensor} is of ggml type {kind}, which gguf cannot read"
            )
        form = Type(kind)
        block, size = GGML_QUANT_SIZES[form]
        row = shape[-1] // block * size
        count = int(np.prod(shape[:-1], dtype=np.int64)) * row
        data = np.frombuffer(raw, np.uint8, count, start + offset)
        tensors[tensor] = Tensor(shape, form, data.reshape(-1, row))
    return GgufFile(path, fields, tensors)


def _string(raw: mmap.mmap, at: int) -> tuple[bytes, int]:
    (n,) = struct.unpack_from("<Q", raw, at)
    return raw[at + 8 : at + 8 + n], at + 8 + n


def _value(raw: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """(value, where the next field begins); arrays are skipped: None."""
    if kind == _STRING:
        text, at = _string(raw, at)
        return text.decode(errors="replace"), at
    if kind != _ARRAY:
        form = "<" + _SCALARS[kind]
        return struct.unpack_from(form, raw, at)[0], at + struct.calcsize(form)
    of, n = struct.unpack_from("<IQ", raw, at)
    at += 12
    if of != _STRING:
        return None, at + n * struct.calcsize("<" + _SCALARS[of])
    for _ in range(n):
        at += 8 + int.from_bytes(raw[at : at + 8], "little")
    return None, at
