"""GGUF -> what the transformers engine computes with.

Weights are dequantized by transformers; what that leaves out of the configuration is taken from the
spec that llama.cpp gives, and what it cannot express is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from actors.errors import ModelUnavailable
from storage.spec import CompatibilityKey

_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


def load(path: Path, key: CompatibilityKey) -> Any:
    """A GGUF's model in float32. Raises ModelUnavailable."""
    spec, rope = key.spec, dict(key.rope)
    arch, shapes = spec.architecture, {(x.n_kv_heads, x.key_dim) for x in spec.layers}

    def refuse(reason: str) -> ModelUnavailable:
        return ModelUnavailable(f"{path}: {arch} with {reason}, not supported by the hf engine")

    if arch not in _ARCHITECTURES or len(shapes) > 1:
        raise refuse("this architecture, or layers of several shapes")
    scaled = any(tensor.name == "rope_freqs.weight" for tensor in GGUFReader(path).tensors)
    if scaled or rope["scaling"] != "none" or rope["factor"] != 1.0:
        raise refuse("scaled rope")
    head_dim = spec.layers[0].key_dim
    changed: dict[str, Any] = {} if arch == "qwen2" else {"head_dim": head_dim}
    if arch == "gemma3":
        changed |= {"query_pre_attn_scalar": head_dim, "sliding_window": spec.window}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            gguf_file=path.name,
            dtype=torch.float32,
            attn_implementation="eager",
            **changed,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise ModelUnavailable(f"{path}: {str(error).splitlines()[0]}") from error
    _check_config(model.config, key, refuse)
    return model.eval()


def _check_config(config: Any, key: CompatibilityKey, refuse: Any) -> None:
    """transformers reads a GGUF's fields by a table of its own: what it read must be the spec's."""
    layers, rope = key.spec.layers, dict(key.rope)
    slides = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or []]
    if slides and slides != [layer.kind == "sliding" for layer in layers]:
        raise refuse("sliding layers that transformers places elsewhere")
    if not slides and key.spec.window:
        raise refuse("sliding layers that transformers does not know of")
    found = config.rope_parameters
    bases = {"base": found.get("full_attention", found)["rope_theta"]}
    if "sliding_attention" in found:
        bases["base_sliding"] = found["sliding_attention"]["rope_theta"]
    for name, base in bases.items():
        if not np.isclose(base, float(rope[name])):
            raise refuse(f"rope {name} {rope[name]}, which transformers takes for {base}")
    if config.num_hidden_layers != len(layers):
        raise refuse(f"{len(layers)} layers, of which transformers sees {config.num_hidden_layers}")
