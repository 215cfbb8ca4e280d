"""What this machine can do: copying, reading cached files, checksums, codecs; GB/s on one core."""

from __future__ import annotations

import hashlib
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from storage.codec import CODECS, Codec, decode_rows, encode_rows, tensor_bytes
from storage.spec import GroupRows, KVRows, ModelCacheSpec

_SIZE = 64 << 20  # bytes, of the plain rates
_RUNS = 5


def timed(function: Callable[[], object], runs: int = _RUNS) -> float:
    """Seconds, the median of several runs after one to warm up."""
    function()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


@dataclass(frozen=True)
class MachineRates:
    """Bytes per second."""

    memcpy: float
    page_cache: float
    checksums: dict[str, float]


def machine_rates(folder: Path) -> MachineRates:
    """`folder`: where the file is made that is read from the page cache."""
    data = np.random.default_rng(0).integers(0, 256, _SIZE, np.uint8)
    target = np.empty_like(data)
    path = folder / "page-cache"
    raw = data.tobytes()
    path.write_bytes(raw)

    def read() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.readv(descriptor, [target.data])
        finally:
            os.close(descriptor)

    return MachineRates(
        memcpy=_SIZE / timed(lambda: np.copyto(target, data)),
        page_cache=_SIZE / timed(read),
        checksums={name: _SIZE / timed(partial(f, raw)) for name, f in _checksums().items()},
    )


def _checksums() -> dict[str, Callable[[bytes], object]]:
    """sha256 is the one in use; the others are compared where they are installed."""
    found: dict[str, Callable[[bytes], object]] = {
        "sha256": lambda raw: hashlib.sha256(raw).digest(),
        "blake2b": lambda raw: hashlib.blake2b(raw).digest(),
    }
    for module, name in (("blake3", "blake3"), ("xxhash", "xxh3_128")):
        try:
            function = getattr(importlib.import_module(module), name)
        except ImportError:
            continue
        found[name] = partial(_digest, function)
    return found


def _digest(function: Callable[[bytes], Any], raw: bytes) -> object:
    return function(raw).digest()


def sample_rows(spec: ModelCacheSpec, n_rows: int, seed: int = 0) -> KVRows:
    """Normal values with a few strong channels, as keys have them."""
    generator = np.random.default_rng(seed)

    def side(n_layers: int, heads: int, dim: int) -> np.ndarray:
        values = generator.standard_normal((n_layers, n_rows, heads, dim), np.float32)
        values[..., : max(1, dim // 16)] *= 8
        return values.astype(np.float16)

    return tuple(
        GroupRows(
            side(len(group.layers), group.n_kv_heads, group.key_dim),
            side(len(group.layers), group.n_kv_heads, group.value_dim),
        )
        for group in spec.groups
    )


@dataclass(frozen=True)
class CodecRates:
    """Float16 bytes per second on one core, stored bytes per float16 byte, relative error."""

    encode: float
    decode: float
    ratio: float
    error: float


def codec_rates(spec: ModelCacheSpec, n_rows: int = 1024) -> dict[str, CodecRates]:
    """Every codec on rows of this geometry, of layers that do not slide."""
    spec = replace(spec, layers=tuple(x for x in spec.layers if x.kind != "sliding"))
    rows = sample_rows(spec, n_rows)
    return {name: _codec_rates(spec, codec, rows) for name, codec in CODECS.items()}


def _codec_rates(spec: ModelCacheSpec, codec: Codec, rows: KVRows) -> CodecRates:
    size = sum(group.k.nbytes + group.v.nbytes for group in rows)
    tensors = encode_rows(spec, codec, rows)
    again = decode_rows(spec, codec, tensors)
    pairs = [
        (mine.astype(np.float32), theirs.astype(np.float32))
        for a, b in zip(rows, again, strict=True)
        for mine, theirs in ((a.k, b.k), (a.v, b.v))
    ]
    off = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    whole = sum(float((a**2).sum()) for a, _ in pairs)
    return CodecRates(
        encode=size / timed(lambda: encode_rows(spec, codec, rows)),
        decode=size / timed(lambda: decode_rows(spec, codec, tensors)),
        ratio=tensor_bytes(tensors) / size,
        error=(off / whole) ** 0.5,
    )
