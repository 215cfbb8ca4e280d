"""What a replica needs of this machine, checked one by one before anything is served.

Each function looks at one thing and returns Checks; what it finds wrong is a result, not an
exception. Knows no cluster and no Ray; cluster.doctor adds those and prints.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import actors
import storage
from actors.config import ReplicaConfig
from actors.engine_settings import default_options, engine_of, is_fake
from actors.engines.base import Engine
from actors.errors import ModelUnavailable
from actors.models import open_engine, read_cipher, read_signing_key, resolve
from storage.codec import get_codec, refused_layers, row_bytes
from storage.errors import Locked, StorageError, StoreUnavailable
from storage.files import FilesOptions
from storage.store import CacheStore

Status = Literal["ok", "warn", "fail"]
_STORE_TIMEOUT_S = 10.0  # of one call
_SKEW_S = 2.0  # some stores' clocks count whole seconds
_WRONG_CLOCK_S = 300.0
_LLAMA = (0, 3, 36)
_PROBE_CELLS = 256  # of the engine that is opened to look at it


@dataclass(frozen=True)
class Check:
    """`todo` says what to do about a warning or a failure."""

    name: str
    status: Status
    text: str
    todo: str = ""


# ---- model and engine


def check_model(config: ReplicaConfig) -> list[Check]:
    """Engine, layers, memory. The model is loaded, with few cells, unless it cannot fit."""
    if is_fake(config.model):
        return [_opened(config, "fake", 0)[0]]
    try:
        path = resolve(config.model)
        name = engine_of(config, path)
    except ModelUnavailable as error:
        return [Check("model", "fail", str(error), "set model, or engine")]
    weights = _file_bytes(path)
    ram = ram_bytes()
    if ram and weights > ram[0]:
        text = f"the model has {_gb(weights)}, this machine {_gb(ram[0])}"
        return [Check("memory", "fail", text, "a smaller model, or fewer bits per weight")]
    check, engine = _opened(config, name, weights)
    if engine is None:
        return [check]
    try:
        return [check, check_layers(engine, config), _memory(engine, config, weights, ram)]
    finally:
        engine.close()


def _opened(config: ReplicaConfig, name: str, weights: int) -> tuple[Check, Engine | None]:
    try:
        engine = open_engine(replace(config, cells=_PROBE_CELLS, profile="default", kv_budget=0))
    except ModelUnavailable as error:
        todo = "another model, or other settings; the reason says which"
        return Check("model", "fail", f"{name}: {error}", todo), None
    size = f", {_gb(weights)}" if weights else ""
    text = f"{config.model}: engine {engine.name}, device {engine.device}{size}"
    if is_fake(config.model):
        engine.close()
        return Check("model", "warn", text, "the fake engine writes letters: set model"), None
    return Check("model", "ok", text), engine


def check_layers(engine: Engine, config: ReplicaConfig) -> Check:
    """How the layers' rows are kept: quantized whole, a window, or not at all."""
    codec, spec = get_codec(config.codec), engine.key.spec
    refused = sorted(i for layers in refused_layers(spec, codec).values() for i in layers)
    kinds = [layer.kind for i, layer in enumerate(spec.layers) if i not in refused]
    rotating = kinds.count("sliding")
    kept = len(spec.layers) - len(refused) - rotating
    word = "in float16" if config.codec == "f16" else "quantized"
    text = f"{kept} {word}, {rotating} rotating, {len(refused)} refused (codec {config.codec})"
    if refused:
        text += f"; layers {', '.join(map(str, refused))}: a head dim the codec cannot store"
        return Check("layers", "fail", text, "another codec: f16 stores every head dim")
    if not kept:
        return Check("layers", "fail", text, "every layer slides: kvferry cannot name its blocks")
    return Check("layers", "ok", text)


def _memory(
    engine: Engine, config: ReplicaConfig, weights: int, ram: tuple[int, int] | None
) -> Check:
    """Weights, cells and pool of one replica, against the machine's RAM."""
    cells = config.cells or config.slots * config.n_ctx
    planned: Callable[..., int] | None = getattr(engine, "planned_bytes", None)
    if planned is not None:
        kv = planned(default_options(config), cells)
    elif engine.loads_encoded:
        kv = cells * row_bytes(engine.key.spec, get_codec(engine.loads_encoded))
    else:
        kv = cells * engine.key.spec.f16_row_bytes
    text = (
        f"model {_gb(weights)} + KV {_gb(kv)} ({cells} cells) + pool {_gb(config.pool_bytes)}, "
        "for each replica"
    )
    if ram is None:
        return Check(
            "memory", "warn", f"{text}; this machine does not say how much it has", "look yourself"
        )
    text += f"; RAM {_gb(ram[0])}, of which {_gb(ram[1])} are free"
    if weights + kv > ram[0]:
        return Check("memory", "fail", text, "fewer slots, a smaller n_ctx, or a quantized kv_type")
    if weights + kv + config.pool_bytes > ram[1]:
        return Check("memory", "warn", text, "a smaller pool_bytes, or fewer slots")
    return Check("memory", "ok", text)


def ram_bytes() -> tuple[int, int] | None:
    """(all, free or easily freed); where only the first is known, it stands for both."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # macOS
        return total, total
    free = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return total, free[0] if free else total


def _file_bytes(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


# ---- store, keys, disk


def check_keys(config: ReplicaConfig) -> list[Check]:
    """Whether the keys that are configured can be read."""
    found = []
    readers: tuple[tuple[str, Callable[[ReplicaConfig], Any], str], ...] = (
        ("signing key", read_signing_key, "none: cards carry a plain checksum"),
        ("encryption keys", read_cipher, "none: the store is plain"),
    )
    for name, read, none in readers:
        try:
            text = none if read(config) is None else "readable"
            found.append(Check(name, "ok", text))
        except (ValueError, StoreUnavailable) as error:
            todo = f"mend the file that {name.replace(' ', '_')}_file names"
            found.append(Check(name, "fail", str(error), todo))
    return found


def open_quickly(config: ReplicaConfig) -> CacheStore:
    """The store, with short deadlines. Raises ValueError, StoreUnavailable."""
    options = FilesOptions(timeout_s=_STORE_TIMEOUT_S, attempts=2)
    key, cipher = read_signing_key(config), read_cipher(config)
    return CacheStore(config.store, signing_key=key, cipher=cipher, options=options)


def check_store(config: ReplicaConfig) -> list[Check]:
    """Reachable, with exclusive creates; and whether its clock agrees with this machine's."""
    if config.store.startswith("cluster://"):
        return [Check("store", "ok", f"{config.store}: on the nodes' disks, while they run")]
    started = time.perf_counter()
    try:
        store = open_quickly(config)
        store.probe()
    except Locked as error:
        return [Check("store", "fail", str(error), "set encryption_keys_file, or another store")]
    except (ValueError, StorageError) as error:
        return [Check("store", "fail", str(error), "a store that can be reached and claimed on")]
    took = 1000 * (time.perf_counter() - started)
    text = f"{config.store}: reachable, creates are exclusive, probed in {took:.0f} ms"
    return [Check("store", "ok", text), _clock(store)]


def _clock(store: CacheStore) -> Check:
    before = time.time()
    try:
        there = store.files.now()
    except StorageError as error:
        return Check("clock", "fail", str(error), "the store must say when a file was written")
    skew = there - (before + time.time()) / 2
    text = f"the store's clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    if abs(skew) > _WRONG_CLOCK_S:
        return Check("clock", "fail", text, "set this machine's clock (NTP); S3 refuses such a one")
    if abs(skew) > _SKEW_S:
        return Check("clock", "warn", text, "set this machine's clock (NTP)")
    return Check("clock", "ok", text)


def check_local(config: ReplicaConfig) -> Check:
    """The node's own disk."""
    if not config.local or not config.local_bytes:
        return Check("local tier", "ok", "none: the store is near enough, or local_bytes = 0")
    folder = Path(config.local).expanduser().absolute()
    probe = folder / f"probe-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"kvferry")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        reason = f"{folder}: {error.strerror or error}"
        return Check("local tier", "fail", reason, "set local to a directory that can be written")
    text = f"{folder}: writable, {_gb(free)} free of {_gb(config.local_bytes)} it may take"
    if free < config.local_bytes:
        return Check("local tier", "warn", text, "free some space, or lower local_bytes")
    return Check("local tier", "ok", text)


# ---- what is installed


def check_build(engine: str) -> list[Check]:
    """The codec's C extension, and llama-cpp-python; `engine`: the one that would be used."""
    try:
        importlib.import_module("storage._codec")
        found = [Check("codec", "ok", "the C extension is present")]
    except ImportError:
        todo = "pip install -e . with a C compiler: without it numpy does the same, slowly"
        found = [Check("codec", "warn", "the C extension is missing", todo)]
    if engine == "mlx":
        found.append(_check_mlx())
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        status: Status = "fail" if engine == "llama.cpp" else "warn"
        todo = "pip install '.[llama]': GGUF models need it"
        return [*found, Check("llama.cpp", status, "llama-cpp-python is not installed", todo)]
    text = f"llama-cpp-python {version}"
    if version_of(version) < _LLAMA:
        wanted = ".".join(map(str, _LLAMA))
        return [*found, Check("llama.cpp", "fail", text, f"pip install llama-cpp-python>={wanted}")]
    if "+kvferry" not in version:
        text += ", without patches/llama.cpp, which `make` compiles in: decoding is slower"
    return [*found, Check("llama.cpp", "ok", text)]


def _check_mlx() -> Check:
    try:
        mlx, mlx_lm = (importlib.metadata.version(name) for name in ("mlx", "mlx-lm"))
    except importlib.metadata.PackageNotFoundError as error:
        return Check("mlx", "fail", f"{error.name} is not installed", "pip install '.[mlx]'")
    return Check("mlx", "ok", f"mlx {mlx}, mlx-lm {mlx_lm}")


def version_of(text: str) -> tuple[int, ...]:
    """The numbers a version begins with."""
    numbers = []
    for part in text.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _gb(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def check_packages() -> None:
    """`storage` and `actors` are generic names: make sure both are this repository's. Raises
    ModelUnavailable."""
    roots = {Path(str(package.__file__)).resolve().parent.parent for package in (actors, storage)}
    if len(roots) != 1:
        places = " and ".join(sorted(map(str, roots)))
        raise ModelUnavailable(f"packages actors and storage come from different places: {places}")
