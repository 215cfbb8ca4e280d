"""Attention that asks the cache: what takes the place of `self_attn` in mlx-lm's models.

mlx-lm's own modules call scaled_dot_product_attention, which cannot turn queries the way a codec
has turned the keys, and expand MLA's latents to full keys and values before they cache them. These
modules take over the projections of the ones they replace, as LoRA layers do, and leave appending
and attending to the cache (mlx_cache). Nothing in mlx-lm is patched. A cached key is in half-split
order, whatever the model's weights are in.
"""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.base import Module

from actors.engines.mlx_float_cache import BatchKVCache, Mask


class GroupedAttention(Module):
    """Multi-head and grouped-query attention: Llama, Qwen 2 and 3, Gemma 3."""

    def __init__(self, inner: Any, rope: Any = None) -> None:
        """inner: the module it replaces; rope: instead of its own."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.q_proj, self.k_proj = inner.q_proj, inner.k_proj
        self.v_proj, self.o_proj = inner.v_proj, inner.o_proj
        self.normed = "q_norm" in inner
        if self.normed:
            self.q_norm, self.k_norm = inner.q_norm, inner.k_norm
        self.rope = rope or inner.rope
        self.n_heads, self.n_kv_heads, self.scale = inner.n_heads, inner.n_kv_heads, inner.scale

    def __call__(self, x: mx.array, mask: Mask, cache: BatchKVCache) -> mx.array:
        B, L, _ = x.shape
        q = self.q_proj(x).reshape(B, L, self.n_heads, -1)
        k = self.k_proj(x).reshape(B, L, self.n_kv_heads, -1)
        v = self.v_proj(x).reshape(B, L, self.n_kv_heads, -1)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(0, 2, 1, 3) for y in (q, k, v))
        offset = cache.offset
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        out = cache.attend(q, k, v, self.scale, mask)
        return cast(mx.array, self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1)))


class LatentAttention(Module):
    """MLA (DeepSeek V2) over the latents themselves: one key per token, [latent, rope part], whose
    latent is the value, too. What expands a latent is folded into query and output."""

    def __init__(
        self, inner: Any, expand_keys: mx.array, expand_values: mx.array, eps: float
    ) -> None:
        """expand_keys: (n_heads, latent, dims without rope), expand_values: (n_heads, dims of a
        value, latent); `inner` as GroupedAttention, without its kv_b_proj."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.lowered = "q_a_proj" in inner
        if self.lowered:
            self.q_a_proj, self.q_b_proj = inner.q_a_proj, inner.q_b_proj
            self.q_a_layernorm = inner.q_a_layernorm
            self.q_a_layernorm.eps = eps
        else:
            self.q_proj = inner.q_proj
        self.kv_a_proj_with_mqa = inner.kv_a_proj_with_mqa
        self.kv_a_layernorm = inner.kv_a_layernorm
        self.kv_a_layernorm.eps = eps
        self.o_proj = inner.o_proj
        self.expand_keys, self.expand_values = expand_keys, expand_values
        self.n_heads, self.latent = inner.num_heads, inner.kv_lora_rank
        self.nope, self.scale = inner.qk_nope_head_dim, inner.scale
        rope = inner.rope
        self._freqs, self.mscale = rope._freqs, rope.mscale

    def __call__(self, x: mx.array, mask: Mask, cache: BatchKVCache) -> mx.array:
        B, L, _ = x.shape
        low = self.q_a_layernorm(self.q_a_proj(x)) if self.lowered else x
        q = (self.q_b_proj if self.lowered else self.q_proj)(low)
        q = q.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3)
        q_nope, q_rope = mx.split(q, [self.nope], axis=-1)
        c, k_rope = mx.split(self.kv_a_proj_with_mqa(x)[:, None], [self.latent], axis=-1)
        offset = cache.offset
        k = mx.concatenate([self.kv_a_layernorm(c), self._turn(k_rope, offset)], axis=-1)
        q_latent = q_nope @ self.expand_keys.swapaxes(-1, -2)
        q = mx.concatenate([q_latent, self._turn(q_rope, offset)], axis=-1)
        out = cache.attend(q, k, None, self.scale, mask) @ self.expand_values.swapaxes(-1, -2)
        return cast(mx.array, self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, L, -1)))

    def _turn(self, x: mx.array, offset: mx.array) -> mx.array:
        """Rope over interleaved pairs, which come out in half-split order."""
        d = x.shape[-1]
        x = x.reshape(*x.shape[:-1], d // 2, 2).swapaxes(-1, -2).reshape(x.shape) * self.mscale
        return mx.fast.rope(
            x, d, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )


class FactoredRope(Module):
    """Rope whose wave lengths a file stretches one by one (Llama 3.1: rope_freqs)."""

    def __init__(self, dims: int, base: float, factors: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dims = dims
        self._freqs = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims) * factors

    def __call__(self, x: mx.array, offset: mx.array) -> mx.array:
        return mx.fast.rope(
            x, self.dims, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )
