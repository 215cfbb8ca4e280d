"""ModelCacheSpec: the geometry of a model's KV cache, and the key that says whose cache fits.

Engines extract the spec from a loaded model; nothing here is typed by hand. A cache is used only
under an equal CompatibilityKey. Knows no engine and no file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 256

LayerKind = Literal["full", "sliding", "latent"]
Part = Literal["full", "sliding"]
DIGEST = re.compile(r"[0-9a-f]{64}\Z")  # \Z, not $: that also matches before a line break


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
        """Raises KeyError, TypeError or ValueError for what describes no model."""
        spec = cls(
            architecture=_text(data["architecture"]),
            layers=tuple(LayerSpec(**layer) for layer in data["layers"]),
            block_tokens=data["block_tokens"],
        )
        _within("block_tokens", spec.block_tokens, 1, 1 << 16)
        _within("layers", len(spec.layers), 0, 1 << 12)
        for layer in spec.layers:
            if layer.kind not in get_args(LayerKind):
                raise ValueError(f"unknown kind of layer {layer.kind!r}")
            _within("n_kv_heads", layer.n_kv_heads, 1, 1 << 12)
            _within("key_dim", layer.key_dim, 1, 1 << 16)
            _within("value_dim", layer.value_dim, 0, 1 << 16)
            _within("window", layer.window, 0, 1 << 32)
        return spec


@dataclass(frozen=True)
class CompatibilityKey:
    """What must be equal for one model's cache to mean the same to another process.

    weights and tokenizer are hex sha256 digests; rope holds the model's rope parameters, kept
    sorted by name whatever order they come in (ValueError for one that is named twice). Codec,
    engine and build are provenance and not part of the key: the stored form is neutral.
    """

    weights: str
    tokenizer: str
    rope: tuple[tuple[str, float | str], ...]
    spec: ModelCacheSpec

    def __post_init__(self) -> None:
        if len(dict(self.rope)) != len(self.rope):
            raise ValueError(f"a rope parameter is named twice: {self.rope}")
        object.__setattr__(self, "rope", tuple(sorted(self.rope, key=lambda item: item[0])))

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
        """Raises KeyError, TypeError or ValueError for what is no key."""
        return _key(canonical_json(data))

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> CompatibilityKey:
        rope = data["rope"]
        if not isinstance(rope, dict) or not all(
            type(value) in (int, float, str) for value in rope.values()
        ):
            raise TypeError(f"rope parameters are numbers and words, not {rope}")
        return cls(
            weights=_text(data["weights"]),
            tokenizer=_text(data["tokenizer"]),
            rope=tuple(rope.items()),
            spec=ModelCacheSpec.from_json(data["spec"]),
        )

    def canonical(self, equivalent_digests: Mapping[str, str]) -> CompatibilityKey:
        """The key that all models declared equivalent share; see check_equivalent_digests."""
        return replace(
            self,
            weights=equivalent_digests.get(self.weights, self.weights),
            tokenizer=equivalent_digests.get(self.tokenizer, self.tokenizer),
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


def check_equivalent_digests(table: Mapping[str, str]) -> None:
    """`table` maps digests of weights or tokenizers that an operator declares equivalent to one
    canonical digest. Raises ValueError for what is no digest, and for chains and cycles: where a
    digest leads must not depend on how often it is looked up."""
    for digest, canonical in table.items():
        for text in (digest, canonical):
            if not isinstance(text, str) or not DIGEST.match(text):
                raise ValueError(f"{text!r} is no sha256 in 64 lower-case hex digits")
        if canonical in table:
            raise ValueError(
                f"{digest} leads to {canonical}, which itself leads to {table[canonical]}: "
                "name the canonical digest directly"
            )


def _within(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:  # True is an int, too
        raise ValueError(f"{name} {value!r} is not between {low} and {high}")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


@lru_cache(maxsize=64)
def _key(raw: bytes) -> CompatibilityKey:
    """A store's cards repeat a few keys: each is read, and its digest computed, once."""
    return CompatibilityKey._read(json.loads(raw))


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
