"""Model references -> files -> engines.

    /path/to/model.gguf                  a file
    pkg://package/file.gguf              a file inside an installed package, which is not imported
    /path/to/directory                   an MLX model: config.json, safetensors, tokenizer.json
    hf://owner/repo/file.gguf            from the Hugging Face hub, cached by huggingface_hub
    hf://owner/repo                      the same, a whole MLX directory
    fake://?step_delay=0.01              the numpy engine, to try a cluster without a model

Everything that is wrong with a reference is a ModelUnavailable with one clear line.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

from actors.apart import apart, wait_actively
from actors.config import ReplicaConfig
from actors.draft_model import check_draft
from actors.engine_settings import (
    check_engine,
    check_lora,
    default_options,
    engine_of,
    is_fake,
    is_mlx,
    parse_lora,
    speculation_of,
)
from actors.engines.base import Engine
from actors.engines.options import EngineOptions
from actors.errors import ModelUnavailable
from actors.tuned import Source, Tunable, open_tuned
from actors.tuning import Profile
from storage.crypto import Cipher, parse_keys, read_keys
from storage.errors import StoreUnavailable
from storage.local import LocalTier
from storage.spec import CompatibilityKey
from storage.store import CacheStore
from storage.weights import DIRECTORY_FILES

_GGUF_MAGIC = b"GGUF"


def served_name(model: str) -> str:
    """The id clients use: the file's name without its quantization, e.g. SmolLM2-135M-Instruct."""
    if is_fake(model):
        return "fake"
    stem = re.sub(r"\.gguf$", "", model.rstrip("/").rsplit("/", 1)[-1], flags=re.IGNORECASE)
    return re.sub(r"[.-](I?Q\d\w*|[BF]F?16|F32)$", "", stem, flags=re.IGNORECASE)


def resolve(model: str, *, offline: bool = False) -> Path:
    """The local GGUF, or MLX directory, of a reference; `offline`: only if it is on this machine.
    Raises ModelUnavailable."""
    if model.startswith("pkg://"):
        path = _in_package(model)
    elif model.startswith("hf://"):
        path = _from_hub(model, offline)
    elif "://" in model:
        raise ModelUnavailable(f"{model}: unknown scheme; use a path, pkg:// or hf://")
    else:
        path = Path(model).expanduser()
    if is_mlx(path):
        return path
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelUnavailable(f"{model}: cannot read it ({error.strerror})") from error
    if magic != _GGUF_MAGIC:
        raise ModelUnavailable(f"{model}: not a GGUF file")
    return path


def _in_package(model: str) -> Path:
    package, _, name = model.removeprefix("pkg://").partition("/")
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(f"{model}: package {package!r} is not installed")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        raise ModelUnavailable(f"{model}: package {package!r} has no file {name!r}")
    return path


def _from_hub(model: str, offline: bool) -> Path:
    match = re.fullmatch(r"hf://([^/]+/[^/]+)(?:/(.+))?", model)
    if match is None or (not match[2] and model.lower().endswith(".gguf")):
        raise ModelUnavailable(f"{model}: write hf://owner/repo/file or hf://owner/repo")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise ModelUnavailable(f"{model}: install huggingface_hub (pip install '.[hf]')") from error
    try:
        if not match[2]:
            patterns = list(DIRECTORY_FILES)
            found = snapshot_download(match[1], allow_patterns=patterns, local_files_only=offline)
            return Path(found)
        return Path(hf_hub_download(match[1], match[2], local_files_only=offline))
    except Exception as error:  # the hub's errors, the network's, and the cache's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelUnavailable(f"{model}: cannot be fetched ({reason})") from error


def open_draft(config: ReplicaConfig, engine: Engine) -> Engine | None:
    """The draft model's engine, with a cache of its own; None without one. Raises ModelUnavailable,
    also for another vocabulary than the model's."""
    if speculation_of(config).kind != "draft":
        return None
    settings = replace(
        config, model=config.draft_model, engine="auto", kv_type="f16", profile="default", lora=""
    )
    draft = open_engine(settings)
    try:
        check_draft(engine, draft)
    except ModelUnavailable:
        draft.close()
        raise
    return draft


def open_engine(config: ReplicaConfig) -> Engine:
    """Load the model, declared-equivalent digests in its key as one. Raises ModelUnavailable."""
    return open_profiled(config)[0]


def open_profiled(
    config: ReplicaConfig, *, again: bool = False, seconds: float = 0.0
) -> tuple[Engine, Profile | None]:
    """As open_engine, with the measured profile it was opened by, if that was asked for; `again`
    and `seconds` as in open_tuned."""
    try:
        check_engine(config)
        check_lora(config)
    except ValueError as error:
        raise ModelUnavailable(str(error)) from error
    engine, profile = _open_engine(config, again, seconds)
    engine.key = engine.key.canonical(config.equivalent_digests)
    return engine, profile


def _open_engine(
    config: ReplicaConfig, again: bool, seconds: float
) -> tuple[Engine, Profile | None]:
    if is_fake(config.model):
        from actors.engines.fake_engine import FakeEngine

        per_step, per_token = _delays(config.model)
        engine = FakeEngine(config.slots, config.n_ctx, step_delay=per_step, token_delay=per_token)
        return engine, None
    path, n_cells = resolve(config.model), config.cells or config.slots * config.n_ctx
    wait_actively()
    if engine_of(config, path) == "mlx":
        return _open_mlx(path, config, n_cells), None
    llama, profile = apart(lambda: _open_profiled(config, path, n_cells, again, seconds))
    llama.threads.adapt()
    return llama, profile


def _open_profiled(
    config: ReplicaConfig, path: Path, n_cells: int, again: bool, seconds: float
) -> tuple[Tunable, Profile | None]:
    options = default_options(config)
    if config.profile == "default":
        return _open_llama(config, path, options, n_cells), None
    opening, size = partial(_open_llama, config, path), path.stat().st_size
    source = Source(opening, options, n_cells, _identity(config, path), size)
    return open_tuned(config, source, again=again, seconds=seconds)


def _identity(config: ReplicaConfig, path: Path) -> dict[str, str]:
    """Of weights, with their adapter, and engine."""
    _import_llama()
    from actors.engines import llama_context, llama_spec

    weights, lora = llama_spec.digests(path)[0], _lora(config)
    if lora is not None:
        weights = lora.weights(weights)
    return {"model": weights, "engine": llama_context.build()}


def _lora(config: ReplicaConfig) -> Any:
    """llama.cpp's Lora; None without one."""
    if not config.lora:
        return None
    adapter, scale = parse_lora(config.lora)
    return _import_llama().Lora(resolve(adapter), scale)


def _open_llama(config: ReplicaConfig, path: Path, options: EngineOptions, n_cells: int) -> Tunable:
    engine: Tunable = _import_llama().LlamaEngine(
        path,
        n_seq_max=config.slots,
        n_ctx=config.n_ctx,
        n_cells=n_cells,
        n_threads=options.threads,
        kv_type=options.kv_type,
        flash_attention=options.flash_attention,
        n_ubatch=options.ubatch,
        lora=_lora(config),
    )
    return engine


def _import_llama() -> ModuleType:
    try:
        return importlib.import_module("actors.engines.llama_engine")
    except ImportError as error:
        raise ModelUnavailable(
            "GGUF models need llama-cpp-python (pip install '.[llama]')"
        ) from error


def _open_mlx(path: Path, config: ReplicaConfig, n_cells: int) -> Engine:
    try:
        from actors.engines.mlx_engine import MlxEngine
    except ImportError as error:
        raise ModelUnavailable("engine = mlx needs mlx-lm (pip install '.[mlx]')") from error
    return MlxEngine(
        path,
        n_seq_max=config.slots,
        n_ctx=config.n_ctx,
        n_cells=n_cells,
        cells="f16" if config.kv_type == "auto" else config.kv_type,
    )


def open_store(config: ReplicaConfig) -> CacheStore:
    """The configured store, with its keys. Raises ValueError, StoreUnavailable."""
    return _open(config.store, config)


def _open(url: str, config: ReplicaConfig) -> CacheStore:
    return CacheStore(url, signing_key=read_signing_key(config), cipher=read_cipher(config))


def read_signing_key(config: ReplicaConfig) -> bytes | None:
    """None when none is configured. Raises ValueError, StoreUnavailable."""
    if not config.signing_key_file:
        return None
    try:
        signing_key = Path(config.signing_key_file).read_bytes().strip()
    except OSError as error:
        raise StoreUnavailable(config.store, f"cannot read the signing key: {error}") from error
    if len(signing_key) < 16:
        raise ValueError(f"{config.signing_key_file}: a signing key has at least 16 bytes")
    return signing_key


def open_local(config: ReplicaConfig, node: str, key: CompatibilityKey) -> LocalTier | None:
    """The node's own disk, where it pays: a store that is a directory needs none. Raises
    StoreUnavailable."""
    if not config.local_bytes or not config.local:
        return None
    folder = Path(config.local).expanduser().absolute() / node
    store = _open(f"file://{folder}", config)
    store.probe()
    return LocalTier(store, key, config.local_bytes, config.daily_write_bytes)


def read_cipher(config: ReplicaConfig) -> Cipher | None:
    """None when the store is plain. Raises ValueError, StoreUnavailable."""
    if config.encryption_keys and config.encryption_keys_file:
        raise ValueError("encryption_keys and encryption_keys_file: set one of them")
    if config.encryption_keys:
        return parse_keys(config.encryption_keys, "encryption_keys")
    if not config.encryption_keys_file:
        return None
    try:
        return read_keys(Path(config.encryption_keys_file))
    except OSError as error:
        raise StoreUnavailable(config.store, f"cannot read the encryption keys: {error}") from error


def _delays(model: str) -> tuple[float, float]:
    """Seconds that the fake engine takes for a step, and for each of its tokens."""
    options = dict(parse_qsl(model.partition("?")[2]))
    delays = []
    for name in ("step_delay", "token_delay"):
        try:
            delays.append(float(options.pop(name, "0")))
        except ValueError as error:
            raise ModelUnavailable(f"{model}: {name} is no number") from error
    if options:
        raise ModelUnavailable(f"{model}: unknown option {next(iter(options))}")
    return delays[0], delays[1]
