"""BatchQuantizedKVCache: the rows of one layer for several sequences, in a codec's own codes.

The codes are bit for bit those that the codec would store (mlx_codec), and are attended to as they
are: queries are turned by the Hadamard matrix that the keys were turned by, and the sum of the
values is turned back. mlx-lm's scaled_dot_product_attention, which takes codes from any cache with
an attribute `bits`, turns nothing: so this cache has none, and attention goes through `attend`
(mlx_attention). Codes serve prompts, too: on a CPU, decoding them for mx.fast's attention is no
faster at any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from actors.engines import mlx_codec
from actors.engines.mlx_float_cache import BatchKVCache, Mask
from storage.quantizers import Affine, Quantizer


class BatchQuantizedKVCache(BatchKVCache):
    """Rows in a codec's codes: per side uint32 codes, float16 scales and biases per group."""

    def __init__(
        self,
        keys: Affine,
        values: Affine,
        left_padding: Sequence[int] = (0,),
        *,
        window: int = 0,
        latent: int = 0,
    ) -> None:
        super().__init__(left_padding, window=window, latent=latent)
        self._keys, self._values = keys, values

    @property
    def quantizers(self) -> tuple[Affine, Affine]:
        return self._keys, self._keys if self.latent else self._values

    @property
    def state(self) -> tuple[Any, ...]:
        return (*super().state, self._keys, self._values)

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        *rest, self._keys, self._values = state
        BatchKVCache.state.fset(self, tuple(rest))  # type: ignore[attr-defined]

    def update_and_fetch(self, keys: mx.array, values: mx.array | None) -> tuple[Any, Any]:
        """Append rows; (codes, scales, biases) of all keys and all values, rotated."""
        fields = tuple(self._append(self._pack(keys, values)))
        if not self.latent:
            return fields[:3], fields[3:]
        per_group = self._keys.group(keys.shape[-1])
        widths = (self.latent * self._keys.bits // 32, *[self.latent // per_group] * 2)
        return fields, tuple(x[..., :n] for x, n in zip(fields, widths, strict=True))

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array | None, scale: float, mask: Mask
    ) -> mx.array:
        B, n_heads, L, key_dim = queries.shape
        n_kv_heads = keys.shape[1]
        value_dim = self.latent if values is None else values.shape[-1]
        (k, v), (on_keys, on_values) = self.update_and_fetch(keys, values), self.quantizers
        # The heads that share a key lie one after another: as so many more tokens.
        shared = mlx_codec.rotate(queries * scale, on_keys.hadamard(key_dim))
        shared = shared.reshape(B, n_kv_heads, n_heads // n_kv_heads * L, key_dim)
        group, bits = on_keys.group(key_dim), on_keys.bits
        scores = _times_codes(shared, k, transpose=True, group_size=group, bits=bits)
        weights = _softmax(scores, L, mask)
        group = group if self.latent else on_values.group(value_dim)
        out = _times_codes(weights, v, transpose=False, group_size=group, bits=on_values.bits)
        block = on_keys.hadamard(key_dim) if self.latent else on_values.hadamard(value_dim)
        return mlx_codec.rotate(out, block).reshape(B, n_heads, L, value_dim)


def check_latent(quantizer: Quantizer, key_dim: int, latent: int) -> None:
    """Raises ValueError where the values cannot be cut out of quantized keys."""
    if isinstance(quantizer, Affine):
        group, block = quantizer.group(key_dim), quantizer.hadamard(key_dim)
        if latent % group or latent % block:
            raise ValueError(
                f"a latent of {latent} dims in keys of {key_dim} is cut by groups of {group} "
                f"or rotations of {block}"
            )


def _times_codes(x: mx.array, codes: Sequence[mx.array], **how: Any) -> mx.array:
    words, scales, biases = codes
    return mx.quantized_matmul(x, words, scales, biases, **how)


def _softmax(scores: mx.array, n_tokens: int, mask: Mask) -> mx.array:
    """(B, n_kv_heads, heads * n_tokens, columns)."""
    if mask is None:
        return mx.softmax(scores, axis=-1, precise=True)
    shape = scores.shape
    scores = scores.reshape(*shape[:2], -1, n_tokens, shape[-1])
    if isinstance(mask, str):
        columns = mx.arange(shape[-1])
        mask = columns <= columns[-n_tokens:, None]
    elif mask.ndim == 4:
        mask = mask[:, :, None]
    scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return mx.softmax(scores, axis=-1, precise=True).reshape(shape)
