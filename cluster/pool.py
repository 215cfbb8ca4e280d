"""One replica per device: starts a ModelReplica on every node that carries a device, follows nodes
as they join and leave, watches every replica, and replaces the dead with growing delays.

Lives in the router actor. A replica is a detached, named actor pinned to its node, so that it
survives the router and is found again by the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.config import ReplicaConfig
from actors.errors import ActorError
from actors.replica import ModelReplica
from actors.report import ReplicaInfo, ReplicaStatus
from cluster.placement import Candidate, link_cost
from cluster.remote import ReplicaLost, call
from storage.errors import StorageError

logger = logging.getLogger(__name__)
NAMESPACE = "kvferry"
DEVICE = "kvferry_device"  # the Ray resource of a node that carries a device
NODE_LABEL = "kvferry.io/node"  # optional Ray label: the node's name, else its host name
ENGINE_LABEL = "kvferry.io/engine"  # optional Ray label: the node's engine, else the configured one
_LOAD_TIMEOUT_S = 300.0
_STATUS_TIMEOUT_S = 3.0
_TICK_S = 0.5
_MAX_BACKOFF_S = 30.0


@dataclass(frozen=True)
class Node:
    """A living Ray node."""

    id: str  # its name in kvferry
    ray_id: str
    address: str
    has_device: bool
    engine: str = ""  # its own, if it has one


@dataclass(eq=False)
class Replica:
    """What the pool knows of one replica; `info` is None while it loads its model."""

    node: Node
    actor: Any
    info: ReplicaInfo | None = None
    status: ReplicaStatus | None = None
    healthy: bool = False
    seen: float = 0.0  # its clock at that report, less a margin
    watcher: asyncio.Task[None] | None = None


@dataclass
class _Backoff:
    failures: int = 0
    not_before: float = 0.0
    error: str = ""


@dataclass
class ReplicaPool:
    """on_status(replica) after every report, on_lost(node id) when a replica is gone."""

    config: ReplicaConfig
    on_status: Callable[[Replica], None]
    on_lost: Callable[[str], None]
    nodes: dict[str, Node] = field(default_factory=dict)  # by kvferry id
    replicas: dict[str, Replica] = field(default_factory=dict)  # by kvferry node id
    restarts: int = 0
    _backoff: dict[str, _Backoff] = field(default_factory=dict)

    async def run(self) -> None:
        """Follow the cluster for ever."""
        while True:
            try:
                await self._tick()
            except Exception:
                logger.exception("the replica pool failed; it tries again")
            await asyncio.sleep(_TICK_S)

    def healthy(self) -> list[Replica]:
        return [r for r in self.replicas.values() if r.healthy and r.info is not None]

    def errors(self) -> dict[str, str]:
        """Node id -> why its last replica died, while it has none that is ready."""
        ready = {replica.node.id for replica in self.healthy()}
        return {n: b.error for n, b in self._backoff.items() if b.error and n not in ready}

    def suspect(self, incarnation: str) -> None:
        """Somebody could not reach a replica: it gets no turns until it answers again."""
        for replica in self.healthy():
            if replica.info is not None and replica.info.incarnation == incarnation:
                replica.healthy = False

    async def _tick(self) -> None:
        self.nodes = _named(await asyncio.to_thread(ray.nodes))
        for name, replica in list(self.replicas.items()):
            node = self.nodes.get(name)
            if node is None or node.ray_id != replica.node.ray_id:
                self._remove(replica, "its node left")
        for node in self.nodes.values():
            backoff = self._backoff.setdefault(node.id, _Backoff())
            waits = time.monotonic() < backoff.not_before
            if node.has_device and node.id not in self.replicas and not waits:
                replica = Replica(node, self._start(node))
                self.replicas[node.id] = replica
                replica.watcher = asyncio.create_task(self._watch(replica))

    def _start(self, node: Node) -> Any:
        actor = ray.remote(ModelReplica)
        config = replace(self.config, engine=node.engine) if node.engine else self.config
        return actor.options(
            name=f"replica-{node.ray_id}",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            resources={DEVICE: 1},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.ray_id, soft=False),
            max_concurrency=1000,
        ).remote(config, node.id)

    async def _watch(self, replica: Replica) -> None:
        """Ask for a report twice a second, until the replica is gone."""
        name = replica.node.id
        try:
            replica.info = await call(replica.actor.info.remote(), _LOAD_TIMEOUT_S)
            assert replica.info is not None
            logger.info("replica on %s is ready (pid %d)", name, replica.info.pid)
            silent_since: float | None = None
            while self.replicas.get(name) is replica:
                try:
                    await self.refresh(replica)
                except ReplicaLost as error:
                    replica.healthy = False
                    silent_since = silent_since or time.monotonic()
                    if error.dead or time.monotonic() - silent_since > _MAX_BACKOFF_S:
                        raise
                else:
                    silent_since = None
                    self._backoff[name] = _Backoff()
                await asyncio.sleep(_TICK_S)
        except (ReplicaLost, ActorError, StorageError, ValueError) as error:
            self._remove(replica, str(error))

    async def refresh(self, replica: Replica) -> None:
        """Take a new report. Raises ReplicaLost, EngineFault."""
        status = await call(replica.actor.status.remote(replica.seen), _STATUS_TIMEOUT_S)
        replica.status, replica.seen = status, status.at - 2 * _TICK_S
        replica.healthy = True
        self.on_status(replica)

    async def refresh_all(self) -> None:
        """As `refresh`, for all that are healthy; a silent one keeps its last report."""
        pending = [self.refresh(replica) for replica in self.healthy()]
        await asyncio.gather(*pending, return_exceptions=True)

    def _remove(self, replica: Replica, reason: str) -> None:
        name = replica.node.id
        if self.replicas.get(name) is not replica:
            return
        del self.replicas[name]
        replica.healthy = False
        backoff = self._backoff.setdefault(name, _Backoff())
        backoff.failures += 1
        delay = min(_MAX_BACKOFF_S, 0.25 * 2**backoff.failures)
        backoff.not_before, backoff.error = time.monotonic() + delay, reason
        self.restarts += 1
        logger.warning("replica on %s is gone (%s); next try in %.1f s", name, reason, delay)
        ray.kill(replica.actor, no_restart=True)
        self.on_lost(name)


def candidate(replica: Replica) -> tuple[Candidate, float] | None:
    """What placement needs of a replica, and the share of its cells that is in use."""
    info, status = replica.info, replica.status
    if info is None or status is None:
        return None
    links = {
        name: link_cost(rate, info.row_bytes)
        for name, rate in status.links.items()
        if info.row_bytes
    }
    cells = status.cells_used / max(1, info.slots * info.n_ctx)
    found = Candidate(
        replica.node.id, status.queue_s, status.rates, cells, 0, links, status.prefixes
    )
    return found, cells


def _named(entries: list[dict[str, Any]]) -> dict[str, Node]:
    """Living Ray nodes by name; several on one host without a label get their Ray id appended."""
    nodes: dict[str, Node] = {}
    for entry in sorted(entries, key=lambda e: str(e["NodeID"])):
        if not entry["Alive"]:
            continue
        name = entry.get("Labels", {}).get(NODE_LABEL) or entry["NodeManagerHostname"]
        if name in nodes:
            name = f"{name}-{entry['NodeID'][:8]}"
        nodes[name] = Node(
            name,
            entry["NodeID"],
            entry["NodeManagerAddress"],
            DEVICE in entry["Resources"],
            entry.get("Labels", {}).get(ENGINE_LABEL, ""),
        )
    return nodes
