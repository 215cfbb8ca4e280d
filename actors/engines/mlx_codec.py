"""The codecs in MLX's own operations: for nodes whose KV cache lives in MLX arrays.

The same fields as storage.quantizers, array for array, so that what either side stores the other
loads without a conversion. The encoder gives the reference's bits: the same operations of float32
in the same order (that of `mx.hadamard_transform` is each backend's own, and `mx.quantize` has a
rule of its own, whose error is up to 5 % larger and whose float16 scales can overflow). Decoding is
the reference's up to rounding. Called by MLX engines; mlx is imported when something is encoded or
decoded, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from storage.quantizers import F16, MAX_HALF, Affine, Quantizer

if TYPE_CHECKING:
    import mlx.core as mx

_MAX = float(MAX_HALF)


def encode(quantizer: Quantizer, x: mx.array) -> dict[str, mx.array]:
    """(..., dim) -> field -> (..., width): bit for bit what `quantizer.encode` gives for the same
    values in float16, beyond whose range they saturate. Raises TypeError for a quantizer it does
    not know, ValueError for a dim that cannot be stored."""
    import mlx.core as mx

    x = mx.clip(x, -_MAX, _MAX).astype(mx.float16)
    if isinstance(quantizer, F16):
        return {"data": x}
    affine = _affine(quantizer)
    dim, bits = x.shape[-1], affine.bits
    group, per_word, levels = affine.group(dim), 32 // bits, 2**bits - 1
    x = _butterflies(x.astype(mx.float32), affine.hadamard(dim))
    grouped = x.reshape(*x.shape[:-1], dim // group, group)
    low = mx.clip(grouped.min(axis=-1), -_MAX, _MAX) + 0.0  # -0 becomes 0
    high = mx.clip(grouped.max(axis=-1), -_MAX, _MAX) + 0.0
    scales = ((high - low) / levels).astype(mx.float16)
    biases = low.astype(mx.float16)
    s, b = (y.astype(mx.float32)[..., None] for y in (scales, biases))
    inverse = mx.where(s == 0, 0.0, 1.0 / mx.where(s == 0, 1.0, s))
    q = mx.round(mx.clip((grouped - b) * inverse, 0, levels))
    words = q.astype(mx.uint32).reshape(*x.shape[:-1], dim // per_word, per_word)
    codes = (words << mx.arange(0, 32, bits, dtype=mx.uint32)).sum(axis=-1)
    return {"codes": codes, "scales": scales, "biases": biases}


def decode(quantizer: Quantizer, fields: Mapping[str, mx.array], dim: int) -> mx.array:
    """Field -> (..., width) to (..., dim) float16. Raises as encode."""
    import mlx.core as mx

    if isinstance(quantizer, F16):
        return fields["data"]
    affine = _affine(quantizer)
    x = mx.dequantize(
        fields["codes"],
        fields["scales"].astype(mx.float32),  # in float16 it would round before it rotates
        fields["biases"].astype(mx.float32),
        group_size=affine.group(dim),
        bits=affine.bits,
    )
    x = rotate(x, affine.hadamard(dim))
    return mx.clip(x, -_MAX, _MAX).astype(mx.float16)


def _affine(quantizer: Quantizer) -> Affine:
    if not isinstance(quantizer, Affine):
        raise TypeError(f"{quantizer!r} has no form in MLX")
    return quantizer


def rotate(x: mx.array, block: int) -> mx.array:
    """Every run of `block` values along the last axis times the orthonormal Hadamard matrix, which
    is its own inverse."""
    import mlx.core as mx

    if block == 1:
        return x
    runs = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return mx.hadamard_transform(runs, scale=block**-0.5).reshape(x.shape)


def _butterflies(x: mx.array, block: int) -> mx.array:
    """As rotate, with the sums in the order of storage.quantizers: the same bits."""
    import mlx.core as mx

    lead, dim, h = x.shape[:-1], x.shape[-1], 1
    while h < block:
        pairs = x.reshape(*lead, dim // (2 * h), 2, h)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = mx.stack([a + b, a - b], axis=-2)
        h *= 2
    return x.reshape(*lead, dim) * mx.array(block**-0.5, mx.float32)
