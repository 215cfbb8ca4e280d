"""A LoRA adapter on a llama.cpp model: loaded before the context is made, applied to all of it.

Rows computed with an adapter are those of other weights: the adapter's bytes and its scale go into
the weights digest of the compatibility key.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as llama

from actors.errors import ModelUnavailable


@dataclass(frozen=True)
class Lora:
    path: Path
    scale: float = 1.0

    def weights(self, base: str) -> str:
        """The digest that the base's weights have with this adapter, both hex sha256."""
        with self.path.open("rb") as file:
            adapter = hashlib.file_digest(file, "sha256").digest()
        scale = struct.pack("<d", self.scale)
        return hashlib.sha256(
            b"kvferry.lora.v1" + bytes.fromhex(base) + adapter + scale
        ).hexdigest()


def load(model: Any, lora: Lora) -> Any:
    """The adapter, which lives as long as the model. Raises ModelUnavailable for a file that is no
    adapter of this model, or one that is active in parts of a text only."""
    adapter = llama.llama_adapter_lora_init(model, os.fsencode(lora.path))
    if not adapter:
        raise ModelUnavailable(f"{lora.path}: no LoRA adapter that fits this model")
    if llama.llama_adapter_get_alora_n_invocation_tokens(adapter):
        raise ModelUnavailable(f"{lora.path}: adapters with invocation tokens are not supported")
    return adapter


def apply(context: Any, adapter: Any, lora: Lora) -> None:
    """From the next step on. Raises ModelUnavailable."""
    adapters = (llama.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (ctypes.c_float * 1)(lora.scale)
    if llama.llama_set_adapters_lora(context, adapters, 1, scales):
        raise ModelUnavailable(f"{lora.path}: llama.cpp cannot apply this adapter")
