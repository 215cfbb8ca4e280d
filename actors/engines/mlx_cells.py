"""How one model's rows lie in MLX caches, and what of them enters and leaves.

One cache per layer; the neutral form stacks layers of one geometry. A field of a group, float16
rows or a codec's codes, scales or biases, is (n_layers, rows, n_kv_heads, width) outside and
(1, n_kv_heads, rows, width) per layer inside. Sliding layers are float16 always.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from actors.engines.base import count_rows
from actors.engines.mlx_cache import BatchQuantizedKVCache, check_latent
from actors.engines.mlx_float_cache import BatchKVCache
from actors.errors import EngineFault, ModelUnavailable
from storage.codec import Codec, Tensors
from storage.quantizers import Affine
from storage.spec import CompatibilityKey, GroupRows, KVRows, LayerGroup, LayerSpec, Part

Caches = list[BatchKVCache]  # one per layer
_CODES, _FLOATS = ("codes", "scales", "biases"), ("data",)


class Cells:
    """Of a model with this key, in this codec's form. Raises ModelUnavailable for layers that the
    codec cannot store, naming them."""

    def __init__(self, key: CompatibilityKey, codec: Codec) -> None:
        self._spec, self._codec = key.spec, codec
        self._rope_dims = int(float(dict(key.rope)["dims"]))
        odd: dict[str, list[int]] = {}
        for i, layer in enumerate(self._spec.layers):
            try:
                self._check_layer(layer)
            except ValueError as error:
                odd.setdefault(str(error), []).append(i)
        if odd:
            reasons = "; ".join(f"layers {layers}: {reason}" for reason, layers in odd.items())
            todo = "kv_type = 'f16' keeps all in float, and codec = 'f16' stores any"
            raise ModelUnavailable(f"cells of {codec.name}: {reasons}; {todo}")

    def _check_layer(self, layer: LayerSpec) -> None:
        if layer.kind == "sliding":
            return
        self._codec.fields("k", layer.key_dim)
        if layer.kind == "latent":
            check_latent(self._codec.keys, layer.key_dim, self._latent(layer))
        else:
            self._codec.fields("v", layer.value_dim)

    def _latent(self, layer: LayerSpec) -> int:
        """Dims of an MLA key that are its value, too; 0 for other layers."""
        return layer.key_dim - self._rope_dims if layer.kind == "latent" else 0

    def new(self) -> Caches:
        """One empty sequence."""
        keys, values = self._codec.keys, self._codec.values
        caches: Caches = []
        for layer in self._spec.layers:
            latent = self._latent(layer)
            if isinstance(keys, Affine) and isinstance(values, Affine) and layer.kind != "sliding":
                caches.append(BatchQuantizedKVCache(keys, values, latent=latent))
            else:
                caches.append(BatchKVCache(window=layer.window, latent=latent))
        return caches

    def rows(self, caches: Caches, place: int, start: int, stop: int, part: Part) -> KVRows:
        """A copy of one part's float16 rows; groups of the other part have T = 0."""
        rows = []
        for g in self._spec.groups:
            lead = (len(g.layers), stop - start if g.part == part else 0, g.n_kv_heads)
            if g.part != part or start == stop:
                k, v = (np.empty((*lead, dim), np.float16) for dim in (g.key_dim, g.value_dim))
            else:
                k, *rest = _read(caches, place, g, start, stop)
                v = rest[0] if rest else np.empty((*lead, 0), np.float16)
            rows.append(GroupRows(k, v))
        return tuple(rows)

    def encoded(self, caches: Caches, place: int, start: int, stop: int) -> Tensors:
        """A copy of the full part's codes."""
        tensors: Tensors = {}
        for group in self._spec.groups:
            if group.part == "full":
                fields = _read(caches, place, group, start, stop)
                tensors |= dict(zip(_names(group, _CODES), fields, strict=True))
        return tensors

    def check(self, rows: KVRows) -> int:
        """How many there are. Raises EngineFault for shapes that are not the spec's."""
        n_rows = count_rows(rows)
        for group, x in zip(self._spec.groups, rows, strict=True):
            count = x.k.shape[1] if group.part == "sliding" else n_rows
            for side, dim in ((x.k, group.key_dim), (x.v, group.value_dim)):
                if side.shape != (len(group.layers), count, group.n_kv_heads, dim):
                    raise EngineFault(f"rows of {side.shape} for {group.name}")
        return n_rows

    def append(self, caches: Caches, n_rows: int, tensors: Tensors) -> None:
        """Add `n_rows` rows to the caches of one sequence, fields in the form of the cells; of
        sliding groups the last ones, or none."""
        for group in self._spec.groups:
            names = _names(group, _CODES if f"{group.name}.k.codes" in tensors else _FLOATS)
            if names[0] not in tensors:  # of sliding rows none are needed
                names = []
            whole = [mx.array(tensors[name]).transpose(0, 2, 1, 3) for name in names]
            for place, layer in enumerate(group.layers):
                caches[layer].write([x[place : place + 1] for x in whole], n_rows)
        mx.eval([cache.fields for cache in caches])


def _names(group: LayerGroup, fields: tuple[str, ...]) -> list[str]:
    """Of its tensors, in the order of a cache's fields."""
    sides = ("k", "v") if group.value_dim else ("k",)
    return [f"{group.name}.{side}.{field}" for side in sides for field in fields]


def _read(
    caches: Caches, place: int, group: LayerGroup, start: int, stop: int
) -> list[NDArray[Any]]:
    """Every field of a group."""
    layers = [caches[i].read(place, start, stop) for i in group.layers]
    return [np.array(mx.stack(list(xs)).transpose(0, 2, 1, 3)) for xs in zip(*layers, strict=True)]
