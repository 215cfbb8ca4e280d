"""kvferry bench ttft: what a turn costs by where its agent's memory is.

Starts a cluster of its own on a store of its own. For every context length and run a fresh agent
takes five turns, each the conversation so far and a short new message: cold; hot (in the engine);
warm (after its replica's RAM was emptied and, on Linux, the files' pages were dropped); after a
migration; after a restart of the whole cluster. Greedy, streamed, over HTTP, TTFT from the POST to
the first text. Before and after, the engine's raw prefill speed is measured in this process.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.client import Endpoint, EndpointError, Message
from bench.raw import RawEngine
from bench.report import Figures, print_report
from bench.texts import context
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.local import LocalCluster, divided

_REPLY_TOKENS = 16
_STAY_S = 1e6  # an agent moves only when told to: a turn is measured in the state it is meant for
_ROOM = 320  # tokens that the turns after the first add to a context
_READY_TIMEOUT_S = 300.0
_ACTOR_TIMEOUT_S = 60.0
_QUESTIONS = {
    "cold": "What are these notes about?",
    "hot": "Name one person.",
    "warm": "Name one thing.",
    "migrated": "Name one place.",
    "restarted": "Name one day.",
}


class BenchFailed(Exception):
    """A figure would not mean what it says."""


@dataclass
class Probe:
    """One agent: its conversation, and what its turns took."""

    length: int
    session: str
    messages: list[Message]
    rows: int = 0  # tokens whose KV the agent should hold
    stored: tuple[int, int] = (0, 0)  # (rows, bytes) after the cold turn
    prompt_tokens: int = 0  # of the cold turn
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cluster:
    """A running cluster: its endpoint, and the router for what has no HTTP call."""

    endpoint: Endpoint
    router: Any
    store: Path

    def settle(self) -> None:
        """Until what was handed over is stored: nothing runs in the background then."""
        import ray

        time.sleep(0.2)
        ray.get(self.router.flush.remote(), timeout=_ACTOR_TIMEOUT_S)

    def evict(self, node: str) -> None:
        """Empty a node's RAM, and drop the store's pages where the system lets us."""
        import ray

        ray.get(self.router.evict.remote(node), timeout=_ACTOR_TIMEOUT_S)
        drop_pages(self.store)


def run(settings: ClusterConfig, lengths: list[int], runs: int, text: Path | None) -> int:
    """Returns the exit code. Raises ConfigError, ModelUnavailable."""
    settings = divided(replace(settings, http=replace(settings.http, api_keys={})))
    placement = replace(settings.placement, hysteresis_s=_STAY_S)
    settings = replace(settings, placement=placement)
    try:
        with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as directory:
            store = Path(directory)
            replica = replace(settings.replica, store=f"file://{store}")
            figures = _measure(replace(settings, replica=replica), store, lengths, runs, text)
    except (BenchFailed, EndpointError) as error:
        print(f"kvferry bench: {error}", file=sys.stderr)
        return 1
    print_report(settings, runs, figures)
    return 0


def _measure(
    settings: ClusterConfig, store: Path, lengths: list[int], runs: int, text: Path | None
) -> list[Figures]:
    with RawEngine(settings.replica) as engine:
        probes = _probes(engine, lengths, runs, text)
        raw = _raw_rates(engine, probes)
        row_bytes = engine.f16_row_bytes
    with running_cluster(settings, store) as cluster:
        for number, probe in enumerate(probes):
            _progress(f"{probe.length} tokens: agent {number % runs + 1} of {runs}")
            _first_turns(cluster, probe)
    _progress("restarting the cluster")
    drop_pages(store)
    with running_cluster(settings, store) as cluster:
        for probe in probes:
            _turn(cluster, probe, "restarted", {"warm", "remote"})
    with RawEngine(settings.replica) as engine:
        for length, rates in _raw_rates(engine, probes).items():
            raw[length] += rates
    return [_figures(length, probes, raw[length], row_bytes) for length in lengths]


# ---- before the cluster


def _probes(engine: RawEngine, lengths: list[int], runs: int, text: Path | None) -> list[Probe]:
    """Every agent gets a text of its own: none may find another's prefix."""
    seed, n_probes = secrets.randbits(32), len(lengths) * runs
    given = _read(text) if text else None
    probes = []
    for index in range(n_probes):
        length = lengths[index // runs]
        if not 128 <= length <= engine.n_ctx - _ROOM:
            raise ConfigError(
                f"--contexts {length}: must be between 128 and {engine.n_ctx - _ROOM}"
            )
        if given is None:
            filling = context(seed + index, 2 * length)
        else:
            at = index * len(given) // n_probes
            filling = given[at:] + " " + given[:at]
        messages = engine.prompt(filling, _QUESTIONS["cold"], length)
        probes.append(Probe(length, f"bench-{secrets.token_hex(6)}", messages))
    return probes


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"--text {path}: {error.strerror}") from error


def _raw_rates(engine: RawEngine, probes: list[Probe]) -> dict[int, list[float]]:
    """Tokens/s by length, one measurement each, after one to warm up."""
    rates: dict[int, list[float]] = {}
    engine.prefill_s(probes[0].messages[:2])
    for probe in probes:
        if probe.length not in rates:
            _progress(f"{probe.length} tokens: raw prefill")
            first = probe.messages[:2]  # the cold prompt; later turns have been added since
            tokens, seconds = engine.prefill_s(first)
            rates[probe.length] = [tokens / seconds]
    return rates


# ---- on the cluster


@contextmanager
def running_cluster(settings: ClusterConfig, store: Path) -> Iterator[Cluster]:
    """A local one on a port of its own, ready. Raises BenchFailed, ConfigError."""
    http = replace(settings.http, host="127.0.0.1", port=free_port())
    with LocalCluster(replace(settings, http=http)) as local:
        local.serve()
        with Endpoint(f"http://{http.host}:{http.port}") as endpoint:
            await_ready(endpoint, settings.nodes)
            import ray  # not earlier: it reads the environment that LocalCluster prepares

            yield Cluster(endpoint, ray.get_actor("router", namespace="kvferry"), store)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_ready(
    endpoint: Endpoint,
    n_nodes: int,
    tend: Callable[[], object] = lambda: None,
    old: Collection[int | None] = (),
) -> None:
    """`tend` is called while it waits; replicas whose process is an `old` one do not count. Raises
    BenchFailed."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        tend()
        nodes = endpoint.request("GET", "/v1/cluster")["nodes"]
        if sum(n["replica"] == "ready" and n["pid"] not in old for n in nodes) == n_nodes:
            return
        time.sleep(0.3)
    raise BenchFailed(f"the cluster was not ready after {_READY_TIMEOUT_S:.0f} s")


def _first_turns(cluster: Cluster, probe: Probe) -> None:
    path = f"/v1/agents/{probe.session}"

    _turn(cluster, probe, "cold", {"cold"})
    agent = cluster.endpoint.request("GET", path)
    probe.stored = probe.rows, agent["bytes"]["store"]
    _turn(cluster, probe, "hot", {"hot"})
    cluster.evict(agent["node"])
    _turn(cluster, probe, "warm", {"warm"})
    nodes = cluster.endpoint.request("GET", "/v1/cluster")["nodes"]
    others = [n["id"] for n in nodes if n["replica"] == "ready" and n["id"] != agent["node"]]
    if others:
        cluster.endpoint.request("POST", f"{path}/migrate", {"target": others[0]})
        _turn(cluster, probe, "migrated", {"hot", "remote"})


def _turn(cluster: Cluster, probe: Probe, state: str, caches: set[str]) -> None:
    """One turn, held against what it claims to measure. Raises BenchFailed."""
    if probe.rows:
        probe.messages.append({"role": "user", "content": _QUESTIONS[state]})
    reply = cluster.endpoint.chat(probe.messages, session=probe.session, max_tokens=_REPLY_TOKENS)
    cluster.settle()
    if reply.cached_tokens != probe.rows:
        raise BenchFailed(
            f"{state} at {probe.length}: {reply.cached_tokens} tokens were cached, not the "
            f"{probe.rows} that the agent held"
        )
    if reply.cache not in caches:
        raise BenchFailed(f"{state} at {probe.length}: served {reply.cache} on {reply.node}")
    if not reply.text:
        raise BenchFailed(f"{state} at {probe.length}: the reply is empty")
    probe.seconds[state] = reply.ttft_s
    probe.prompt_tokens = probe.prompt_tokens or reply.prompt_tokens
    probe.messages.append({"role": "assistant", "content": reply.text})
    # A reply that is cut off at its limit ends with a token whose KV nobody needed yet.
    probe.rows = reply.prompt_tokens + reply.completion_tokens - (reply.reason == "length")


def drop_pages(directory: Path) -> None:
    """Make the next read of every file below a read from the disk, where the system lets us."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in directory.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _figures(length: int, probes: list[Probe], raw: list[float], row_bytes: int) -> Figures:
    of_length = [probe for probe in probes if probe.length == length]
    return Figures(
        length=length,
        prompt_tokens=median(probe.prompt_tokens for probe in of_length),
        seconds={
            state: [probe.seconds[state] for probe in of_length]
            for state in _QUESTIONS
            if state in of_length[0].seconds
        },
        raw_tokens_per_s=raw,
        stored_bytes=median(probe.stored[1] for probe in of_length),
        f16_bytes=median(probe.stored[0] * row_bytes for probe in of_length),
    )


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
