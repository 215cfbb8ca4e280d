"""Tiny random models as GGUF files: hidden 128, 4 heads, 2 KV heads, head dim 32, 2 layers or more.

The tokenizer and chat template are SmolLM2's. Weights are seeded and large enough that logits
differ clearly, so that a wrong row changes the next token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, RopeScalingType

HIDDEN, HEADS, FFN = 128, 4, 256
SMALL_VOCAB = 320  # every byte, and enough for tests that do not read the text
LATENT, ROPE, NOPE = 64, 32, 32  # deepseek2: kv_lora_rank, dims with rope, dims without

Fields = dict[str, tuple[Any, list[GGUFValueType]]]
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """What differs between the models."""

    arch: str
    seed: int
    layers: int = 2
    kv_heads: tuple[int, ...] = (2,)  # of each layer, or one for all
    head_dim: int = 32
    window: int = 0
    pattern: tuple[bool, ...] = ()  # which layers slide; (): llama.cpp's own for the architecture
    mtp: int = 0  # layers of a multi-token-prediction head, after the others

    def kv_heads_of(self, layer: int) -> int:
        return self.kv_heads[layer % len(self.kv_heads)]


SHAPES = {
    "llama": Shape("llama", 1),
    "qwen2": Shape("qwen2", 2),
    "gemma3": Shape("gemma3", 3, layers=7, window=64),  # layer 5 is full, the other six slide
    "no_template": Shape("llama", 4),
    "qwen3": Shape("qwen3", 6, head_dim=64),  # not hidden / heads
    "llama64": Shape("llama", 12, head_dim=64),  # for quantized cells
    "llama128": Shape("llama", 13, head_dim=128),
    "deepseek2": Shape("deepseek2", 7, kv_heads=(1,), head_dim=LATENT + ROPE),
    # Arrays where the others have one number: which layers slide, and layers of several geometries.
    "pattern": Shape("gemma3", 8, layers=4, window=64, pattern=(False, True, True, False)),
    "uneven": Shape("deci", 9, layers=5, kv_heads=(1, 2, 2, 1, 4)),
    "mtp": Shape("deepseek2", 7, kv_heads=(1,), head_dim=LATENT + ROPE, mtp=1),
    "mamba": Shape("mamba", 10),
    "gemma2": Shape("gemma2", 11, window=64),
}


def write_all(folder: Path, tokenizer_from: Path) -> dict[str, Path]:
    """All but mamba (recurrent), gemma2 (slides in another pattern), truncated and garbage can be
    served."""
    tokenizer = _tokenizer(tokenizer_from)
    small = _cut(tokenizer)
    fields = {"llama": tokenizer, "no_template": _without_template(small)}
    paths = {name: folder / f"{name}.gguf" for name in (*SHAPES, "truncated", "garbage")}
    for name, shape in SHAPES.items():
        _write(paths[name], shape, fields.get(name, small))
    raw = paths["no_template"].read_bytes()
    paths["truncated"].write_bytes(raw[: len(raw) * 2 // 3])
    paths["garbage"].write_bytes(np.random.default_rng(5).bytes(10_000))
    return paths


def _tokenizer(path: Path) -> Fields:
    """Every tokenizer.* field: (value, its GGUF types). Reading the vocabulary takes seconds."""
    fields = GGUFReader(path).fields
    return {k: (f.contents(), f.types) for k, f in fields.items() if k.startswith("tokenizer.")}


def _cut(tokenizer: Fields) -> Fields:
    """The first tokens only, and the merges among them."""
    tokens = tokenizer["tokenizer.ggml.tokens"][0][:SMALL_VOCAB]
    known = set(tokens)
    cut = dict(tokenizer)
    for name, (value, types) in tokenizer.items():
        if name.endswith(".merges"):
            cut[name] = ([m for m in value if m.replace(" ", "", 1) in known], types)
        elif isinstance(value, list):
            cut[name] = (value[:SMALL_VOCAB], types)
    return cut


def _without_template(tokenizer: Fields) -> Fields:
    return {k: v for k, v in tokenizer.items() if k != "tokenizer.chat_template"}


def _write(path: Path, shape: Shape, tokenizer: Fields) -> None:
    writer = GGUFWriter(path, shape.arch)
    writer.add_block_count(shape.layers + shape.mtp)
    if shape.mtp:
        writer.add_nextn_predict_layers(shape.mtp)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.arch == "mamba":
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * HIDDEN)
        writer.add_ssm_state_size(8)
        writer.add_ssm_time_step_rank(8)
    else:
        _write_attention(writer, shape)
    for name, (value, types) in tokenizer.items():
        sub_type = types[1] if len(types) > 1 else None
        writer.add_key_value(name, value, types[0], sub_type)
    for name, tensor in _tensors(shape, len(tokenizer["tokenizer.ggml.tokens"][0])).items():
        bare = name.endswith((".bias", ".ssm_a", ".ssm_d"))
        writer.add_tensor(name if bare else f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_attention(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    heads = shape.kv_heads
    writer.add_head_count_kv(list(heads) if len(heads) > 1 else heads[0])
    # gemma3 turns the keys of sliding layers with 10,000 whatever is written here
    writer.add_rope_freq_base(1e6 if shape.window else 1e4)
    if shape.arch == "deepseek2":
        writer.add_key_length(LATENT + ROPE)
        writer.add_value_length(LATENT)
        writer.add_key_length_mla(NOPE + ROPE)
        writer.add_value_length_mla(NOPE)
        writer.add_kv_lora_rank(LATENT)
        writer.add_q_lora_rank(48)
        writer.add_rope_dimension_count(ROPE)
        writer.add_leading_dense_block_count(shape.layers + shape.mtp)
        writer.add_expert_feed_forward_length(FFN)
        writer.add_expert_shared_count(0)
    elif shape.arch in ("llama", "qwen2", "deci"):
        writer.add_rope_dimension_count(shape.head_dim)
    if shape.arch != "deepseek2" and (shape.window or HEADS * shape.head_dim != HIDDEN):
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    if shape.arch == "deci":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_scaling_orig_ctx_len(2048)
    if shape.window:
        writer.add_sliding_window(shape.window)
    if shape.pattern:
        writer.add_sliding_window_pattern(list(shape.pattern))


def _tensors(shape: Shape, n_vocab: int) -> Tensors:
    rng = np.random.default_rng(shape.seed)

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n_out, n_in), np.float32) * gain / n_in**0.5).astype("f2")

    ones = np.ones(HIDDEN, np.float32)
    tensors = {
        "token_embd": matrix(n_vocab, HIDDEN, HIDDEN**0.5),
        "output": matrix(n_vocab, HIDDEN, 3.0),
        "output_norm": ones,
    }
    if shape.arch == "gemma2":
        del tensors["output"]  # always tied
    layer_of = {"mamba": _mamba_layer, "deepseek2": _latent_layer}.get(shape.arch, _layer)
    for i in range(shape.layers + shape.mtp):
        layer = {"attn_norm": ones} | layer_of(shape, i, matrix, rng)
        if i >= shape.layers:
            layer |= {"nextn.enorm": ones, "nextn.hnorm": ones}
            layer["nextn.eh_proj"] = matrix(HIDDEN, 2 * HIDDEN)
        if shape.arch != "mamba":
            layer |= {
                "ffn_norm": ones,
                "ffn_gate": matrix(FFN, HIDDEN),
                "ffn_up": matrix(FFN, HIDDEN),
                "ffn_down": matrix(HIDDEN, FFN),
            }
        tensors |= {f"blk.{i}.{name}": tensor for name, tensor in layer.items()}
    return tensors


def _layer(
    shape: Shape, i: int, matrix: Callable[..., np.ndarray], rng: np.random.Generator
) -> Tensors:
    q, kv = HEADS * shape.head_dim, shape.kv_heads_of(i) * shape.head_dim
    ones, head = np.ones(HIDDEN, np.float32), np.ones(shape.head_dim, np.float32)
    layer = {
        "attn_q": matrix(q, HIDDEN, 2.0),
        "attn_k": matrix(kv, HIDDEN, 2.0),
        "attn_v": matrix(kv, HIDDEN, 2.0),
        "attn_output": matrix(HIDDEN, q, 2.0),
    }
    if shape.arch == "qwen2":
        for side, n in (("q", q), ("k", kv), ("v", kv)):
            layer[f"attn_{side}.bias"] = rng.standard_normal(n, np.float32) / 4
    if shape.arch in ("gemma3", "qwen3"):
        layer |= {"attn_q_norm": head, "attn_k_norm": head}
    if shape.window:
        layer |= {"post_attention_norm": ones, "post_ffw_norm": ones}
    return layer


def _latent_layer(
    shape: Shape, i: int, matrix: Callable[..., np.ndarray], rng: np.random.Generator
) -> Tensors:
    return {
        "attn_q_a": matrix(48, HIDDEN),
        "attn_q_a_norm": np.ones(48, np.float32),
        "attn_q_b": matrix(HEADS * (NOPE + ROPE), 48, 2.0),
        "attn_kv_a_mqa": matrix(LATENT + ROPE, HIDDEN, 2.0),
        "attn_kv_a_norm": np.ones(LATENT, np.float32),
        "attn_k_b": matrix(HEADS * LATENT, NOPE).reshape(HEADS, LATENT, NOPE),
        "attn_v_b": matrix(HEADS * NOPE, LATENT).reshape(HEADS, NOPE, LATENT),
        "attn_output": matrix(HIDDEN, HEADS * NOPE, 2.0),
    }


def _mamba_layer(
    shape: Shape, i: int, matrix: Callable[..., np.ndarray], rng: np.random.Generator
) -> Tensors:
    inner = 2 * HIDDEN
    return {
        "ssm_in": matrix(2 * inner, HIDDEN),
        "ssm_conv1d": matrix(inner, 4).astype(np.float32),
        "ssm_conv1d.bias": np.zeros(inner, np.float32),
        "ssm_x": matrix(8 + 2 * 8, inner),
        "ssm_dt": matrix(inner, 8),
        "ssm_dt.bias": np.zeros(inner, np.float32),
        "ssm_a": -np.ones((inner, 8), np.float32),
        "ssm_d": np.ones(inner, np.float32),
        "ssm_out": matrix(HIDDEN, inner),
    }
