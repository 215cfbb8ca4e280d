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

import importlib.util
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl

from actors.config import ReplicaConfig
from actors.engines.base import Engine
from actors.errors import ModelUnavailable
from storage.crypto import Cipher, parse_keys, read_keys
from storage.errors import StoreUnavailable
from storage.local import LocalTier
from storage.spec import CompatibilityKey
from storage.store import CacheStore

_GGUF_MAGIC = b"GGUF"
_MLX_FILES = ["*.json", "*.jinja", "model*.safetensors"]
_KV_TYPES = {"q4_1": "llama.cpp", "q4": "mlx"}  # cells of the q4 codec's codes, and whose they are


def is_fake(model: str) -> bool:
    return model.startswith("fake://")


def served_name(model: str) -> str:
    """The id clients use: the file's name without its quantization, e.g. SmolLM2-135M-Instruct."""
    if is_fake(model):
        return "fake"
    stem = re.sub(r"\.gguf$", "", model.rstrip("/").rsplit("/", 1)[-1], flags=re.IGNORECASE)
    return re.sub(r"[.-](I?Q\d\w*|[BF]F?16|F32)$", "", stem, flags=re.IGNORECASE)


def resolve(model: str) -> Path:
    """The local GGUF, or MLX directory, of a reference. Raises ModelUnavailable."""
    if model.startswith("pkg://"):
        path = _in_package(model)
    elif model.startswith("hf://"):
        path = _from_hub(model)
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


def is_mlx(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").exists()


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


def _from_hub(model: str) -> Path:
    match = re.fullmatch(r"hf://([^/]+/[^/]+)(?:/(.+))?", model)
    if match is None or (not match[2] and model.lower().endswith(".gguf")):
        raise ModelUnavailable(f"{model}: write hf://owner/repo/file or hf://owner/repo")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise ModelUnavailable(f"{model}: install huggingface_hub (pip install '.[hf]')") from error
    try:
        if not match[2]:
            return Path(snapshot_download(match[1], allow_patterns=_MLX_FILES))
        return Path(hf_hub_download(match[1], match[2]))
    except Exception as error:  # the hub's errors, the network's, and the cache's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelUnavailable(f"{model}: cannot be fetched ({reason})") from error


def check_kv_type(config: ReplicaConfig) -> None:
    """Raises ValueError for cells that the rest of the configuration does not allow."""
    if config.engine not in ("auto", "llama.cpp", "mlx"):
        raise ValueError(f"engine = {config.engine!r}: auto, llama.cpp or mlx")
    kind = config.kv_type
    if kind != "f16" and kind not in _KV_TYPES:
        raise ValueError(f"kv_type = {kind!r}: f16 or q4_1, or q4 with the mlx engine")
    if kind == "f16":
        return
    if config.codec != "q4":
        raise ValueError(f"kv_type = {kind}: wants codec = 'q4', not {config.codec!r}")
    if is_fake(config.model):
        raise ValueError(f"kv_type = {kind}: the fake engine has no such cells")
    if config.engine not in ("auto", _KV_TYPES[kind]):
        raise ValueError(f"kv_type = {kind}: cells of {_KV_TYPES[kind]}, not of {config.engine}")


def open_engine(config: ReplicaConfig) -> Engine:
    """Load the model, declared-equivalent digests in its key as one. Raises ModelUnavailable."""
    engine = _load(config)
    engine.key = engine.key.canonical(config.equivalent_digests)
    return engine


def _load(config: ReplicaConfig) -> Engine:
    try:
        check_kv_type(config)
    except ValueError as error:
        raise ModelUnavailable(str(error)) from error
    if is_fake(config.model):
        from actors.engines.fake_engine import FakeEngine

        return FakeEngine(config.slots, config.n_ctx, step_delay=_step_delay(config.model))
    path = resolve(config.model)
    engine = config.engine if config.engine != "auto" else "mlx" if is_mlx(path) else "llama.cpp"
    if config.kv_type != "f16" and engine != _KV_TYPES[config.kv_type]:
        raise ModelUnavailable(f"kv_type = {config.kv_type}: the {engine} engine has no such cells")
    if engine == "mlx":
        return _load_mlx(path, config)
    if is_mlx(path):
        raise ModelUnavailable(f"{config.model}: an MLX directory needs engine = 'mlx'")
    try:
        from actors.engines.llama_engine import LlamaEngine
    except ImportError as error:
        raise ModelUnavailable(
            "GGUF models need llama-cpp-python (pip install '.[llama]')"
        ) from error
    return LlamaEngine(
        path,
        n_seq_max=config.slots,
        n_ctx=config.n_ctx,
        n_cells=config.cells or config.slots * config.n_ctx,
        n_threads=config.threads or os.cpu_count() or 1,
        kv_type=config.kv_type,
    )


def _load_mlx(path: Path, config: ReplicaConfig) -> Engine:
    try:
        from actors.engines.mlx_engine import MlxEngine
    except ImportError as error:
        raise ModelUnavailable("engine = mlx needs mlx-lm (pip install '.[mlx]')") from error
    return MlxEngine(
        path,
        n_seq_max=config.slots,
        n_ctx=config.n_ctx,
        n_cells=config.cells or config.slots * config.n_ctx,
        cells=config.kv_type,
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


def _step_delay(model: str) -> float:
    options = dict(parse_qsl(model.partition("?")[2]))
    try:
        delay = float(options.pop("step_delay", "0"))
    except ValueError as error:
        raise ModelUnavailable(f"{model}: step_delay is no number") from error
    if options:
        raise ModelUnavailable(f"{model}: unknown option {next(iter(options))}")
    return delay
