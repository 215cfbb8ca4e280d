"""Which engine a configuration means, and whether the rest of it allows that engine. Loads none."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import cast

from actors.config import ReplicaConfig
from actors.engines.options import KV_TYPES, MAX_UBATCH, EngineOptions
from actors.errors import ModelUnavailable
from actors.speculation import Kind, SpeculationConfig

ENGINES = ("llama.cpp", "mlx")
_CODES = {"q4_1": "llama.cpp", "q4": "mlx"}  # cells of the q4 codec's codes, and whose they are


def is_fake(model: str) -> bool:
    return model.startswith("fake://")


def is_mlx(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").exists()


def check_engine(config: ReplicaConfig) -> None:
    """Raises ValueError for an engine that the rest of the configuration does not allow."""
    if config.engine not in ("auto", *ENGINES):
        raise ValueError(f"engine = {config.engine!r}: auto, {' or '.join(ENGINES)}")
    if config.profile not in ("default", "auto"):
        raise ValueError(f"profile = {config.profile!r}: default or auto")
    if config.flash_attention not in ("auto", "on", "off"):
        raise ValueError(f"flash_attention = {config.flash_attention!r}: auto, on or off")
    kind = config.kv_type
    if kind not in ("auto", *KV_TYPES, "q4"):
        raise ValueError(f"kv_type = {kind!r}: auto, {', '.join(KV_TYPES)}, or q4 with mlx")
    if kind != "q4":
        default_options(config).check()
    if kind in _CODES and config.codec != "q4":
        raise ValueError(f"kv_type = {kind}: wants codec = 'q4', not {config.codec!r}")
    if config.kv_budget and config.profile != "auto":
        raise ValueError("kv_budget: wants profile = 'auto'")
    if is_fake(config.model):
        _check_fake(config)
    elif config.engine != "auto":
        _check_cells(config, config.engine)


def _check_fake(config: ReplicaConfig) -> None:
    if config.kv_type not in ("auto", "f16"):
        raise ValueError(f"kv_type = {config.kv_type}: the fake engine has no such cells")
    if config.profile == "auto" or config.flash_attention != "auto" or config.ubatch:
        reason = "the fake engine computes in one way only"
        raise ValueError(f"profile = auto, flash_attention, ubatch: {reason}")


def _check_cells(config: ReplicaConfig, engine: str) -> None:
    """Raises ValueError for settings of another engine."""
    kind = config.kv_type
    if engine == "llama.cpp" and kind == "q4":
        raise ValueError("kv_type = q4: cells of mlx, not of llama.cpp")
    if engine != "mlx":
        return
    if kind not in ("auto", "f16", "q4"):
        raise ValueError(f"kv_type = {kind}: cells of llama.cpp, not of mlx")
    for name, unset in (("profile", "default"), ("flash_attention", "auto"), ("ubatch", 0),
                        ("lora", "")):  # fmt: skip
        if getattr(config, name) != unset:
            raise ValueError(f"{name}: a setting of llama.cpp, not of mlx")


def engine_of(config: ReplicaConfig, path: Path) -> str:
    """One of ENGINES, for a resolved model. Raises ModelUnavailable where that engine cannot."""
    engine = config.engine
    if engine == "auto":
        engine = "mlx" if is_mlx(path) else "llama.cpp"
    if engine == "llama.cpp" and is_mlx(path):
        raise ModelUnavailable(f"{config.model}: an MLX directory needs engine = 'mlx'")
    try:
        _check_cells(config, engine)
    except ValueError as error:
        raise ModelUnavailable(str(error)) from error
    return engine


def default_options(config: ReplicaConfig) -> EngineOptions:
    """Of the profile "default", with the settings that are made."""
    return EngineOptions(
        threads=config.threads or config.cores or os.cpu_count() or 1,
        flash_attention=config.flash_attention != "off",
        kv_type="f16" if config.kv_type == "auto" else config.kv_type,
        ubatch=config.ubatch or MAX_UBATCH,
    )


def parse_lora(text: str) -> tuple[str, float]:
    """(reference of the adapter's file, scale) of `reference[:scale]`. Raises ValueError."""
    reference, _, last = text.rpartition(":")
    try:
        scale = float(last)
    except ValueError:
        return text, 1.0
    if not reference or not math.isfinite(scale) or not scale:
        raise ValueError(f"lora = {text!r}: a file, and perhaps :scale, a number that is not 0")
    return reference, scale


def check_lora(config: ReplicaConfig) -> None:
    """Raises ValueError for an adapter that the rest of the configuration does not allow."""
    if config.lora:
        parse_lora(config.lora)
        if is_fake(config.model):
            raise ValueError("lora: the fake engine takes no adapter")


def speculation_of(config: ReplicaConfig) -> SpeculationConfig:
    """Raises ValueError for a setting that cannot be kept."""
    kind, draft = config.speculation, config.draft_model
    if kind == "mtp":
        raise ValueError(
            "speculation = mtp: this build cannot test a model's own multi-token-prediction head, "
            "and does not use one; set auto, ngram, draft or off"
        )
    if kind not in ("auto", "off", "ngram", "draft"):
        raise ValueError(f"speculation = {kind!r}: auto, off, ngram or draft")
    if kind == "draft" and not draft:
        raise ValueError("speculation = draft: wants a draft_model")
    if kind in ("off", "ngram") and draft:
        raise ValueError(f"draft_model: is not used with speculation = {kind}")
    if kind == "auto":
        kind = "draft" if draft else "ngram"
    return SpeculationConfig(cast(Kind, kind), config.draft_tokens)
