"""BatchQuantizedKVCache: the rows of one layer for several sequences, in a codec's own codes.

The codes are bit for bit those that the codec would store (mlx_codec), and are attended to as they
are: queries are turned by the Hadamard matrix that the keys were turned by, and the sum of the
values is turned back. mlx-lm's scaled_dot_product_attention, which takes codes from any cache with
an attribute `bits`, turns nothing: so this cache has none, and attention goes through `attend`
(mlx_attention). For a prompt's many queries keys are decoded first where that is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from actors.engines import mlx_codec
from actors.engines.mlx_float_cache import BatchKVCache, Fields, Mask
from storage.quantizers import Affine, Quantizer

# Rows that a token sees in float16. SmolLM2, 50 tokens after 78 stored in q4, KL to llama.cpp going
# on in floats: 0.030 with 1 row, 0.009 with 16, 0.008 with 32 or 64; the codec's own is 0.008.
RECENT = 32
# Queries of one key from which on keys are decoded to floats first, which changes no value. On two
# x86 cores, 192 queries on 1,024 keys take 37 ms so, 172 ms on codes; 48 take 19 and 31; sums over
# values gain nothing. On a GPU it is not measured, and never done; bench.mlx does.
DECODE_FROM = 48


class RecentRows(BatchKVCache):
    """A window over the last rows, in small steps."""

    step, spare, slack = 64, 32, 64


class BatchQuantizedKVCache(BatchKVCache):
    """Rows in a codec's codes: per side uint32 codes, float16 scales and biases per group.

    A token attends to the last `recent` rows in float16 as well as they were computed, and to all
    before them in codes; which ones depends on its position only, not on how a prompt was cut.
    Rows that were loaded are codes from the start.
    """

    decode_from = DECODE_FROM if mx.default_device() == mx.Device(mx.cpu) else 1 << 30

    def __init__(
        self,
        keys: Affine,
        values: Affine,
        left_padding: Sequence[int] = (0,),
        *,
        latent: int = 0,
        recent: int = RECENT,
    ) -> None:
        super().__init__(left_padding, latent=latent)
        self._keys, self._values = keys, values
        self._recent = RecentRows(left_padding, window=recent, latent=latent)

    @property
    def quantizers(self) -> tuple[Affine, Affine]:
        return self._keys, self._keys if self.latent else self._values

    # ---- every move concerns both

    @property
    def state(self) -> tuple[Any, ...]:
        return (*super().state, self._keys, self._values, self._recent.state)

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        *rest, self._keys, self._values, recent = state
        BatchKVCache.state.fset(self, tuple(rest))  # type: ignore[attr-defined]
        self._recent = RecentRows()
        self._recent.state = recent

    def copy(self) -> BatchQuantizedKVCache:
        cache = super().copy()
        assert isinstance(cache, BatchQuantizedKVCache)
        cache._recent = self._recent.copy()  # type: ignore[assignment]
        return cache

    def prepare(self, **padding: Any) -> None:
        super().prepare(**padding)
        self._recent.prepare(**padding)

    def finalize(self) -> None:
        super().finalize()
        self._recent.finalize()

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        super().filter(batch_indices)
        self._recent.filter(batch_indices)

    def extend(self, other: BatchKVCache) -> None:
        assert isinstance(other, BatchQuantizedKVCache)
        super().extend(other)
        self._recent.extend(other._recent)

    def trim(self, n: int) -> int:
        self._recent.trim(n)
        return super().trim(n)

    def write(self, fields: Fields, n_rows: int) -> None:
        super().write(fields, n_rows)
        self._recent.write([], n_rows)

    @property
    def fields(self) -> Fields:
        return super().fields + self._recent.fields

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._recent.nbytes

    # ---- attention

    def update_and_fetch(self, keys: mx.array, values: mx.array | None) -> tuple[Any, Any]:
        """Append rows; (codes, scales, biases) of all keys and all values, rotated."""
        self._recent.update_and_fetch(keys, values)
        return self._update_codes(keys, values)

    def _update_codes(self, keys: mx.array, values: mx.array | None) -> tuple[Any, Any]:
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
        value_dim = self.latent if values is None else values.shape[-1]
        float_held = mx.array([n + L for n in self._recent._held])
        fk, fv = self._recent.update_and_fetch(keys, values)
        (k, v), (on_keys, on_values) = self._update_codes(keys, values), self.quantizers
        # The heads that share a key lie one after another: as so many more tokens.
        q = (queries * scale).reshape(B, keys.shape[1], -1, key_dim)
        turned = mlx_codec.rotate(q, on_keys.hadamard(key_dim))
        group, bits = on_keys.group(key_dim), on_keys.bits
        if q.shape[2] < self.decode_from:
            scores = _times_codes(turned, k, transpose=True, group_size=group, bits=bits)
        else:
            scores = turned @ _decoded(k, turned.dtype, group, bits).swapaxes(-1, -2)
        scores = _by_token(scores, L)
        split = scores.shape[-1] - fk.shape[2]
        exact = _by_token(q @ fk.astype(q.dtype).swapaxes(-1, -2), L)
        near = _near(L, self._recent.window, float_held, fk.shape[2])
        tail = mx.where(near, exact, scores[..., split:])
        weights = _softmax(mx.concatenate([scores[..., :split], tail], axis=-1), mask)
        tail = weights[..., split:]
        on_codes = mx.concatenate([weights[..., :split], mx.where(near, 0, tail)], axis=-1)
        group = group if self.latent else on_values.group(value_dim)
        shape = (*q.shape[:3], -1)
        out = _times_codes(
            on_codes.reshape(shape), v, transpose=False, group_size=group, bits=on_values.bits
        )
        out = mlx_codec.rotate(
            out,
            (on_keys if self.latent else on_values).hadamard(key_dim if self.latent else value_dim),
        )
        out = out + mx.where(near, tail, 0).reshape(shape) @ fv.astype(q.dtype)
        return cast(mx.array, out.reshape(B, n_heads, L, value_dim))


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


def _decoded(codes: Sequence[mx.array], dtype: mx.Dtype, group: int, bits: int) -> mx.array:
    """Rotated still."""
    words, *factors = codes
    scales, biases = (x.astype(dtype) for x in factors)
    return mx.dequantize(words, scales, biases, group_size=group, bits=bits)


def _by_token(scores: mx.array, n_tokens: int) -> mx.array:
    """(B, n_kv_heads, heads * n_tokens, columns) with an axis for the heads that share a key."""
    return scores.reshape(*scores.shape[:2], -1, n_tokens, scores.shape[-1])


def _near(n_tokens: int, window: int, held: mx.array, columns: int) -> mx.array:
    """Which of the last `columns` each of the last tokens sees in float16."""
    column = mx.arange(columns)
    ahead = column[-n_tokens:, None] - column
    near = (ahead >= 0) & (ahead < window)
    return near & (column >= columns - held[:, None, None, None, None])


def _softmax(scores: mx.array, mask: Mask) -> mx.array:
    """(B, n_kv_heads, heads, n_tokens, columns)."""
    if mask is None:
        return mx.softmax(scores, axis=-1, precise=True)
    if isinstance(mask, str):
        column = mx.arange(scores.shape[-1])
        mask = column <= column[-scores.shape[-2] :, None]
    elif mask.ndim == 4:
        mask = mask[:, :, None]
    scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return mx.softmax(scores, axis=-1, precise=True)
