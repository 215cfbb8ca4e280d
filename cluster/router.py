"""The placement router: a thin actor around registry, placement, pool and migration.

The ingress asks it where a turn runs and goes straight to that replica; no token passes here.
Decisions for one agent are made one after another, for different agents side by side. It keeps
nothing that the replicas and the store could not tell it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from dataclasses import asdict, dataclass
from typing import Any

from actors.errors import AgentMoved
from actors.models import open_store
from cluster.config import ClusterConfig
from cluster.errors import AgentBusy, MigrationFailed, NoReplica, UnknownAgent, UnknownNode
from cluster.migration import Migration, migrate
from cluster.placement import Placement, place
from cluster.pool import Replica, ReplicaPool, candidate
from cluster.registry import AgentRecord, Registry
from cluster.remote import ReplicaLost, call
from storage.card import AgentId
from storage.errors import StorageError
from storage.spec import CompatibilityKey

logger = logging.getLogger(__name__)
ROUTER_NAME = "router"
_CALL_TIMEOUT_S = 15.0
_PLACE_TIMEOUT_S = 30.0  # to wait for a replica, when none is ready
_STAY_S = 60.0  # after an operator's migration


@dataclass(frozen=True)
class Decision:
    """Where a turn runs: the replica's actor handle, and which life of it."""

    node: str
    incarnation: str
    actor: Any
    placement: Placement


class PlacementRouter:
    """Hosted by Ray as a named, detached, asynchronous actor."""

    def __init__(self, config: ClusterConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._config = config
        self._registry = Registry()
        self._pool = ReplicaPool(config.replica, self._on_status, self._registry.node_lost)
        self._locks: weakref.WeakValueDictionary[AgentId, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._key: CompatibilityKey | None = None
        self._scanned = asyncio.Event()
        self._migrations = 0
        self._tasks = [asyncio.create_task(self._pool.run())]

    # ---- placement

    async def place(
        self,
        agent: AgentId,
        n_chars: int,
        reply_tokens: int,
        *,
        turn_id: str = "",
        persist: bool = True,
        avoid: frozenset[str] = frozenset(),
    ) -> Decision:
        """Decide, and bring the agent there if its owner lives elsewhere.

        `avoid`: incarnations that failed this turn; used only if nothing else is ready. Raises
        NoReplica when none is ready within a deadline.
        """
        async with self._lock(agent):
            replicas = await self._ready(avoid)
            location = self._registry.location(agent)
            if location.node is not None and location.node not in self._pool.replicas:
                self._registry.node_lost(location.node)
                location = self._registry.location(agent)
            new_tokens = self._registry.new_tokens(agent, n_chars)
            counts = self._registry.count
            candidates = [c for n, r in replicas.items() if (c := candidate(r, counts(n)))]
            owner = location.node
            able = owner in replicas and _incarnation(replicas[owner]) not in avoid
            if able and self._registry.stays(agent, time.monotonic()):
                candidates = [c for c in candidates if c.node == owner]
            decision = place(new_tokens, reply_tokens, location, candidates, self._config.placement)
            node = decision.node
            if persist and owner is not None and owner != node and owner in replicas:
                try:
                    await self._move(agent, replicas[owner], replicas[node])
                except MigrationFailed as error:
                    logger.warning("agent %s stays on %s: %s", agent, owner, error)
                    node = owner
            if persist:
                self._registry.assign(agent, node)
                until = time.monotonic() + self._config.http.request_timeout_s
                self._registry.turn_began(agent, turn_id, until)
            chosen = next(e for e in decision.estimates if e.node == node)
            replicas[node].promised_s += chosen.total_s - chosen.queue_s
            return Decision(node, _incarnation(replicas[node]), replicas[node].actor, decision)

    async def _ready(self, avoid: frozenset[str]) -> dict[str, Replica]:
        """Replicas that can take a turn, waiting for one if need be."""
        deadline = asyncio.get_running_loop().time() + _PLACE_TIMEOUT_S
        while True:
            healthy = {r.node.id: r for r in self._pool.healthy()}
            fresh = {n: r for n, r in healthy.items() if _incarnation(r) not in avoid}
            if fresh or healthy:
                return fresh or healthy
            if asyncio.get_running_loop().time() > deadline:
                reasons = "; ".join(f"{n}: {e}" for n, e in self._pool.errors().items())
                raise NoReplica(f"no replica is ready{f' ({reasons})' if reasons else ''}")
            await asyncio.sleep(0.05)

    def ended(self, agent: AgentId, turn_id: str, n_chars: int | None) -> None:
        """A turn is over; n_chars: of its messages and its reply, None if it was not answered."""
        self._registry.turn_ended(agent, turn_id)
        if n_chars is not None:
            self._registry.spoken(agent, n_chars)

    def suspect(self, incarnation: str) -> None:
        """An ingress lost this replica in the middle of a turn."""
        self._pool.suspect(incarnation)

    # ---- agents

    async def migrate(self, agent: AgentId, target: str) -> Migration:
        """Raises UnknownAgent, UnknownNode, NoReplica, MigrationFailed."""
        async with self._lock(agent):
            record = await self._known(agent)
            replica = self._pool.replicas.get(target)
            if replica is None:
                known = ", ".join(sorted(self._pool.replicas)) or "none"
                raise UnknownNode(f"no node {target!r} with a replica; there are: {known}")
            if not replica.healthy:
                raise NoReplica(f"the replica on {target} is not ready")
            source = self._pool.replicas.get(record.node) if record.node else None
            if source is replica:
                done = Migration(target, target, record.epoch, 0.0)
            else:
                done = await self._move(agent, source, replica)
            self._registry.settled(agent, time.monotonic() + _STAY_S)
            return done

    async def _move(self, agent: AgentId, source: Replica | None, target: Replica) -> Migration:
        pair = (source.node.id, source.actor) if source is not None else None
        done = await migrate(agent, pair, (target.node.id, target.actor))
        self._registry.assign(agent, target.node.id)
        self._migrations += 1
        logger.info("agent %s moved: %s", agent, done)
        return done

    async def delete(self, agent: AgentId) -> None:
        """Raises UnknownAgent, AgentBusy, NoReplica."""
        async with self._lock(agent):
            record = await self._known(agent)
            replicas = await self._ready(frozenset())
            owner = replicas.get(record.node) if record.node else None
            replica = owner or next(iter(replicas.values()))
            try:
                await call(replica.actor.delete.remote(agent), _CALL_TIMEOUT_S)
            except AgentMoved as error:
                raise AgentBusy(str(error)) from error
            except ReplicaLost as error:
                raise NoReplica(f"the replica on {replica.node.id} was lost: {error}") from error
            self._registry.forget(agent)

    async def agent(self, agent: AgentId) -> dict[str, Any]:
        """One agent's record. Raises UnknownAgent."""
        return _record(await self._known(agent))

    async def agents(self, tenant: str) -> list[dict[str, Any]]:
        await self._up_to_date()
        return [_record(record) for record in self._registry.all(tenant)]

    async def _known(self, agent: AgentId) -> AgentRecord:
        await self._up_to_date()
        record = self._registry.get(agent)
        if record is None:
            raise UnknownAgent(f"no agent {str(agent)!r}")
        return record

    async def _up_to_date(self) -> None:
        """The replicas have reported and the store has been read; a slow one delays no one for
        long."""
        await self._pool.refresh_all()
        try:
            await asyncio.wait_for(self._scanned.wait(), _CALL_TIMEOUT_S)
        except TimeoutError:
            logger.warning("answering before the store has been read")

    # ---- reports

    async def cluster(self) -> dict[str, Any]:
        """Every node of the cluster, and what its replica says."""
        await self._pool.refresh_all()
        errors = self._pool.errors()
        return {
            "model": self._config.replica.model,
            "store": self._config.replica.store,
            "codec": self._config.replica.codec,
            "agents": len(self._registry),
            "migrations": self._migrations,
            "replica_losses": self._pool.restarts,
            "nodes": [
                _node(node.id, node.address, node.has_device, self._pool.replicas.get(node.id))
                | ({"error": errors[node.id]} if node.id in errors else {})
                for node in sorted(self._pool.nodes.values(), key=lambda n: n.id)
            ],
        }

    async def ready(self) -> dict[str, Any]:
        """Whether a turn could run, and why not."""
        n = len(self._pool.healthy())
        return {"ready": n > 0, "replicas": n, "errors": self._pool.errors()}

    async def flush(self) -> None:
        """Before a stop: done when every replica has stored what it holds, or does not answer."""
        pending = [call(r.actor.flush.remote(), _CALL_TIMEOUT_S) for r in self._pool.healthy()]
        await asyncio.gather(*pending, return_exceptions=True)

    async def evict(self, node: str) -> int:
        """Empty a replica's RAM, for tests and measurements. Raises UnknownNode, ReplicaLost."""
        replica = self._pool.replicas.get(node)
        if replica is None:
            raise UnknownNode(f"no node {node!r} with a replica")
        freed: int = await call(replica.actor.evict.remote(), _CALL_TIMEOUT_S)
        return freed

    def _on_status(self, replica: Replica) -> None:
        assert replica.status is not None
        assert replica.info is not None
        self._registry.reported(replica.node.id, replica.status.agents)
        if self._key is None:
            self._key = replica.info.key
            self._tasks.append(asyncio.create_task(self._scan(self._key)))

    async def _scan(self, key: CompatibilityKey) -> None:
        """Once, after a start: learn of the agents that the store remembers."""
        try:
            store = open_store(self._config.replica)
            cards = await asyncio.to_thread(lambda: list(store.cards(store.tenants(), key)))
        except StorageError as error:
            logger.warning("cannot read the store's agents: %s", error)
            cards = []
        for loaded in cards:
            self._registry.found_in_store(loaded)
        self._scanned.set()

    def _lock(self, agent: AgentId) -> asyncio.Lock:
        return self._locks.setdefault(agent, asyncio.Lock())


def _incarnation(replica: Replica) -> str:
    return replica.info.incarnation if replica.info is not None else ""


def _record(record: AgentRecord) -> dict[str, Any]:
    return {
        "id": str(record.agent),
        "node": record.node,
        "state": record.state,
        "epoch": record.epoch,
        "generation": record.generation,
        "branches": record.branches,
        "tokens": record.tokens,
        "durable_tokens": record.durable_rows,
        "bytes": {"ram": record.ram_bytes, "store": record.stored_bytes},
        "last_used": record.last_used,
    }


def _node(node: str, address: str, has_device: bool, replica: Replica | None) -> dict[str, Any]:
    info = replica.info if replica else None
    status = replica.status if replica else None
    return {
        "id": node,
        "address": address,
        "replica": "none"
        if not has_device
        else ("ready" if replica and replica.healthy else "not ready"),
        "pid": info.pid if info else None,
        "raylet_pid": info.raylet_pid if info else None,
        "engine": info.engine if info else None,
        "device": info.device if info else None,
        "slots": info.slots if info else 0,
        "agents": status.n_agents if status else 0,
        "running": status.running if status else 0,
        "waiting": status.waiting if status else 0,
        "queue_s": status.queue_s if status else 0.0,
        "bytes": {
            "engine": info.kv_bytes if info else 0,
            "pool": status.pool_bytes if status else 0,
            "local": status.local.used_bytes if status and status.local else 0,
        },
        "local": asdict(status.local) if status and status.local else None,
        "rates": asdict(status.rates) if status else {},
        "faults": status.faults if status else {},
        "served": status.served if status else {},
    }
