"""ModelCacheSpec: the geometry of a model's KV cache, and the key that says whose cache fits.

Engines extract the spec from a loaded model; nothing here is typed by hand. A cache is used only
under an equal CompatibilityKey. Knows no engine and no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 256

LayerKind = Literal["full", "sliding", "latent"]
Part = Literal["full", "sliding"]


def canonical_json(value: Any) -> bytes:
    """The one serialization that is hashed: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


@dataclass(frozen=True)
class LayerSpec:
    """One layer's cache: `latent` layers (MLA) have one head and value_dim 0."""

    kind: LayerKind
    n_kv_heads: int
    key_dim: int
    value_dim: int
    window: int = 0  # tokens, sliding layers only


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one part with one geometry, stacked in one tensor: (n_layers, T, n_kv_heads, D)."""

    name: str  # "full.0": part, then the order of first appearance
    part: Part
    layers: tuple[int, ...]
    n_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class GroupRows:
    """KV of T tokens for one LayerGroup, keys after RoPE in half-split order.

    k: (n_layers, T, n_kv_heads, key_dim) float16; v: (n_layers, T, n_kv_heads, value_dim) float16.
    """

    k: NDArray[np.float16]
    v: NDArray[np.float16]


KVRows = tuple[GroupRows, ...]  # in the order of ModelCacheSpec.groups


@dataclass(frozen=True)
class ModelCacheSpec:
    """Layers in model order, and the block length in tokens."""

    architecture: str
    layers: tuple[LayerSpec, ...]
    block_tokens: int = BLOCK_TOKENS

    @cached_property
    def groups(self) -> tuple[LayerGroup, ...]:
        """Layers stacked by (part, geometry). `latent` layers live in the `full` part."""
        members: dict[tuple[Part, int, int, int], list[int]] = {}
        for index, layer in enumerate(self.layers):
            part: Part = "sliding" if layer.kind == "sliding" else "full"
            geometry = (part, layer.n_kv_heads, layer.key_dim, layer.value_dim)
            members.setdefault(geometry, []).append(index)
        seen = {"full": 0, "sliding": 0}
        groups = []
        for (part, heads, key_dim, value_dim), layers in members.items():
            groups.append(
                LayerGroup(f"{part}.{seen[part]}", part, tuple(layers), heads, key_dim, value_dim)
            )
            seen[part] += 1
        return tuple(groups)

    @cached_property
    def f16_row_bytes(self) -> int:
        """Bytes of one token's KV in float16 over all layers."""
        return sum(2 * x.n_kv_heads * (x.key_dim + x.value_dim) for x in self.layers)

    @cached_property
    def window(self) -> int:
        """The longest sliding window in tokens, 0 if no layer has one. A token attends to itself
        and the window - 1 tokens before it."""
        return max((x.window for x in self.layers if x.kind == "sliding"), default=0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelCacheSpec:
        """Raises KeyError or TypeError on a malformed mapping."""
        return cls(
            architecture=data["architecture"],
            layers=tuple(LayerSpec(**layer) for layer in data["layers"]),
            block_tokens=data["block_tokens"],
        )


@dataclass(frozen=True)
class CompatibilityKey:
    """What must be equal for one model's cache to mean the same to another process.

    weights and tokenizer are hex sha256 digests; rope holds the model's rope parameters, sorted.
    Codec, engine and build are provenance and not part of the key: the stored form is neutral.
    """

    weights: str
    tokenizer: str
    rope: tuple[tuple[str, float | str], ...]
    spec: ModelCacheSpec

    @cached_property
    def digest(self) -> str:
        """Hex sha256 of the canonical JSON of all fields."""
        return hashlib.sha256(b"kvferry.key.v1" + canonical_json(self.to_json())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "tokenizer": self.tokenizer,
            "rope": dict(self.rope),
            "spec": self.spec.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompatibilityKey:
        """Raises KeyError or TypeError on a malformed mapping."""
        return cls(
            weights=data["weights"],
            tokenizer=data["tokenizer"],
            rope=tuple(sorted(data["rope"].items())),
            spec=ModelCacheSpec.from_json(data["spec"]),
        )

    def mismatches(self, other: CompatibilityKey) -> list[str]:
        """One `field: theirs != ours` line for every field that differs; empty when equal."""
        ours, theirs = _flatten(self.to_json()), _flatten(other.to_json())
        names = sorted(ours.keys() | theirs.keys())
        return [
            f"{name}: {theirs.get(name, 'absent')} != {ours.get(name, 'absent')}"
            for name in names
            if ours.get(name) != theirs.get(name)
        ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = ((str(i), x) for i, x in enumerate(value))  # type: ignore[assignment]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat.update(_flatten(item, f"{prefix}.{name}" if prefix else str(name)))
    return flat
