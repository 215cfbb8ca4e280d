"""What llama.cpp says of a GGUF that MLX will compute with: key and vocabulary, no weights.

The file is loaded twice: once whole, which maps it into memory and reads little, for what the llama
engine would read from it, and once as a vocabulary, which stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as llama

from actors.engines import llama_spec
from actors.engines.llama_context import init_backend
from actors.engines.llama_vocab import LlamaVocab
from actors.errors import ModelUnavailable
from storage.spec import CompatibilityKey


@dataclass(frozen=True)
class Described:
    """Equal to a llama engine's on the same file; `close` frees the vocabulary."""

    key: CompatibilityKey
    vocab: LlamaVocab
    n_ctx: int
    close: Callable[[], None]


def describe(path: Path) -> Described:
    """Raises ModelUnavailable for a file llama.cpp cannot load, or a cache it cannot carry."""
    init_backend()
    model = _open(path, vocab_only=False)
    try:
        spec, rope = llama_spec.read(model, path)
        n_ctx = int(llama.llama_model_n_ctx_train(model))
    finally:
        llama.llama_model_free(model)
    key = CompatibilityKey(*llama_spec.digests(path), rope=rope.parameters, spec=spec)
    vocab = _open(path, vocab_only=True)
    return Described(key, LlamaVocab(vocab), n_ctx, lambda: llama.llama_model_free(vocab))


def _open(path: Path, *, vocab_only: bool) -> Any:
    params = llama.llama_model_default_params()
    params.vocab_only = vocab_only
    params.use_extra_bufts = False  # they would copy the weights
    params.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ModelUnavailable(f"{path}: llama.cpp cannot load this file")
    return model
