"""Clusters that a benchmark may hurt: nodes of this machine, or hosts with links of their own.

Both have an endpoint, can kill what serves an agent, and make all well again. The hosts are network
namespaces (tests.hosts, started by import string); they need root, iproute2 and a source checkout.
"""

from __future__ import annotations

import importlib
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.table import Table

from actors.config import ReplicaConfig
from bench.client import Endpoint, EndpointError, Message, Reply
from bench.kill import KillRefused, check_node, kill_node
from bench.texts import context
from bench.ttft import BenchFailed, await_ready, free_port
from cluster.config import ClusterConfig
from cluster.console import console
from cluster.errors import ConfigError
from cluster.local import LocalCluster, divided

Kill = Literal["process", "node", "host"]
KILLS: tuple[Kill, ...] = ("process", "node", "host")
_BEFORE = 16  # deltas, until the kill
STAY_S = 1e6  # an agent moves only when told to
_ROOT = Path(__file__).resolve().parent.parent
_HOSTS = ["a", "b"]
_WIDTH = 110  # of a table in a file
_UNITS = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}


class Site(Protocol):
    """A running cluster of two device nodes."""

    endpoint: Endpoint

    def kill(self, kind: Kill, node: str) -> None:
        """End the replica's process, its node, or cut its host off. Raises BenchFailed."""

    def recover(self) -> None:
        """Until every replica is ready again. Raises BenchFailed."""

    def limit(self, mbit: float) -> None:
        """The devices' links, both ways; 0: unlimited. Raises BenchFailed."""


# ---- nodes of this machine


class _LocalSite:
    def __init__(self, endpoint: Endpoint, local: LocalCluster) -> None:
        self.endpoint, self._local = endpoint, local

    def kill(self, kind: Kill, node: str) -> None:
        entry = node_of(self.endpoint, node)
        try:
            check_node(entry)
            if kind == "node":
                kill_node(entry)
            elif kind == "process":
                os.kill(entry["pid"], signal.SIGKILL)
            else:
                raise BenchFailed("only a host of its own can be cut off")
        except KillRefused as error:
            raise BenchFailed(str(error)) from error

    def recover(self) -> None:
        await_ready(self.endpoint, self._local.config.nodes, self._local.revive)

    def limit(self, mbit: float) -> None:
        raise BenchFailed("only hosts of their own have links")


@contextmanager
def local_site(settings: ClusterConfig) -> Iterator[Site]:
    """Device nodes of this machine, on a store of their own; those that die are started again.
    Raises BenchFailed, ConfigError."""
    settings = divided(replace(settings, http=replace(settings.http, api_keys={})))
    placement = replace(settings.placement, hysteresis_s=STAY_S, rebalance=0.0)
    settings = replace(settings, placement=placement)
    http = replace(settings.http, host="127.0.0.1", port=free_port())
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as store:
        replica = replace(settings.replica, store=f"file://{store}")
        with LocalCluster(replace(settings, http=http, replica=replica)) as local:
            local.serve()
            with Endpoint(f"http://{http.host}:{http.port}") as endpoint:
                await_ready(endpoint, settings.nodes)
                yield _LocalSite(endpoint, local)


# ---- hosts of their own


class HostSite:
    def __init__(self, endpoint: Endpoint, hosts: Any) -> None:
        self.endpoint, self._hosts = endpoint, hosts
        self._cut: set[str] = set()

    def kill(self, kind: Kill, node: str) -> None:
        if kind == "process":
            self._hosts.device_of(node).kill()
        elif kind == "node":
            self._hosts[node].kill()
        else:
            self._hosts[node].cut()
            self._cut.add(node)

    def recover(self) -> None:
        """A host that was cut off starts anew: one whose memory survived would restore faster."""
        for node in self._cut:
            self._hosts[node].kill()
        self._cut.clear()
        try:
            self._hosts.restore()
        except AssertionError as error:
            raise BenchFailed(str(error)) from error

    def limit(self, mbit: float) -> None:
        for name in self._hosts.devices:
            self._hosts[name].limit(mbit)

    def restart(self, *, empty: bool = False) -> None:
        """The replicas start anew, with nothing in RAM, and if they are to be `empty` nothing on
        their disks. Nobody runs an agent then. Raises BenchFailed."""
        pids = [node_of(self.endpoint, name)["pid"] for name in self._hosts.devices]
        for name in self._hosts.devices:
            self.kill("process", name)
        if empty:
            shutil.rmtree(self._hosts.environment["KVFERRY_LOCAL"])
        await_ready(self.endpoint, len(pids), old=pids)
        self.recover()


def parse_links(text: str) -> dict[str, float]:
    """Name -> Mbit/s, 0: unlimited. Raises ConfigError."""
    links = {}
    for name in text.split(","):
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", name)
        if name != "unlimited" and (found is None or not float(found[1])):
            raise ConfigError(f"--link {name!r}: wants 100mbit, 1gbit or unlimited")
        links[name] = float(found[1]) * _UNITS[found[2]] if found else 0.0
    return links


def check_hosts() -> None:
    """Raises BenchFailed, saying what is missing for hosts of their own."""
    if not (_ROOT / "tests" / "hosts.py").is_file():
        raise BenchFailed("hosts of their own need a source checkout: tests/hosts.py is not here")
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        raise BenchFailed("network namespaces need root and iproute2 (make system-deps)")


def _harness() -> Any:
    """tests.hosts of this checkout. Raises BenchFailed."""
    check_hosts()
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
    try:
        return importlib.import_module("tests.hosts")
    except ImportError as error:
        raise BenchFailed(f"the harness needs the development extra (make test): {error}") from None


@contextmanager
def host_site(settings: ClusterConfig, *, disks: bool) -> Iterator[HostSite]:
    """A head, a store, and two devices, each on a host of its own. Without `disks` nothing is kept
    on the devices': what is not in RAM comes from the store. Raises BenchFailed, ConfigError."""
    harness = _harness()
    given = _told(divided(replace(settings, nodes=len(_HOSTS))).replica)
    given |= {"hysteresis_s": STAY_S, "item_timeout_s": settings.http.item_timeout_s}
    given |= {} if disks else {"local_bytes": 0}
    try:
        with harness.cluster(_HOSTS, **given) as hosts, Endpoint(hosts.url) as endpoint:
            yield HostSite(endpoint, hosts)
    except AssertionError as error:
        raise BenchFailed(f"the hosts do not start: {error}") from error


def _told(replica: ReplicaConfig) -> dict[str, Any]:
    """What differs from the defaults, as settings; where things lie is the harness's business."""
    told = {
        field.name: getattr(replica, field.name)
        for field in fields(replica)
        if isinstance(field.default, str | int | float)
        and field.name not in ("store", "local", "local_bytes")
        and getattr(replica, field.name) != field.default
    }
    if Path(replica.model).exists():
        told["model"] = Path(replica.model).resolve()
    return told


# ---- of both


class Blow:
    """Kills what speaks after some deltas, and notes when the others came."""

    def __init__(self, site: Site, kill: Kill) -> None:
        self._site, self._kill = site, kill
        self._came: list[float] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.node, self.at, self.wall = "", 0.0, 0.0

    def on_delta(self, reply: Reply) -> None:
        self._came.append(time.monotonic())
        if len(reply.deltas) == _BEFORE:
            self.node = reply.node
            self._thread = threading.Thread(target=self._strike, daemon=True)
            self._thread.start()

    def _strike(self) -> None:
        self.at, self.wall = time.monotonic(), time.time()
        try:
            self._site.kill(self._kill, self.node)
        except (BenchFailed, EndpointError, OSError) as error:
            self._error = error

    def next_token_s(self) -> float:
        """From the kill to the end of the longest pause after it. Raises BenchFailed."""
        if self._thread is None:
            raise BenchFailed("the answer was over before anything was killed")
        self._thread.join(60.0)
        if self._error is not None:
            raise BenchFailed(f"nothing was killed: {self._error}") from self._error
        after = [at for at in self._came if at > self.at]
        if not after:
            raise BenchFailed("the answer was over when its replica died")
        return max((b - a, b) for a, b in pairwise([self.at, *after]))[1] - self.at


def node_of(endpoint: Endpoint, node: str) -> Any:
    """A node's entry in /v1/cluster. Raises BenchFailed, EndpointError."""
    nodes = endpoint.request("GET", "/v1/cluster")["nodes"]
    found = next((entry for entry in nodes if entry["id"] == node), None)
    if found is None:
        raise BenchFailed(f"{node} has left the cluster")
    return found


def wait_stored(endpoint: Endpoint, session: str, timeout_s: float = 60.0) -> int:
    """Until the shared store has an agent's memory; its tokens. Raises BenchFailed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        agent = endpoint.request("GET", f"/v1/agents/{session}")
        if agent["durable_tokens"] and agent["durable_tokens"] >= agent["tokens"] - 1:
            return int(agent["tokens"])
        time.sleep(0.1)
    raise BenchFailed(f"the memory of {session} was not stored in {timeout_s:.0f} s")


def chars_per_token(endpoint: Endpoint) -> float:
    """Of the texts that contexts are made of, by the model's own count."""
    text = context(1, 400)
    asked: list[Message] = [{"role": "user", "content": text}]
    return len(text) / endpoint.chat(asked, session=None, max_tokens=1).prompt_tokens


def filling(n_tokens: int, chars: float) -> str:
    """A text of n_tokens tokens, `chars` characters each, that nobody has seen before."""
    text = context(secrets.randbits(31), n_tokens)
    while len(text) < n_tokens * chars:
        text += " " + context(secrets.randbits(31), n_tokens)
    return text[: int(n_tokens * chars)]


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show(table: Table) -> None:
    """Where nobody's window is too narrow for it, whole."""
    console.print(table, soft_wrap=False, width=None if console.is_terminal else _WIDTH)
