"""What a GGUF loaded by llama.cpp says of its cache: spec, rope parameters, digests.

The metadata is read as llama.cpp reads it (llama-model.cpp, llama-hparams.cpp, src/models/*.cpp of
llama-cpp-python 0.3.36); the engine compares the result with its first state's bytes. Refuses what
cannot be carried: recurrent layers, unknown sliding-window patterns, multi-axis rope.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np

from actors.errors import ModelUnavailable
from storage.digests import cached, describe
from storage.spec import LayerSpec, ModelCacheSpec

logger = logging.getLogger(__name__)
_ROPE_INTERLEAVED, _ROPE_HALF_SPLIT = 0, 2  # llama_rope_type NORM, NEOX
_OTHER_ROPE = {"deepseek2-ocr"}  # turns halves, whatever llama_model_rope_type says
# Every n-th layer has full attention, the others slide, unless the file says otherwise.
_SLIDING_PERIOD = {"gemma3": 6}
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 7: "?", 10: "<u8", 11: "<i8"}


@dataclass(frozen=True)
class Rope:
    """Where rope turns llama.cpp's keys: `dims` dims from `offset` on (MLA keeps the latent first);
    parameters: what two caches must have in common."""

    interleaved: bool
    offset: int
    dims: int
    parameters: tuple[tuple[str, float | str], ...]


def read(model: Any, path: Path) -> tuple[ModelCacheSpec, Rope]:
    """Raises ModelUnavailable, naming the file and the reason."""
    found = metadata(model)
    arch = found["general.architecture"]

    def refuse(reason: str) -> ModelUnavailable:
        return ModelUnavailable(f"{path}: {arch} has {reason}, not supported")

    if llama.llama_model_is_recurrent(model) or llama.llama_model_is_hybrid(model):
        raise refuse("recurrent layers")
    kind = llama.llama_model_rope_type(model)
    if arch in _OTHER_ROPE or kind not in (_ROPE_INTERLEAVED, _ROPE_HALF_SPLIT):
        raise refuse(f"rope type {kind}")
    n_layers, window = llama.llama_model_n_layer(model), llama.llama_model_n_swa(model)
    if n_layers < 1:
        raise refuse("no layers but those of a multi-token-prediction head")
    heads = _per_layer(path, found, f"{arch}.attention.head_count_kv")
    if heads is None:
        heads = [llama.llama_model_n_head_kv(model)] * n_layers
    slides = [False] * n_layers
    if window:
        name = f"{arch}.attention.sliding_window_pattern"
        pattern = _per_layer(path, found, name)
        period = int(found.get(name, _SLIDING_PERIOD.get(arch, 0)))
        if arch not in _SLIDING_PERIOD or not (pattern or period):
            raise refuse("sliding-window layers of an unknown kind")
        slides = [bool(x) for x in pattern or [i % period < period - 1 for i in range(n_layers)]]
    if n_heads := mtp_layers(found):  # counted in the file, but neither run nor in the cache
        logger.warning("%s: its %d multi-token-prediction layers are not used", path, n_heads)
        heads, slides = heads[:n_layers], slides[:n_layers]
    if not len(heads) == len(slides) == n_layers or min(heads) < 1 or all(slides):
        raise refuse(f"{n_layers} layers with KV heads {heads}, sliding {slides}")
    latent = f"{arch}.attention.key_length_mla" in found
    head = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
    key = int(found.get(f"{arch}.attention.key_length", head))
    value = 0 if latent else int(found.get(f"{arch}.attention.value_length", head))
    layers = tuple(
        LayerSpec("sliding", n, key, value, window)
        if sliding
        else LayerSpec("latent" if latent else "full", n, key, value)
        for n, sliding in zip(heads, slides, strict=True)
    )
    return ModelCacheSpec(arch, layers), _rope(found, kind, key, any(slides))


def mtp_layers(found: dict[str, str]) -> int:
    """Layers of a multi-token-prediction head, which come after the model's own. llama.cpp's
    llama_model_n_layer leaves them out, and so does the cache of a context that decodes."""
    return int(found.get(f"{found['general.architecture']}.nextn_predict_layers", 0))


def _rope(found: dict[str, str], kind: int, key_dim: int, sliding: bool) -> Rope:
    arch = found["general.architecture"]
    dims = int(found.get(f"{arch}.rope.dimension_count", key_dim))
    # deepseek2 turns the last dims of a key, after the latent or the part without rope
    offset = key_dim - dims if f"{arch}.attention.kv_lora_rank" in found else 0
    parameters: dict[str, float | str] = {
        "base": float(found.get(f"{arch}.rope.freq_base", 10000.0)),
        "dims": float(dims),
        "factor": float(found.get(f"{arch}.rope.scaling.factor", 1.0)),
        "scaling": found.get(f"{arch}.rope.scaling.type", "none"),
    }
    if offset:
        parameters["offset"] = float(offset)
    if sliding:  # sliding layers have a base of their own, and no scaling
        parameters["base_sliding"] = float(found.get(f"{arch}.rope.freq_base_swa", 10000.0))
    for name in ("original_context_length", "attn_factor", "yarn_log_multiplier"):
        value = found.get(f"{arch}.rope.scaling.{name}")
        if value is not None:
            parameters[name] = float(value)
    return Rope(kind == _ROPE_INTERLEAVED, offset, dims, tuple(sorted(parameters.items())))


def metadata(model: Any) -> dict[str, str]:
    """The GGUF's scalar metadata and chat template, as llama.cpp prints them."""
    found = {}
    for index in range(llama.llama_model_meta_count(model)):
        name = ctypes.create_string_buffer(256)
        llama.llama_model_meta_key_by_index(model, index, name, 256)
        size = 4096
        while True:
            value = ctypes.create_string_buffer(size)
            n = llama.llama_model_meta_val_str_by_index(model, index, value, size)
            if n < size:
                break
            size = n + 1
        found[name.value.decode()] = value.value.decode(errors="replace")
    return found


def _per_layer(path: Path, found: dict[str, str], name: str) -> list[int] | None:
    """A field that is one number per layer; None if it is a scalar or absent. llama.cpp's metadata
    calls leave arrays out, so the file is opened once more, by ggml's own reader."""
    if name in found:
        return None
    library = _ggml()
    file = library.gguf_init_from_file(os.fsencode(path), _GgufParams(True, None))
    if not file:
        return None
    try:
        index = library.gguf_find_key(file, name.encode())
        if index < 0:
            return None
        kind = _NUMBERS[library.gguf_get_arr_type(file, index)]
        size = library.gguf_get_arr_n(file, index) * np.dtype(kind).itemsize
        raw = ctypes.string_at(library.gguf_get_arr_data(file, index), size)
        return [int(x) for x in np.frombuffer(raw, kind)]
    finally:
        library.gguf_free(file)


class _GgufParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))


def _ggml() -> ctypes.CDLL:
    """libggml-base, which libllama has loaded: the public calls of gguf.h."""
    from llama_cpp._ctypes_extensions import load_shared_library

    library: ctypes.CDLL = load_shared_library("ggml-base", Path(llama.__file__).parent / "lib")
    pointer, index = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("gguf_init_from_file", pointer, (ctypes.c_char_p, _GgufParams)),
        ("gguf_find_key", index, (pointer, ctypes.c_char_p)),
        ("gguf_get_arr_type", ctypes.c_int, (pointer, index)),
        ("gguf_get_arr_n", ctypes.c_size_t, (pointer, index)),
        ("gguf_get_arr_data", pointer, (pointer, index)),
        ("gguf_free", None, (pointer,)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def digests(path: Path) -> tuple[str, str]:
    """(weights, tokenizer) sha256 of a GGUF; cached by path, size and time of change."""
    tokenizer = cached(path, "tokenizer", lambda: _tokenizer_digest(path))
    return describe(path).sha256, str(tokenizer)


def _tokenizer_digest(path: Path) -> str:
    """Over every tokenizer.ggml.* field; the chat template is text, not tokenizer."""
    from gguf import GGUFReader  # slow to import, and needed only for a file not seen before

    digest = hashlib.sha256()
    for name, field in sorted(GGUFReader(path).fields.items()):
        if name.startswith("tokenizer.ggml."):
            for part in field.parts:
                digest.update(part.tobytes())
    return digest.hexdigest()
