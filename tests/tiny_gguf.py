"""Tiny random models as GGUF files: 2 layers, hidden 128, 4 heads, 2 KV heads, head dim 32.

The tokenizer and chat template are SmolLM2's. Weights are seeded and large enough that logits
differ clearly, so that a wrong row changes the next token.
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 2, 128, 4, 2, 32, 256
SMALL_VOCAB = 320  # of the files that are refused before their tokenizer matters

Fields = dict[str, tuple[Any, list[GGUFValueType]]]


def write_all(folder: Path, tokenizer_from: Path) -> dict[str, Path]:
    """llama and qwen2 can be served; gemma3 (sliding), truncated and garbage cannot."""
    tokenizer = _tokenizer(tokenizer_from)
    names = ("llama", "qwen2", "gemma3", "truncated", "garbage", "no_template")
    paths = {name: folder / f"{name}.gguf" for name in names}
    _write(paths["llama"], "llama", tokenizer, seed=1)
    small = _cut(tokenizer)
    _write(paths["qwen2"], "qwen2", small, seed=2)
    _write(paths["gemma3"], "gemma3", small, seed=3)
    _write(paths["no_template"], "llama", _without_template(small), seed=4)
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


def _write(path: Path, arch: str, tokenizer: Fields, seed: int) -> None:
    writer = GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if arch == "gemma3":
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        writer.add_sliding_window(64)
    else:
        writer.add_rope_dimension_count(HEAD_DIM)
    for name, (value, types) in tokenizer.items():
        sub_type = types[1] if len(types) > 1 else None
        writer.add_key_value(name, value, types[0], sub_type)
    for name, tensor in _tensors(arch, len(tokenizer["tokenizer.ggml.tokens"][0]), seed).items():
        writer.add_tensor(name if name.endswith(".bias") else f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(arch: str, n_vocab: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    kv = KV_HEADS * HEAD_DIM

    def matrix(n_out: int, n_in: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal((n_out, n_in), np.float32) * gain / n_in**0.5).astype("f2")

    ones = np.ones(HIDDEN, np.float32)
    tensors = {
        "token_embd": matrix(n_vocab, HIDDEN, HIDDEN**0.5),
        "output": matrix(n_vocab, HIDDEN, 3.0),
        "output_norm": ones,
    }
    for i in range(LAYERS):
        tensors |= {
            f"blk.{i}.attn_norm": ones,
            f"blk.{i}.ffn_norm": ones,
            f"blk.{i}.attn_q": matrix(HEADS * HEAD_DIM, HIDDEN, 2.0),
            f"blk.{i}.attn_k": matrix(kv, HIDDEN, 2.0),
            f"blk.{i}.attn_v": matrix(kv, HIDDEN, 2.0),
            f"blk.{i}.attn_output": matrix(HIDDEN, HEADS * HEAD_DIM, 2.0),
            f"blk.{i}.ffn_gate": matrix(FFN, HIDDEN),
            f"blk.{i}.ffn_up": matrix(FFN, HIDDEN),
            f"blk.{i}.ffn_down": matrix(HIDDEN, FFN),
        }
        if arch == "qwen2":
            for side, n in (("q", HEADS * HEAD_DIM), ("k", kv), ("v", kv)):
                tensors[f"blk.{i}.attn_{side}.bias"] = rng.standard_normal(n, np.float32) / 4
        if arch == "gemma3":
            head = np.ones(HEAD_DIM, np.float32)
            tensors |= {f"blk.{i}.attn_q_norm": head, f"blk.{i}.attn_k_norm": head}
            tensors |= {f"blk.{i}.post_attention_norm": ones, f"blk.{i}.post_ffw_norm": ones}
    return tensors
