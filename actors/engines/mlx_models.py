"""Model files -> what the MLX engine computes with: network, compatibility key, vocabulary.

From a GGUF, spec, rope, digests and tokenizer are llama.cpp's own: the key equals that of a llama
engine on the same file, and caches cross. From an MLX directory (config.json, safetensors,
tokenizer.json) the same things are read off the loaded model. Refuses, before it is ready, models
whose attention the caches cannot serve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.nn.layers.embedding import Embedding
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear

from actors.engines.base import Vocab
from actors.engines.mlx_attention import FactoredRope, GroupedAttention, LatentAttention
from actors.engines.mlx_float_cache import BatchKVCache
from actors.errors import ModelUnavailable
from storage.digests import describe
from storage.spec import CompatibilityKey, LayerSpec, ModelCacheSpec
from storage.weights import DIRECTORY_WEIGHTS, directory_digest

# mlx-lm's modules whose attention GroupedAttention or LatentAttention takes the place of, and the
# names that GGUFs give the same architectures
_ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3",
    "deepseek_v2": "deepseek2",
}  # fmt: skip


@dataclass
class Network:
    """One of mlx-lm's models, its attention in our hands. `embed_scale`: of the embedding."""

    net: Any
    key: CompatibilityKey
    vocab: Vocab
    n_ctx: int  # that it was trained for
    dtype: mx.Dtype
    close: Callable[[], None]
    embed_scale: float = 1.0

    def hidden(self, ids: mx.array, caches: list[BatchKVCache]) -> mx.array:
        """(B, L) ids -> (B, L, hidden), rows appended to the caches."""
        if self.embed_scale == 1.0:
            return cast(mx.array, self.net.model(ids, caches))
        h = self.net.model.embed_tokens(ids) * self.embed_scale
        return cast(mx.array, self.net.model(ids, caches, h))

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., hidden) -> (..., vocabulary) float32."""
        net = self.net
        head = net.lm_head if "lm_head" in net else net.model.embed_tokens.as_linear
        return cast(mx.array, head(hidden)).astype(mx.float32)


def default_dtype() -> mx.Dtype:
    """float16 is ten times slower on a CPU."""
    return mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16


def load(path: Path, *, dtype: mx.Dtype | None = None, packed: bool | None = None) -> Network:
    """A GGUF file or an MLX directory. `packed`: keep a GGUF's quantized weights where MLX has the
    format; by default on a GPU. Raises ModelUnavailable."""
    dtype = dtype or default_dtype()
    if packed is None:
        packed = dtype != mx.float32
    network = _directory(path, dtype) if path.is_dir() else _gguf(path, dtype, packed)
    if dtype == mx.float32:
        _lay_for_cpu(network.net)
    mx.eval(network.net.parameters())  # what is lazy belongs to this thread
    return network


def _lay_for_cpu(net: Any) -> None:
    """MLX multiplies x @ weight.T on a CPU up to three times faster when weight.T, and not weight,
    lies in memory row by row."""
    tied = [] if "lm_head" in net else [net.model.embed_tokens]
    linear = [module for module in net.modules() if type(module) is Linear]
    for module in linear + tied:
        if isinstance(module, (Linear, Embedding)):
            module.weight = mx.contiguous(module.weight.T).T
            mx.eval(module.weight)


def _gguf(path: Path, dtype: mx.Dtype, packed: bool) -> Network:
    try:
        from actors.engines import mlx_gguf, mlx_gguf_file, mlx_gguf_spec
    except ImportError as error:
        raise ModelUnavailable(
            f"{path}: a GGUF's tokenizer is llama.cpp's; install it (pip install '.[llama]')"
        ) from error
    described = mlx_gguf_spec.describe(path)
    spec, rope = described.key.spec, dict(described.key.rope)
    file = mlx_gguf_file.read(path)
    try:
        net = mlx_gguf.build(file, spec, rope, dtype, packed=packed)
        factors = file.tensors.get("rope_freqs.weight")
        own_rope = None
        if factors is not None:
            own_rope = FactoredRope(
                int(rope["dims"]), float(rope["base"]), mx.array(factors.floats())
            )
        _take_over(net, spec.architecture, path, own_rope)
    except ModelUnavailable:
        described.close()
        raise
    network = Network(net, described.key, described.vocab, described.n_ctx, dtype, described.close)
    if spec.architecture == "gemma3":  # llama.cpp's factor is exact, mlx-lm's is rounded
        root = mx.array(net.args.hidden_size**0.5)
        factor: Any = (root / root.astype(mx.bfloat16).astype(mx.float32)).item()
        network.embed_scale = factor
    return network


def _directory(path: Path, dtype: mx.Dtype) -> Network:
    from mlx_lm.utils import load_config, load_model

    from actors.engines.mlx_vocab import DirectoryVocab

    try:
        config = load_config(path)
        net, config = load_model(path, lazy=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelUnavailable(f"{path}: mlx-lm cannot load it ({error})") from error
    kind = type(net).__module__.rpartition(".")[2]
    sinks = [i for i, x in enumerate(net.layers) if "sinks" in getattr(x, "self_attn", {})]
    if sinks:
        raise ModelUnavailable(f"{path}: attention sinks in layers {sinks}, not supported")
    if kind not in _ARCHITECTURES:
        raise ModelUnavailable(f"{path}: model type {kind}, not supported by the mlx engine")
    if mx.default_device() == mx.Device(mx.cpu):
        net.set_dtype(dtype)
    spec, rope = _describe(net, _ARCHITECTURES[kind], path)
    _take_over(net, spec.architecture, path, None)
    vocab = DirectoryVocab(path, config, _n_vocab(net))
    key = CompatibilityKey(*_digests(path), rope=rope, spec=spec)
    n_ctx = int(config.get("max_position_embeddings", 1 << 20))
    return Network(net, key, vocab, n_ctx, dtype, lambda: None)


def _n_vocab(net: Any) -> int:
    return int(net.args.vocab_size)


def _describe(
    net: Any, arch: str, path: Path
) -> tuple[ModelCacheSpec, tuple[tuple[str, float | str], ...]]:
    """Spec and rope parameters, as llama_spec gives them for a GGUF of the same model."""
    args, layers = net.args, []
    window = int(getattr(args, "sliding_window", 0) or 0)
    for layer in net.layers:
        attention = layer.self_attn
        if arch == "deepseek2":
            dims = attention.kv_lora_rank + attention.qk_rope_head_dim
            layers.append(LayerSpec("latent", 1, dims, 0))
            continue
        dim = attention.k_proj.weight.shape[0] // attention.n_kv_heads
        slides = getattr(attention, "is_sliding", getattr(layer, "use_sliding", False))
        kind, size = ("sliding", window) if slides else ("full", 0)
        layers.append(LayerSpec(kind, attention.n_kv_heads, dim, dim, size))  # type: ignore[arg-type]
    scaling = args.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "none"))
    if kind not in ("none", "default", "linear", "llama3", "yarn", "deepseek_yarn"):
        raise ModelUnavailable(f"{path}: rope scaling {kind}, not supported")
    scaled = kind in ("linear", "yarn", "deepseek_yarn")  # Llama 3.1's factors count as weights
    rope: dict[str, float | str] = {
        "base": float(args.rope_theta),
        "dims": float(args.qk_rope_head_dim if arch == "deepseek2" else layers[0].key_dim),
        "factor": float(scaling["factor"]) if scaled else 1.0,
        "scaling": ("linear" if kind == "linear" else "yarn") if scaled else "none",
    }
    if arch == "deepseek2":
        rope["offset"] = float(args.kv_lora_rank)
    if arch == "gemma3":
        rope["base_sliding"] = float(args.rope_local_base_freq)
    if rope["scaling"] == "yarn":
        rope["original_context_length"] = float(scaling["original_max_position_embeddings"])
        if scaling.get("mscale_all_dim"):
            rope["yarn_log_multiplier"] = 0.1 * float(scaling["mscale_all_dim"])
    return ModelCacheSpec(arch, tuple(layers)), tuple(rope.items())


def _take_over(net: Any, arch: str, path: Path, rope: Any) -> None:
    """Put our attention in the place of the model's."""
    for i, layer in enumerate(net.layers):
        inner = layer.self_attn
        if arch == "deepseek2":
            keys, values = _expansion(inner)
            layer.self_attn = LatentAttention(inner, keys, values, float(net.args.rms_norm_eps))
            continue
        if getattr(inner.rope, "traditional", False):
            raise ModelUnavailable(f"{path}: interleaved rope in layer {i}, not supported")
        layer.self_attn = GroupedAttention(inner, rope)


def _expansion(inner: Any) -> tuple[mx.array, mx.array]:
    """kv_b_proj as one matrix per head for keys, (n_heads, latent, nope), and for values."""
    linear = inner.kv_b_proj
    weight = linear.weight
    if isinstance(linear, QuantizedLinear):
        weight = mx.dequantize(
            weight, linear.scales, linear.biases, group_size=linear.group_size, bits=linear.bits
        )
    heads = weight.reshape(inner.num_heads, -1, inner.kv_lora_rank)
    keys, values = mx.split(heads, [inner.qk_nope_head_dim], axis=1)
    return keys.swapaxes(1, 2), values


def _digests(path: Path) -> tuple[str, str]:
    """(weights, tokenizer) sha256 over the names and digests of a directory's files."""

    def digest(patterns: tuple[str, ...]) -> str:
        found = sorted({file for pattern in patterns for file in path.glob(pattern)})
        return directory_digest([describe(file) for file in found])

    return digest(DIRECTORY_WEIGHTS), digest(("tokenizer.json",))
