"""One frozen ClusterConfig, composed of the parts' configs and built once, at the edge.

Sources, later ones win: defaults, a TOML file, the environment (KVFERRY_<NAME>), flags. A name is
the same everywhere: `slots = 2`, KVFERRY_SLOTS=2. Nothing below the edge reads the environment.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from actors.config import ReplicaConfig
from actors.engine_settings import check_engine, check_lora, speculation_of
from cluster.disks import DEFAULT_REPLICAS, SCHEME
from cluster.errors import ConfigError
from cluster.placement import PlacementConfig
from storage.card import TENANT_PATTERN
from storage.codec import CODECS
from storage.files import is_remote
from storage.retention import RetentionPolicy
from storage.spec import check_equivalent_digests
from storage.store import CacheStore

PREFIX = "KVFERRY_"
# Variables with the prefix that are not settings: where the file is, and the tests' switches.
_NOT_SETTINGS = {"CHAOS", "CONFIG", "DATA", "LLAMA_SERVER", "REQUIRE", "SEED", "URL"}
_SECRET = {"api_keys", "encryption_keys"}


@dataclass(frozen=True)
class HttpConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Mapping[str, str] = field(default_factory=dict)  # key -> tenant; empty: open
    temperature: float = 0.7  # of requests that do not say
    top_p: float = 0.95
    request_timeout_s: float = 600.0  # a whole turn, waiting included
    item_timeout_s: float = 2.5  # without a sign of life from the replica: fail over


@dataclass(frozen=True)
class ClusterConfig:
    replica: ReplicaConfig = field(default_factory=ReplicaConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    nodes: int = 2  # device nodes of a local cluster (kvferry up)
    engines: str = ""  # of its nodes in turn, "llama.cpp,mlx"; "": `engine` on all of them
    gc_interval_s: float = 3600.0  # between two rounds of upkeep of `kvferry up`; 0: never


def load_config(
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> ClusterConfig:
    """Raises ConfigError naming the source and the setting."""
    environment = environment or {}
    if path is None and environment.get(f"{PREFIX}CONFIG"):
        path = Path(environment[f"{PREFIX}CONFIG"])
    values: dict[str, Any] = {}
    if path is not None:
        values |= _checked(_read_toml(path), str(path))
    from_environment = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in _NOT_SETTINGS
    }
    values |= _checked(from_environment, "environment")
    values |= _checked({k: v for k, v in (flags or {}).items() if v is not None}, "flags")
    config = _compose(values)
    _validate(config)
    return config


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


_SECTIONS: dict[str, Any] = {
    "replica": ReplicaConfig(),
    "http": HttpConfig(),
    "placement": PlacementConfig(),
    "retention": RetentionPolicy(),
}


_OWN = ("nodes", "engines", "gc_interval_s")  # of ClusterConfig itself


def _known() -> dict[str, Any]:
    """Setting name -> its default."""
    known: dict[str, Any] = {name: getattr(ClusterConfig(), name) for name in _OWN}
    for section in _SECTIONS.values():
        known |= {f.name: getattr(section, f.name) for f in fields(section)}
    return known


def _check_tenants(api_keys: Mapping[str, str]) -> None:
    if not all(TENANT_PATTERN.match(tenant) for tenant in api_keys.values()):
        raise ValueError("a tenant is lower-case letters, digits, - and _, at most 64")


# Tables, whose values have a form.
_CHECKS = {"api_keys": _check_tenants, "equivalent_digests": check_equivalent_digests}


def _checked(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    known = _known()
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{source}: unknown setting {name!r}; known: {', '.join(known)}")
        try:
            checked[name] = _convert(value, known[name])
            if name in _CHECKS:
                _CHECKS[name](checked[name])
        except (ValueError, TypeError) as error:
            shown = "…" if name in _SECRET else repr(value)  # keys are no business of a log
            raise ConfigError(f"{source}: {name} = {shown}: {error}") from error
    return checked


def _convert(value: Any, default: Any) -> Any:
    if isinstance(default, Mapping):
        if isinstance(value, str):  # "key:value,key:value"
            pairs = [entry.split(":", 1) for entry in value.split(",") if entry]
            if not all(len(pair) == 2 for pair in pairs):
                raise ValueError("wants key:value,key:value")
            value = dict(pairs)
        if not isinstance(value, Mapping):
            raise TypeError("wants a table of key = value")
        return dict(value)
    if isinstance(value, bool):
        raise TypeError("wants no true or false")
    if isinstance(default, float):
        return float(value)
    if isinstance(default, int):
        if isinstance(value, float):
            raise TypeError("wants a whole number")
        return _bytes(value) if isinstance(value, str) else int(value)
    if not isinstance(value, str):
        raise TypeError("wants a string")
    return value


def _bytes(text: str) -> int:
    """ "512", "64MB", "2GiB": a count, or bytes."""
    match = re.fullmatch(r"\s*(\d+)\s*([kmgt]?)(i?b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError("wants a whole number, or bytes such as 512MB")
    return int(match[1]) << 10 * " kmgt".index(match[2].lower() or " ")


def _compose(values: Mapping[str, Any]) -> ClusterConfig:
    """Relative paths are the caller's: replicas are other processes, in other directories."""
    values = _known() | dict(values)
    values["store"] = _clustered(values["store"], values["replicas"], values["local"])
    for name in ("store", "model", "lora", "draft_model", "local"):
        if name == "local" and not values[name]:
            values[name] = ".kvferry/local" if is_remote(values["store"]) else ""
        if values[name] and "://" not in values[name]:
            path = Path(values[name]).expanduser().absolute()
            values[name] = f"file://{path}" if name == "store" else str(path)
    for name in ("signing_key_file", "encryption_keys_file", "profile_dir", "model_dir"):
        if values[name]:
            values[name] = str(Path(values[name]).expanduser().absolute())
    sections = {
        name: replace(section, **{f.name: values[f.name] for f in fields(section)})
        for name, section in _SECTIONS.items()
    }
    return ClusterConfig(**{name: values[name] for name in _OWN}, **sections)


def _clustered(store: str, replicas: int, local: str) -> str:
    """The URL of a store on the cluster's own disks, with its folder and number of copies. Raises
    ConfigError for settings that only one kind of store has."""
    if not store.startswith(SCHEME):
        if replicas:
            raise ConfigError(
                f"replicas = {replicas}: store = {store} keeps what it is given by itself; copies "
                f"on the nodes' own disks want store = {SCHEME}…"
            )
        return store
    if local:
        raise ConfigError(f"local = {local}: with store = {store} blocks are on the nodes' disks")
    folder, _, query = store.removeprefix(SCHEME).partition("?")
    if query and replicas:
        raise ConfigError(f"replicas = {replicas}, and store = {store} says how many: set one")
    path = Path(folder or ".kvferry/cluster").expanduser().absolute()
    return f"{SCHEME}{path}?{query or f'replicas={replicas or DEFAULT_REPLICAS}'}"


def check_engines(config: ClusterConfig) -> None:
    """Raises ValueError for engines that some node could not have."""
    names = config.engines.split(",") if config.engines else []
    if len(names) > config.nodes:
        raise ValueError(f"engines = {config.engines}: more of them than the {config.nodes} nodes")
    for name in names:
        check_engine(replace(config.replica, engine=name))


def _bounds(config: ClusterConfig) -> list[tuple[str, float, float, float]]:
    """(setting, its value, least, most)."""
    replica, http, placement = config.replica, config.http, config.placement
    retention = config.retention
    return [
        ("nodes", config.nodes, 1, 64),
        ("gc_interval_s", config.gc_interval_s, 0, 1e9),
        ("port", http.port, 1, 65535),
        ("replicas", replica.replicas, 0, 16),
        ("slots", replica.slots, 1, 255),
        ("n_ctx", replica.n_ctx, 16, 1 << 20),
        ("max_waiting", replica.max_waiting, 1, 1 << 16),
        ("max_tokens", replica.max_tokens, 1, 1 << 20),
        ("prefill_chunk", replica.prefill_chunk, 1, 512),
        ("prefill_chunk_busy", replica.prefill_chunk_busy, 1, 512),
        ("max_step_s", replica.max_step_s, 0, 60),
        ("draft_tokens", replica.draft_tokens, 1, 32),
        ("turn_timeout_s", replica.turn_timeout_s, 1, 1e6),
        ("cells", replica.cells, 0, 1 << 24),
        ("pool_bytes", replica.pool_bytes, 0, 1 << 50),
        ("local_bytes", replica.local_bytes, 0, 1 << 50),
        ("daily_write_bytes", replica.daily_write_bytes, 0, 1 << 50),
        ("threads", replica.threads, 0, 1024),
        ("cores", replica.cores, 0, 1024),
        ("ubatch", replica.ubatch, 0, 512),
        ("kv_budget", replica.kv_budget, 0, 1 << 50),
        ("temperature", http.temperature, 0, 2),
        ("top_p", http.top_p, 1e-6, 1),
        ("request_timeout_s", http.request_timeout_s, 1, 1e6),
        ("item_timeout_s", http.item_timeout_s, 1, 1e6),
        ("hysteresis_s", placement.hysteresis_s, 0, 1e9),
        ("hysteresis", placement.hysteresis, 0, 1e9),
        ("migrate_s", placement.migrate_s, 0, 1e9),
        ("pressure_s", placement.pressure_s, 0, 1e9),
        ("warn_s", placement.warn_s, 0, 1e9),
        ("rebalance", placement.rebalance, 0, 1e9),
        ("quota_bytes", retention.quota_bytes, 0, 1 << 60),
        ("idle_ttl_s", retention.idle_ttl_s, 0, 1e10),
        ("token_ttl_s", retention.token_ttl_s, 0, 1e10),
    ]


def _validate(config: ClusterConfig) -> None:
    replica = config.replica
    for name, value, low, high in _bounds(config):
        if not low <= value <= high:
            raise ConfigError(f"{name} = {value}: must be between {low} and {high}")
    if replica.durability not in ("behind", "sync"):
        raise ConfigError(f"durability = {replica.durability!r}: behind or sync")
    if replica.share_model not in ("auto", "head", "store", "off"):
        raise ConfigError(f"share_model = {replica.share_model!r}: auto, head, store or off")
    if replica.codec not in CODECS:
        raise ConfigError(f"codec = {replica.codec!r}: known codecs are {', '.join(CODECS)}")
    try:
        check_engine(replica)
        check_engines(config)
        check_lora(replica)
        speculation_of(replica)
        CacheStore(replica.store)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if replica.store.startswith("memory://"):
        raise ConfigError("store = memory://: replicas are processes and would not share it")
