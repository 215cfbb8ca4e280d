"""A GGUF as one of mlx-lm's models: the file's fields and tensors, renamed and put in MLX's order.

llama.cpp has loaded the file before (mlx_models), so it is sound; what MLX cannot say is refused.
Weights are dequantized to the dtype asked for, or, where MLX has the format, taken over as they
are: Q4_0, Q4_1 and Q8_0 are MLX's affine codes in groups of 32.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES
from mlx.nn.layers.quantized import quantize

from actors.engines.llama_q4 import from_q4_1_numpy
from actors.engines.mlx_gguf_file import GgufFile, Tensor, Type
from storage.spec import ModelCacheSpec

_MODULES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text",
            "deepseek2": "deepseek_v2"}  # fmt: skip
_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
# An architecture's fields that are taken over, or that change nothing here. llama.cpp computes by
# many more: a model with one of those would be computed otherwise.
_FIELDS = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.key_length_mla", "attention.kv_lora_rank", "attention.layer_norm_rms_epsilon",
    "attention.q_lora_rank", "attention.sliding_window", "attention.sliding_window_pattern",
    "attention.value_length", "attention.value_length_mla", "block_count", "context_length",
    "embedding_length", "expert_count", "expert_feed_forward_length", "expert_gating_func",
    "expert_shared_count", "expert_used_count", "expert_weights_norm", "expert_weights_scale",
    "feed_forward_length", "leading_dense_block_count", "mm.tokens_per_image",
    "nextn_predict_layers", "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa",
    "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "rope.scaling.type", "tensor_data_layout", "vocab_size",
}  # fmt: skip


def build(
    file: GgufFile, spec: ModelCacheSpec, rope: dict[str, Any], dtype: mx.Dtype, *, packed: bool
) -> Any:
    """The model with its weights. `packed`: keep quantized weights that MLX has a format for.
    Raises ModelUnavailable."""
    arch = spec.architecture
    if arch not in _MODULES:
        raise file.refuse(f"architecture {arch}")
    _check_fields(file, spec, rope)
    module = importlib.import_module(f"mlx_lm.models.{_MODULES[arch]}")
    model = module.Model(module.ModelArgs.from_dict(_config(file, spec, rope)))
    weights: dict[str, mx.array] = {}
    for name, tensor in _tensors(file, spec):
        stem = name.rpartition(".")[0]
        try:
            for suffix, array in _weights(tensor, dtype, packed and name.endswith(".weight")):
                weights[f"{stem}.{suffix}" if suffix else name] = array
        except NotImplementedError as error:  # gguf's
            raise file.refuse(f"{name} of type {tensor.type.name}") from error
    if arch == "gemma3":
        model.sanitize(weights)  # ties the head to the embedding where there is none
        for name in weights:
            if name.endswith("norm.weight"):
                weights[name] = weights[name] - 1  # MLX adds one to them
    _quantize(model, weights)
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        names = ", ".join(str(error).rstrip(".").splitlines()[1:4])
        raise file.refuse(f"{arch} with weights that are missing or unknown ({names})") from error
    return model


def _check_fields(file: GgufFile, spec: ModelCacheSpec, rope: dict[str, Any]) -> None:
    """Raises ModelUnavailable for what llama.cpp would heed and the model of `_config` cannot."""
    arch = spec.architecture
    for name, value in file.fields.items():
        if name.startswith(f"{arch}.") and name.removeprefix(f"{arch}.") not in _FIELDS:
            raise file.refuse(f"{name} = {value}")
    if file.fields.get("split.count", 1) > 1:
        raise file.refuse("a GGUF in several files (gguf-split --merge makes one)")
    dims, head_dim = int(rope["dims"]), spec.layers[0].key_dim
    if arch != "deepseek2" and dims != head_dim:
        raise file.refuse(f"rope over {dims} of {head_dim} dims")


def _config(file: GgufFile, spec: ModelCacheSpec, rope: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm's ModelArgs of the architecture want."""
    arch, tensors = spec.architecture, file.tensors

    def field(name: str, default: Any = None) -> Any:
        value = file.fields.get(f"{arch}.{name}", default)
        if value is None:
            raise file.refuse(f"{arch} without {name}")
        return value

    hidden, heads = field("embedding_length"), field("attention.head_count")
    config = {
        "model_type": _MODULES[arch],
        "hidden_size": hidden,
        "num_hidden_layers": len(spec.layers),
        "intermediate_size": field("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": spec.layers[0].n_kv_heads,
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "head_dim": spec.layers[0].key_dim,
        "max_position_embeddings": field("context_length"),
        "rope_theta": rope["base"],
        "rope_scaling": _scaling(file, arch, rope),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if len({(x.n_kv_heads, x.key_dim, x.value_dim) for x in spec.layers}) > 1:
        raise file.refuse("layers of different shapes")
    if any(n.endswith("_exps.weight") for n in tensors):
        raise file.refuse("experts in a GGUF (load the model as an MLX directory)")
    if arch == "gemma3":
        whole = len(spec.layers) == 62  # llama.cpp's gemma3.cpp: 27B divides by the hidden size
        config["query_pre_attn_scalar"] = hidden // heads if whole else spec.layers[0].key_dim
        config["rope_local_base_freq"] = rope.get("base_sliding", 10000.0)
        config["sliding_window"] = spec.window
        config["sliding_window_pattern"] = _period(file, spec)
    if arch == "deepseek2":
        rope_dims = int(rope["dims"])
        config |= {
            "num_key_value_heads": heads,
            "kv_lora_rank": field("attention.kv_lora_rank"),
            "q_lora_rank": file.fields.get(f"{arch}.attention.q_lora_rank"),
            "qk_rope_head_dim": rope_dims,
            "qk_nope_head_dim": field("attention.key_length_mla") - rope_dims,
            "v_head_dim": field("attention.value_length_mla"),
        }
        if "blk.0.attn_q.weight" in tensors:
            config["q_lora_rank"] = None
    return config


def _scaling(file: GgufFile, arch: str, rope: dict[str, Any]) -> dict[str, Any] | None:
    kind, factor = rope["scaling"], rope["factor"]
    if kind == "none" or factor == 1.0:
        return {"factor": 1.0} if arch == "deepseek2" else None
    if kind == "linear" and arch != "deepseek2":
        return {"rope_type": "linear", "factor": factor}
    raise file.refuse(f"rope scaling {kind}")


def _period(file: GgufFile, spec: ModelCacheSpec) -> int:
    """mlx-lm knows sliding layers by a period only."""
    slides = [layer.kind == "sliding" for layer in spec.layers]
    period = slides.index(False) + 1
    if slides != [i % period != period - 1 for i in range(len(slides))]:
        raise file.refuse(f"sliding layers {[i for i, x in enumerate(slides) if x]}")
    return period


def _tensors(file: GgufFile, spec: ModelCacheSpec) -> Iterator[tuple[str, Tensor]]:
    """(mlx-lm's name, tensor), rows of q and k in half-split order."""
    arch = spec.architecture
    names = _NAMES | (_GEMMA_NAMES if arch == "gemma3" else {})
    heads = {
        "attn_q": file.fields[f"{arch}.attention.head_count"],
        "attn_k": spec.layers[0].n_kv_heads,
    }
    for name, tensor in file.tensors.items():
        stem, _, kind = name.rpartition(".")
        block, layer, part = stem.rpartition(".")[0], "", stem
        if block.startswith("blk."):
            layer, part = f"model.layers.{block[4:]}.", stem.rpartition(".")[2]
        if name == "rope_freqs.weight" or part in ("attn_k_b", "attn_v_b"):
            continue
        if part not in names:
            raise file.refuse(f"{arch} with {name}")
        if arch == "llama" and part in heads:
            tensor = _half_split(tensor, heads[part])
        yield f"{layer}{names[part]}.{kind}", tensor
    if arch == "deepseek2":
        for i in range(sum(name.endswith("attn_k_b.weight") for name in file.tensors)):
            k, v = (file.tensors[f"blk.{i}.attn_{x}_b.weight"].floats() for x in "kv")
            joined = np.concatenate([k.swapaxes(1, 2), v], axis=1).reshape(-1, k.shape[1])
            rows = np.ascontiguousarray(joined).view(np.uint8)
            yield (
                f"model.layers.{i}.self_attn.kv_b_proj.weight",
                Tensor(joined.shape, Type.F32, rows),
            )


def _half_split(tensor: Tensor, n_heads: int) -> Tensor:
    """Undo the row order that llama.cpp's converter gives q and k of the llama architecture."""
    rows = tensor.rows if len(tensor.shape) > 1 else tensor.rows.reshape(tensor.shape[0], -1)
    turned = rows.reshape(n_heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    return Tensor(tensor.shape, tensor.type, turned.reshape(tensor.rows.shape))


def _weights(tensor: Tensor, dtype: mx.Dtype, packed: bool) -> Iterator[tuple[str, mx.array]]:
    """(suffix, array): the weight itself, or codes, scales and biases."""
    if not packed or tensor.type not in (Type.Q4_0, Type.Q4_1, Type.Q8_0):
        yield "", mx.array(tensor.floats()).astype(dtype)
        return
    blocks = tensor.rows.reshape(tensor.shape[0], -1, GGML_QUANT_SIZES[tensor.type][1])
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    if tensor.type == Type.Q8_0:  # signed bytes: shifted by 128
        codes = (blocks[..., 2:] ^ np.uint8(128)).reshape(tensor.shape[0], -1).view("<u4")
        biases = (scales.astype(np.float32) * -128).astype("<f2")
    elif tensor.type == Type.Q4_1:
        codes, scales, biases = from_q4_1_numpy(tensor.rows, interleaved=False)
    else:  # Q4_0 is Q4_1 with a range around zero
        m = (scales.astype(np.float32) * -8).astype("<f2")
        whole = np.concatenate([blocks[..., :2], m[..., None].view(np.uint8), blocks[..., 2:]], -1)
        codes, scales, biases = from_q4_1_numpy(
            whole.reshape(tensor.shape[0], -1), interleaved=False
        )
    yield "weight", mx.array(codes)
    yield "scales", mx.array(scales)
    yield "biases", mx.array(biases)


def _quantize(model: Any, weights: dict[str, mx.array]) -> None:
    """Make modules whose weights are packed quantized ones."""

    def parameters(path: str, module: Any) -> bool | dict[str, int]:
        if f"{path}.scales" not in weights:
            return False
        bits = (
            32 * weights[f"{path}.weight"].shape[-1] // (32 * weights[f"{path}.scales"].shape[-1])
        )
        return {"group_size": 32, "bits": bits}

    quantize(model, class_predicate=parameters)
