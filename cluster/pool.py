"""One replica per device: starts a ModelReplica on every node that carries a device, follows nodes
as they join and leave, watches every replica, and replaces the dead with growing delays. One whose
model or versions are not the pool's is refused, and seldom tried again; where replicas keep dying,
that is said.

Lives in the router actor. A replica is a detached, named actor pinned to its node, so that it
survives the router and is found again by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.config import ReplicaConfig
from actors.errors import ActorError
from actors.replica import ModelReplica
from actors.report import ReplicaInfo, versions
from actors.weights import WeightsProvider
from cluster.disks import NAMESPACE, RemoteDisk, disk_folder, node_folder, open_disk
from cluster.errors import MigrationFailed
from cluster.member import Backoff, Refused, Replica, check_fits
from cluster.nodes import DEVICE, Node, named
from cluster.remote import ReplicaLost, call
from storage.errors import StorageError
from storage.fetch import Progress

T = TypeVar("T")
logger = logging.getLogger(__name__)
_LOAD_TIMEOUT_S = 300.0
_STALL_S = 120.0  # without a word of a download, which itself notices earlier that it stalls
_LONGEST_LOAD_S = 7 * 86400.0  # however slow the link
_STATUS_TIMEOUT_S = 3.0
_TICK_S = 0.5
_WATCH_S = 0.1
_SILENT_S = 30.0  # without a report: it is gone
_SHORT_LIFE_S = 15.0  # a replica that was ready for less has failed
_FLUSH_TIMEOUT_S = 60.0


@dataclass
class ReplicaPool:
    """on_status(replica) after every report, on_lost(node id) when a replica is gone."""

    config: ReplicaConfig
    on_status: Callable[[Replica], None]
    on_lost: Callable[[str], None]
    nodes: dict[str, Node] = field(default_factory=dict)  # by kvferry id
    replicas: dict[str, Replica] = field(default_factory=dict)  # by kvferry node id
    disks: dict[str, RemoteDisk] = field(default_factory=dict)  # their local tiers, by node id
    restarts: int = 0
    held: set[str] = field(default_factory=set)  # nodes that get no replica
    weights: WeightsProvider | None = None  # what its replicas take along
    versions: Mapping[str, str] = field(default_factory=versions)
    clock: Callable[[], float] = time.monotonic
    _backoff: dict[str, Backoff] = field(default_factory=dict)
    _opened: dict[str, RemoteDisk] = field(default_factory=dict)  # by Ray's id of the node

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
        quiet = {replica.node.id for replica in self.healthy()} | self.held
        now, known = self.clock(), self._backoff.items()
        return {n: b.told(now) for n, b in known if b.error and n not in quiet}

    def refused(self) -> set[str]:
        """Nodes whose replicas do not fit to the others, while they wait for the next try."""
        return {n for n, b in self._backoff.items() if b.refused and n not in self.replicas}

    def suspect(self, incarnation: str) -> None:
        """Somebody could not reach a replica: it gets no turns until it answers again."""
        for replica in self.healthy():
            if replica.info is not None and replica.info.incarnation == incarnation:
                replica.healthy = False

    async def unless_lost(self, work: Coroutine[Any, Any, T], *replicas: Replica) -> T:
        """What `work` returns; it is cancelled when one of these replicas, healthy at first, is
        not any more: turns of the agent wait for it. Raises MigrationFailed then."""
        task = asyncio.create_task(work)
        watched = [replica for replica in replicas if replica.healthy]
        try:
            while not (await asyncio.wait([task], timeout=_WATCH_S))[0]:
                lost = [r.node.id for r in watched if not r.healthy]
                if lost:
                    task.cancel()
                    await asyncio.wait([task])
                    if task.cancelled():
                        raise MigrationFailed(f"{' and '.join(lost)} does not answer")
            return await task
        finally:
            task.cancel()

    async def _tick(self) -> None:
        self.nodes = named(await asyncio.to_thread(ray.nodes))
        for name, replica in list(self.replicas.items()):
            node = self.nodes.get(name)
            if node is None or node.ray_id != replica.node.ray_id:
                self._remove(replica, "its node left")
        here = {replica.incarnation for replica in self.replicas.values()}
        for node in self.nodes.values():
            backoff = self._backoff.setdefault(node.id, Backoff())
            waits = backoff.waits(node, self.clock(), here) or node.id in self.held
            if node.has_device and node.id not in self.replicas and not waits:
                replica = Replica(node, self._start(node))
                self.replicas[node.id] = replica
                replica.watcher = asyncio.create_task(self._watch(replica))
        self._open_disks()

    def _open_disks(self) -> None:
        """Others may read, and the store may use, the disk of every node that has a device."""
        folder = disk_folder(self.config)
        if folder:
            devices = [node for node in self.nodes.values() if node.has_device]
            self.disks = {n.id: self._disk(n, node_folder(folder, n.id)) for n in devices}

    def _disk(self, node: Node, folder: str) -> RemoteDisk:
        known = self._opened.get(node.ray_id)
        if known is None:
            known = open_disk(node.id, node.ray_id, folder)
            here = {n.ray_id for n in self.nodes.values()}
            self._opened = {i: d for i, d in self._opened.items() if i in here}
            self._opened[node.ray_id] = known
        return known

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
        ).remote(config, node.id, self.weights)

    async def _watch(self, replica: Replica) -> None:
        """Ask for a report twice a second, until the replica is gone."""
        name = replica.node.id
        try:
            info = await self._loaded(replica)
            self.check(info)
            replica.info, replica.ready_at = info, self.clock()
            logger.info("replica on %s is ready (pid %d)", name, info.pid)
            silent_since: float | None = None
            while self.replicas.get(name) is replica:
                try:
                    await self._introduce(replica)
                    await self.refresh(replica)
                except ReplicaLost as error:
                    replica.healthy = False
                    silent_since = silent_since or time.monotonic()
                    if error.dead or time.monotonic() - silent_since > _SILENT_S:
                        raise
                else:
                    silent_since = None
                    known = self._backoff.setdefault(name, Backoff())
                    self._backoff[name] = Backoff(died=known.died)
                await asyncio.sleep(_TICK_S)
        except Refused as error:
            self._remove(replica, str(error), error)
        except (ReplicaLost, ActorError, StorageError, ValueError) as error:
            self._remove(replica, str(error))
        except Exception as error:  # unwatched, it would seem healthy for ever
            logger.exception("watching the replica on %s failed", name)
            self._remove(replica, f"{type(error).__name__}: {error}")

    async def _introduce(self, replica: Replica) -> None:
        """To the disks that it has not met. Raises ReplicaLost."""
        known = frozenset(self._opened)
        if known != replica.met:
            disks = list(self._opened.values())
            await call(replica.actor.meet.remote(disks), _STATUS_TIMEOUT_S)
            replica.met = known

    async def _loaded(self, replica: Replica) -> ReplicaInfo:
        """What it says once it has loaded its model: in time, where nothing has to be fetched; else
        as long as that gets on. Raises ReplicaLost."""
        replica.moved = self.clock()
        asked = asyncio.ensure_future(call(replica.actor.info.remote(), _LONGEST_LOAD_S))
        try:
            while not asked.done():
                limit = _STALL_S if replica.fetching else _LOAD_TIMEOUT_S
                left = replica.moved + limit - self.clock()
                if left <= 0:
                    what = "heard nothing of its download" if replica.fetching else "not loaded"
                    raise ReplicaLost(f"{what} for {limit:g} s")
                await asyncio.wait({asked}, timeout=min(left, _TICK_S))
            info: ReplicaInfo = asked.result()
            return info
        finally:
            asked.cancel()
            replica.fetching = None

    def fetching(self, node: str, progress: Progress | None) -> None:
        """A replica that loads tells how far its download is; None: that is over."""
        replica = self.replicas.get(node)
        if replica is not None and replica.info is None:
            replica.fetching, replica.moved = progress, self.clock()

    def check(self, info: ReplicaInfo) -> None:
        """Raises Refused when a replica does not fit to those that are here."""
        others = (r.info for r in self.replicas.values() if r.info and r.node.id != info.node)
        check_fits(info, self.versions, next(others, None))

    async def refresh(self, replica: Replica) -> None:
        """Take a new report. Raises ReplicaLost, EngineFault."""
        status = await call(replica.actor.status.remote(replica.seen), _STATUS_TIMEOUT_S)
        if self.replicas.get(replica.node.id) is not replica:
            return  # released meanwhile
        replica.status, replica.seen = status, status.at - 2 * _TICK_S
        replica.healthy = True
        self.on_status(replica)

    async def refresh_all(
        self, replicas: Iterable[Replica] | None = None, timeout: float = _STATUS_TIMEOUT_S
    ) -> None:
        """As `refresh`, for these, or all that are healthy; a silent one keeps its last report."""
        asked = self.healthy() if replicas is None else replicas
        reports = asyncio.gather(*map(self.refresh, asked), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await reports

    def hold(self, node: str) -> None:
        """No replica is started there, should this one die."""
        self.held.add(node)

    def rejoin(self, node: str) -> None:
        """The node may have a replica again, at once."""
        self.held.discard(node)
        self._backoff.pop(node, None)

    async def release(self, node: str) -> None:
        """Close a node's replica, once it has stored what it holds; no new one is started until
        `rejoin`. Raises ReplicaLost, StorageError: then it is not closed."""
        self.hold(node)
        replica = self.replicas.get(node)
        if replica is None:
            return
        try:
            await call(replica.actor.flush.remote(), _FLUSH_TIMEOUT_S)
        except ReplicaLost as error:
            if not error.dead:
                raise
        if self.replicas.get(node) is replica:
            del self.replicas[node]
            replica.healthy = False
            logger.info("replica on %s is released", node)
            self._kill(replica)
            self.on_lost(node)

    def _kill(self, replica: Replica) -> None:
        ray.kill(replica.actor, no_restart=True)

    def _remove(self, replica: Replica, reason: str, refused: Refused | None = None) -> None:
        name = replica.node.id
        if self.replicas.get(name) is not replica:
            return
        del self.replicas[name]
        replica.healthy = False
        backoff = self._backoff.setdefault(name, Backoff())
        now = self.clock()
        young = replica.ready_at is None or now - replica.ready_at < _SHORT_LIFE_S
        if refused is not None:
            delay = backoff.does_not_fit(now, refused, replica.node.ray_id)
        else:
            delay = backoff.failed(now, reason, young=young)
        self.restarts += 1
        logger.warning("replica on %s is gone (%s); next try in %.1f s", name, reason, delay)
        self._kill(replica)
        self.on_lost(name)
