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
from typing import Any

from actors.errors import AgentMoved
from actors.turn import Affinity
from cluster.able import Able
from cluster.config import ClusterConfig
from cluster.copies import copies_json, copies_of
from cluster.decisions import Choice, Decision, Outcome, to_json
from cluster.dispatch import Ask, Dispatch
from cluster.drain import Drains, Level
from cluster.errors import AgentBusy, MigrationFailed, NoReplica, UnknownAgent, UnknownNode
from cluster.member import Replica, candidate
from cluster.migration import Migration
from cluster.moves import Mover
from cluster.pool import ReplicaPool
from cluster.rebalance import Rebalance
from cluster.recall import Recall
from cluster.registry import AgentRecord
from cluster.remote import ReplicaLost, call
from cluster.views import agent_json, nodes_json
from cluster.weights import share
from storage.card import AgentId
from storage.fetch import Progress
from storage.spec import CompatibilityKey

logger = logging.getLogger(__name__)
ROUTER_NAME = "router"
_CALL_TIMEOUT_S = 15.0
_FRESH_TIMEOUT_S = 0.25  # of reports asked for before an agent moves
_STAY_S = 60.0  # after an operator's migration
_WAITED_S, _UNNOTICED_S = 10.0, 30.0  # to copy ahead: while a turn waits; while the agent speaks


class PlacementRouter:
    """Hosted by Ray as a named, detached, asynchronous actor."""

    def __init__(self, config: ClusterConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self._config, self._turn_s = config, config.http.request_timeout_s
        self._dispatch = Dispatch(config.placement)
        self._registry = self._dispatch.registry
        self._pool = ReplicaPool(config.replica, self._on_status, self._dispatch.lost)
        self._pool.weights = share(config.replica)
        self._locks: weakref.WeakValueDictionary[AgentId, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._mover = Mover(self._pool, self._registry)
        self._drains = Drains(self._pool, self._dispatch, self._lock, self._evacuate)
        self._rebalance = Rebalance(
            self._pool, self._registry, self._drains, self._lock, self._mover,
            config.placement.rebalance,
        )  # fmt: skip
        self._able = Able(self._pool, self._dispatch, self._drains)
        self._key: CompatibilityKey | None = None
        self._recall = Recall(config.replica, self._registry.found_in_store)
        self._drains.go_on()
        self._tasks = [asyncio.create_task(self._pool.run())]
        if config.placement.rebalance:
            self._tasks.append(asyncio.create_task(self._rebalance.run()))
        self._copies = copies_of(config.replica, lambda: self._pool.disks)
        if self._copies is not None:
            self._tasks.append(asyncio.create_task(self._copies.run()))

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
        prefix: str = "",
        affinity: Affinity = "soft",
    ) -> Decision:
        """Decide, and bring the agent there if its owner lives elsewhere. Raises NoReplica when
        none is ready within a deadline, or with hard affinity, a living owner is not.

        `avoid`: incarnations that failed this turn; used only if nothing else is ready. `prefix`:
        digest of the system prompt.
        """
        ask = Ask(agent, n_chars, reply_tokens, turn_id, prefix, affinity, persist)
        async with self._lock(agent):
            replicas = await self._able.wait(avoid, agent if affinity == "hard" else None)
            owner = self._registry.location(agent).node
            if owner is not None and owner not in self._pool.replicas:
                self._dispatch.lost(owner)
            choice = await self._decide(ask, replicas, avoid)
            owner, target = choice.location.node, choice.node
            source = replicas.get(owner or "") or self._drains.source(owner)
            if persist and source is not None and source.node.id != target:
                prefetch_s = _WAITED_S if choice.placement.restore_tokens is None else 0.0
                try:
                    await self._mover.move(agent, source, replicas[target], "placement", prefetch_s)
                except MigrationFailed as error:
                    choice.move_failed = str(error)
                    if source.healthy:  # else whoever is chosen claims the agent
                        logger.warning("agent %s stays on %s: %s", agent, source.node.id, error)
                        choice.node = source.node.id
                        replicas[source.node.id] = source
            self._dispatch.began(ask, choice, time.monotonic() + self._turn_s)
            return _decision(choice, replicas[choice.node])

    async def _decide(
        self, ask: Ask, replicas: dict[str, Replica], avoid: frozenset[str]
    ) -> Choice:
        """By the reports there are, which may be half a second old; before an agent leaves its
        owner, by new ones: the turn that kept the owner busy may have ended."""
        stays = self._able.stays(ask.agent, replicas, avoid, time.monotonic())
        choice = self._dispatch.decide(ask, replicas, stays=stays)
        owner = replicas.get(choice.location.node or "")
        if ask.persist and owner is not None and owner.node.id != choice.node:
            await self._pool.refresh_all([owner, replicas[choice.node]], _FRESH_TIMEOUT_S)
            choice = self._dispatch.decide(ask, replicas, stays=stays)
        return choice

    def explain(self, ask: Ask) -> dict[str, Any]:
        """What `place` would decide, with every replica's estimate. Changes nothing, waits for
        nobody. Raises NoReplica."""
        replicas = self._able.now(frozenset(), ask.agent if ask.affinity == "hard" else None)
        if not replicas:
            raise NoReplica("no replica is ready")
        stays = self._able.stays(ask.agent, replicas, frozenset(), time.monotonic())
        choice = self._dispatch.compare(ask, replicas, stays=stays)
        return to_json(choice, self._config.placement)

    def decisions(self, tenant: str, limit: int) -> list[dict[str, Any]]:
        """A tenant's latest, with their outcomes as far as they are known."""
        latest = self._dispatch.log.latest(tenant, limit)
        return [to_json(choice, self._config.placement) for choice in latest]

    def ended(
        self, agent: AgentId, turn_id: str, n_chars: int | None, outcome: Outcome | None = None
    ) -> None:
        """A turn is over; n_chars: of its messages and its reply, None if it was not answered."""
        self._dispatch.ended(agent, turn_id, n_chars, outcome)

    def suspect(self, incarnation: str) -> None:
        """An ingress lost this replica in the middle of a turn."""
        self._pool.suspect(incarnation)

    # ---- agents

    async def migrate(self, agent: AgentId, target: str | None) -> Migration:
        """`target` None: placement chooses another node. Raises UnknownAgent, UnknownNode,
        NoReplica, MigrationFailed."""
        async with self._lock(agent):
            record = await self._known(agent)
            replica = self._able.target(agent, target)
            source = self._pool.replicas.get(record.node) if record.node else None
            if source is replica:
                done = Migration(record.node, replica.node.id, record.epoch, 0.0)
            else:
                done = await self._mover.move(agent, source, replica, "operator", _UNNOTICED_S)
            self._registry.settled(agent, time.monotonic() + _STAY_S)
            return done

    async def _evacuate(self, agent: AgentId, source: Replica, target: Replica) -> Migration:
        return await self._mover.move(agent, source, target, "drain", _UNNOTICED_S)

    async def delete(self, agent: AgentId) -> None:
        """Raises UnknownAgent, AgentBusy, NoReplica."""
        async with self._lock(agent):
            record = await self._known(agent)
            replicas = await self._able.wait(frozenset())
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
        return agent_json(await self._known(agent))

    async def agents(self, tenant: str) -> list[dict[str, Any]]:
        await self._up_to_date()
        return [agent_json(record) for record in self._registry.all(tenant)]

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
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                await self._recall.tried.wait()
        except TimeoutError:
            logger.warning("answering before the store has been read")

    # ---- reports

    async def cluster(self) -> dict[str, Any]:
        """Every node of the cluster, and what its replica says."""
        await self._pool.refresh_all()
        return {
            "model": self._config.replica.model,
            "store": self._config.replica.store,
            "codec": self._config.replica.codec,
            "agents": len(self._registry),
            "migrations": self._mover.moves.total,
            "moves": self._mover.moves.to_json(),
            "replica_losses": self._pool.restarts,
            "copies": copies_json(self._copies),
            "nodes": nodes_json(self._pool, self._drains),
        }

    async def ready(self) -> dict[str, Any]:
        """Whether a turn could run, and why not; and which nodes serve it without the store."""
        healthy = self._pool.healthy()
        cut_off = [r.node.id for r in healthy if r.status and not r.status.store_answers]
        return {
            "ready": bool(healthy),
            "replicas": len(healthy),
            "without_store": sorted(cut_off),
            "errors": self._pool.errors(),
        }

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

    # ---- nodes: see cluster.drain

    def drain(self, node: str) -> dict[str, Any]:
        return self._drains.drain(node)

    def undrain(self, node: str) -> dict[str, Any]:
        return self._drains.undrain(node)

    def drain_progress(self, node: str) -> dict[str, Any]:
        return self._drains.progress(node)

    def pressed(self, node: str, level: Level) -> dict[str, Any]:
        return self._drains.pressed(node, level)

    def fetching(self, node: str, progress: Progress | None) -> None:
        """A node that lacks the model tells how far it is."""
        self._pool.fetching(node, progress)

    def _on_status(self, replica: Replica) -> None:
        assert replica.status is not None
        assert replica.info is not None
        self._registry.reported(replica.node.id, replica.status.agents)
        told = candidate(replica, warned=self._drains.warned(replica.node.id))
        if told is not None:
            self._dispatch.reported(told)
        self._drains.relieve()
        if self._key != replica.info.key:
            self._key = replica.info.key
            self._tasks.append(asyncio.create_task(self._recall.run(self._key)))

    def _lock(self, agent: AgentId) -> asyncio.Lock:
        return self._locks.setdefault(agent, asyncio.Lock())


def _decision(choice: Choice, replica: Replica) -> Decision:
    placement = choice.placement
    limit = placement.restore_tokens if choice.node == placement.node else None
    return Decision(choice.node, replica.incarnation, replica.actor, placement, limit)
