"""Weights and contexts of llama.cpp, as the engine wants them."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp as llama

from actors.engines.llama_state import CELL_TYPES
from actors.engines.options import EngineOptions
from actors.errors import ModelUnavailable

logger = logging.getLogger(__name__)
_NO_ROTATION = "LLAMA_ATTN_ROT_DISABLE"  # llama.cpp's; quantized rows are rotated ones


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        logger.error("llama.cpp: %s", text.decode(errors="replace").strip())


def init_backend() -> None:
    """Before anything else of llama.cpp. Its errors are logged here, the rest it says is not."""
    llama.llama_log_set(_log, ctypes.c_void_p(0))
    llama.llama_backend_init()


def check_options(options: EngineOptions) -> None:
    """Raises ModelUnavailable for what llama.cpp cannot do."""
    try:
        options.check()
    except ValueError as error:
        raise ModelUnavailable(str(error)) from error
    if options.kv_type != "f16" and _NO_ROTATION in os.environ:
        raise ModelUnavailable(f"kv_type = {options.kv_type}: {_NO_ROTATION} must not be set")


def open_model(path: Path) -> Any:
    """Raises ModelUnavailable for a file llama.cpp cannot load."""
    params = llama.llama_model_default_params()
    params.use_extra_bufts = repacks()
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise ModelUnavailable(f"{path}: llama.cpp cannot load this file")
    return model


def repacks() -> bool:
    """Whether weights are laid out anew for the processor. Not for AMX: compiled by gcc 12, its
    kernels begin with an invalid tile configuration, and the process dies (llama.cpp #26954)."""
    return b"AMX_INT8 = 1" not in llama.llama_print_system_info()


def open_context(
    model: Any, options: EngineOptions, n_cells: int, n_batch: int, n_seq_max: int
) -> Any:
    """One context of n_seq_max sequences that share n_cells cells. Raises ModelUnavailable."""
    params = llama.llama_context_default_params()
    params.n_ctx = n_cells
    params.n_batch = n_batch
    params.n_ubatch = options.ubatch
    params.n_seq_max = n_seq_max
    params.n_threads = params.n_threads_batch = options.threads
    params.flash_attn_type = (
        llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if options.flash_attention
        else llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.kv_unified = True
    params.type_k = params.type_v = CELL_TYPES[options.kv_type].number
    params.swa_full = False
    params.no_perf = True
    context = llama.llama_init_from_model(model, params)
    if not context:
        raise ModelUnavailable(f"llama.cpp cannot make a context of {n_cells} cells ({options})")
    return context


def using(context: Any) -> Callable[[int], None]:
    """Makes a context compute with n threads from its next step on."""
    return lambda n: llama.llama_set_n_threads(context, n, n)


def build() -> str:
    """The version, and what of the processor it uses."""
    info = llama.llama_print_system_info().decode(errors="replace")
    return f"llama-cpp-python {llama.__version__}; {info.strip()}"
