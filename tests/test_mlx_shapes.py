"""Models of other shapes than the tiny ones: MLX computes what llama.cpp does from a GGUF, and what
mlx-lm's own attention does from a directory; what it cannot compute it refuses.

Weights are random, norms included: a factor or a permutation left out would change every logit.
"""

import ctypes
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType, quants

from actors.config import ReplicaConfig
from actors.errors import ModelUnavailable
from actors.replica import ModelReplica
from tests.engine_contract import both
from tests.require import require
from tests.test_cross_engine import STORY, go_on, kl, open_llama, open_mlx, replace_rows
from tests.tiny_gguf import Fields, _cut, _tokenizer

pytestmark = pytest.mark.slow
SAME = 1e-4  # nats; measured: 2e-5
SAME_WEIGHTS = 0.03  # llama.cpp multiplies quantized weights with quantized activations
Q4_K_M, Q6_K = 15, 18  # llama_ftype


@dataclass(frozen=True)
class Odd:
    arch: str
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    layers: int = 2
    window: int = 0
    tied: bool = False
    weights: str = "F16"
    factors: bool = False  # rope_freqs, of Llama 3.1
    scaling: tuple[RopeScalingType, float] | None = None
    rope_dims: int = 0
    biased: bool = False
    fields: dict[str, float] = field(default_factory=dict)


ODD = {
    "seven heads share a key": Odd("qwen2", hidden=448, heads=7, kv_heads=1, head_dim=64),
    "head dim 80": Odd("llama", hidden=320, head_dim=80),
    "head dim 96": Odd("llama", hidden=384, head_dim=96),
    "head dim 128, one key": Odd("llama", hidden=256, kv_heads=1, head_dim=128),
    "tied": Odd("llama", tied=True),
    "tied, heads wider than hidden": Odd("qwen3", head_dim=64, tied=True),
    "sliding, tied": Odd("gemma3", head_dim=64, layers=7, window=64, tied=True),
    "sliding, a head of its own": Odd("gemma3", head_dim=64, layers=7, window=64),
    "sliding, linear": Odd("gemma3", layers=7, window=64, scaling=(RopeScalingType.LINEAR, 8.0)),
    "factors": Odd("llama", head_dim=64, factors=True),
    "linear": Odd("llama", scaling=(RopeScalingType.LINEAR, 4.0)),
    "qwen2, linear": Odd("qwen2", scaling=(RopeScalingType.LINEAR, 4.0)),
    "float32": Odd("llama", weights="F32"),
}
QUANTIZED = {
    kind: Odd("llama", hidden=256, head_dim=64, weights=kind, tied=kind == "Q4_0")
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16")
}
REFUSED = {
    "yarn": (Odd("llama", scaling=(RopeScalingType.YARN, 4.0)), "rope scaling yarn"),
    "old linear": (Odd("llama", fields={"rope.scale_linear": 4.0}), "llama.rope.scale_linear = 4"),
    "cap": (
        Odd("gemma3", window=64, layers=7, fields={"final_logit_softcapping": 30.0}),
        "capping",
    ),
    "magnitude": (Odd("qwen2", fields={"rope.scaling.attn_factor": 1.2}), "attn_factor = 1.2"),
    "rope of half a head": (Odd("qwen3", rope_dims=16), "rope over 16 of 32 dims"),
    "biases": (Odd("llama", biased=True), r"unknown \(model.layers.0.self_attn.k_proj.bias"),
}


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Fields:
    return _cut(_tokenizer(smollm2_gguf))


def write(path: Path, odd: Odd, tokenizer: Fields) -> Path:
    writer = GGUFWriter(path, odd.arch)
    writer.add_block_count(odd.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(odd.hidden)
    writer.add_feed_forward_length(2 * odd.hidden)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_head_count(odd.heads)
    if odd.kv_heads != odd.heads:  # llama.cpp takes as many
        writer.add_head_count_kv(odd.kv_heads)
    writer.add_rope_freq_base(1e5)
    if odd.arch != "gemma3":
        writer.add_rope_dimension_count(odd.rope_dims or odd.head_dim)
    if odd.heads * odd.head_dim != odd.hidden or odd.window:
        writer.add_key_length(odd.head_dim)
        writer.add_value_length(odd.head_dim)
    if odd.window:
        writer.add_sliding_window(odd.window)
    if odd.scaling:
        writer.add_rope_scaling_type(odd.scaling[0])
        writer.add_rope_scaling_factor(odd.scaling[1])
    for name, number in odd.fields.items():
        writer.add_float32(f"{odd.arch}.{name}", number)
    for name, (value, types) in tokenizer.items():
        writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, x in tensors(odd, len(tokenizer["tokenizer.ggml.tokens"][0])):
        if x.ndim == 1 or odd.weights == "F32":
            writer.add_tensor(name, x)
        elif odd.weights == "F16":
            writer.add_tensor(name, x.astype(np.float16))
        else:
            kind = GGMLQuantizationType[odd.weights]
            writer.add_tensor(name, quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(odd: Odd, n_vocab: int) -> Iterator[tuple[str, np.ndarray]]:
    rng, hidden = np.random.default_rng(3), odd.hidden

    def matrix(n_out: int, n_in: int, gain: float) -> np.ndarray:
        return rng.standard_normal((n_out, n_in), np.float32) * np.float32(gain / n_in**0.5)

    def norm(n: int) -> np.ndarray:
        return 1 + rng.standard_normal(n, np.float32) / 3

    q, kv = odd.heads * odd.head_dim, odd.kv_heads * odd.head_dim
    yield "token_embd.weight", matrix(n_vocab, hidden, 3.0 if odd.tied else hidden**0.5)
    yield "output_norm.weight", norm(hidden)
    if not odd.tied:
        yield "output.weight", matrix(n_vocab, hidden, 3.0)
    if odd.factors:
        yield "rope_freqs.weight", np.linspace(1, 8, odd.head_dim // 2, dtype=np.float32)
    shapes = {
        "attn_q": (q, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
        "attn_output": (hidden, q), "ffn_gate": (2 * hidden, hidden),
        "ffn_up": (2 * hidden, hidden), "ffn_down": (hidden, 2 * hidden),
    }  # fmt: skip
    for i in range(odd.layers):
        for name, shape in shapes.items():
            yield f"blk.{i}.{name}.weight", matrix(*shape, 2.0 if "attn" in name else 1.0)
        norms = {"attn_norm": hidden, "ffn_norm": hidden}
        if odd.arch in ("qwen3", "gemma3"):
            norms |= {"attn_q_norm": odd.head_dim, "attn_k_norm": odd.head_dim}
        if odd.window:
            norms |= {"post_attention_norm": hidden, "post_ffw_norm": hidden}
        for name, n in norms.items():
            yield f"blk.{i}.{name}.weight", norm(n)
        if odd.biased or odd.arch == "qwen2":
            for name, n in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
                yield f"blk.{i}.{name}.bias", rng.standard_normal(n, np.float32) / 4


def compare(path: Path, open_other: Callable[[Path], Any], limit: float) -> None:
    """Without rows of each other and with them, in both directions, on 300 tokens."""
    engines = {"llama": open_llama(path), "mlx": open_other(path)}
    llama, mlx = engines.values()
    assert llama.key.digest == mlx.key.digest
    ids = (llama.vocab.tokenize(STORY) * 5)[:300]
    own, rows = {}, {}
    for name, engine in engines.items():
        first = go_on(engine, ids[:200], keep=True)
        rows[name] = both(engine, 0, 0, 200)
        own[name] = np.concatenate([first, go_on(engine, ids[200:], keep=True)])
    assert kl(own["llama"], own["mlx"]) < limit
    assert (own["llama"].argmax(-1) == own["mlx"].argmax(-1)).mean() > 0.85
    for source, other in (("llama", mlx), ("mlx", llama)):
        crossed = go_on(replace_rows(other, rows[source]), ids[200:], keep=True)
        assert kl(own[source][200:], crossed) < limit
    for engine in engines.values():
        engine.close()


@pytest.mark.parametrize("name", ODD)
def test_a_gguf_is_computed_as_llama_cpp_does(tmp_path: Path, tokenizer: Fields, name: str) -> None:
    compare(write(tmp_path / "odd.gguf", ODD[name], tokenizer), open_mlx, SAME)


def open_packed(path: Path) -> Any:
    open_mlx(path).close()  # skips, or fails, without MLX
    from actors.engines.mlx_engine import MlxEngine

    return MlxEngine(path, n_seq_max=3, n_ctx=1024, n_cells=1024, packed=True)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("opener", [open_mlx, open_packed])
def test_quantized_weights(tmp_path: Path, tokenizer: Fields, name: str, opener: Any) -> None:
    """Taken apart, and where MLX has the format also as they are."""
    compare(write(tmp_path / "odd.gguf", QUANTIZED[name], tokenizer), opener, SAME_WEIGHTS)


@pytest.mark.parametrize("kind", [Q4_K_M, Q6_K])
def test_k_quants(tmp_path: Path, tokenizer: Fields, kind: int) -> None:
    import llama_cpp as llama

    plain = write(tmp_path / "f16.gguf", Odd("llama", hidden=256, head_dim=64), tokenizer)
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.nthread = kind, 1
    out = tmp_path / "odd.gguf"
    assert not llama.llama_model_quantize(
        str(plain).encode(), str(out).encode(), ctypes.byref(params)
    )
    compare(out, open_mlx, SAME_WEIGHTS)


@pytest.mark.parametrize("name", REFUSED)
def test_a_gguf_that_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, tokenizer: Fields, name: str
) -> None:
    odd, reason = REFUSED[name]
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        open_mlx(write(tmp_path / "odd.gguf", odd, tokenizer))
    assert "\n" not in str(caught.value)


def test_a_head_dim_that_no_codec_groups_is_served_in_float_when_asked(
    tmp_path: Path, tokenizer: Fields
) -> None:
    path = write(tmp_path / "odd.gguf", ODD["head dim 80"], tokenizer)
    open_mlx(path).close()
    config = ReplicaConfig(
        model=str(path), engine="mlx", store=f"file://{tmp_path}", slots=2, n_ctx=128, threads=1
    )
    for kv_type in ("f16", "q4"):
        reason = r"layers \[0, 1\]: cannot quantize a head dim of 80.*codec = 'f16'"
        with pytest.raises(ModelUnavailable, match=reason):
            ModelReplica(replace(config, kv_type=kv_type, codec="q4"), "n")
    replica = ModelReplica(replace(config, kv_type="f16", codec="f16"), "n")
    replica.close()


# ---- directories

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
GEMMA3 = {
    "num_hidden_layers": 7, "sliding_window": 64, "sliding_window_pattern": 6, "head_dim": 64,
    "query_pre_attn_scalar": 80, "rope_local_base_freq": 1e4,
}  # fmt: skip
DEEPSEEK = {
    "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 32, "v_head_dim": 32,
    "qk_nope_head_dim": 32, "num_key_value_heads": 4, "moe_intermediate_size": 64,
    "num_experts_per_tok": 2, "moe_layer_freq": 1, "first_k_dense_replace": 1,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0, "topk_method": "greedy", "scoring_func": "softmax",
    "norm_topk_prob": False, "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
DIRECTORIES: dict[str, tuple[str, int, dict[str, Any]]] = {  # mlx-lm's module, bits, config
    "llama, scaled": ("llama", 0, {"head_dim": 64, "rope_scaling": LLAMA3}),
    "llama, quantized": ("llama", 4, {"head_dim": 64}),
    "llama, biased": ("llama", 0, {"attention_bias": True}),
    "llama, sliding": (
        "llama", 0,
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32},
    ),
    "qwen2, yarn": ("qwen2", 8, {"rope_scaling": YARN}),
    "qwen3, yarn": ("qwen3", 0, {"head_dim": 64, "rope_scaling": YARN}),
    "gemma3": ("gemma3_text", 0, GEMMA3),
    "gemma3, linear": (
        "gemma3_text", 0, GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    ),
    "deepseek, experts, yarn": ("deepseek_v2", 0, DEEPSEEK),
    "deepseek, experts, quantized": ("deepseek_v2", 4, DEEPSEEK | {"q_lora_rank": 64}),
}  # fmt: skip


def save(folder: Path, kind: str, bits: int, config: dict[str, Any]) -> Any:
    """mlx-lm's own model, with random weights, and the directory it is saved in."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten, tree_map
    from tokenizers import Tokenizer, models

    config = {
        "model_type": kind, "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 64,
        "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    } | config  # fmt: skip
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    net = module.Model(module.ModelArgs.from_dict(config))
    normal = partial(mx.random.normal, dtype=mx.float32)
    mx.random.seed(1)
    net.update(
        tree_map(
            lambda x: (
                normal(x.shape) * (2 / x.shape[-1] ** 0.5)
                if x.ndim > 1
                else 1 + normal(x.shape) / 3
            ),
            net.parameters(),
        )
    )
    if bits:
        nn.quantize(net, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(net.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    words = {chr(33 + i): i for i in range(64)}
    Tokenizer(models.BPE(vocab=words, merges=[])).save(str(folder / "tokenizer.json"))
    return net


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_is_computed_as_mlx_lm_does(tmp_path: Path, name: str) -> None:
    """mlx-lm's caches and attention, latents expanded, against ours: 300 tokens in two steps."""
    found = importlib.util.find_spec("mlx_lm") is not None
    require("mlx", found, "mlx_lm is not installed")
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    net = save(tmp_path, *DIRECTORIES[name])
    ids = [int(x) for x in np.random.default_rng(0).integers(0, 64, 300)]
    wanted = np.array(net(mx.array([ids]), make_prompt_cache(net))[0]).astype(np.float64)
    wanted -= wanted.max(-1, keepdims=True)
    wanted -= np.log(np.exp(wanted).sum(-1, keepdims=True))
    engine = open_mlx(tmp_path)
    seen = [go_on(engine, part, keep=True) for part in (ids[:200], ids[200:])]
    engine.close()
    limit = 10 * SAME if "experts" in name else SAME  # rounding may choose another expert
    assert kl(wanted, np.concatenate(seen)) < limit
