"""An agent's way from one replica of the pool to another: from where its rows come, when a move is
given up, and what the router reports of them all.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

from cluster.disks import RemoteDisk
from cluster.errors import MigrationFailed
from cluster.member import Replica, candidate
from cluster.migration import Migration, migrate
from cluster.placement import over_peer
from cluster.pool import ReplicaPool
from cluster.registry import Registry
from storage.card import AgentId

logger = logging.getLogger(__name__)
Reason = Literal["operator", "placement", "drain", "rebalance"]
BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Moves:
    """Migrations, counted by reason, and how long they froze."""

    def __init__(self) -> None:
        self.total = 0
        self._by_reason: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        self._freeze_s = 0.0

    def done(self, reason: Reason, migration: Migration) -> None:
        self.total += 1
        self._by_reason[reason] += 1
        self._freeze_s += migration.freeze_s
        self._buckets[sum(migration.freeze_s > bound for bound in BUCKETS_S)] += 1

    def failed(self, reason: Reason) -> None:
        self._failed[reason] += 1

    def to_json(self) -> dict[str, Any]:
        """`freeze_buckets`: (bound in seconds, migrations up to it), the last one without bound."""
        bounds, up_to, buckets = [*map(str, BUCKETS_S), "+Inf"], 0, []
        for bound, count in zip(bounds, self._buckets, strict=True):
            up_to += count
            buckets.append((bound, up_to))
        return {
            "by_reason": dict(self._by_reason),
            "failed": dict(self._failed),
            "freeze_s": self._freeze_s,
            "freeze_buckets": buckets,
        }


class Mover:
    """Moves agents between the pool's replicas, and tells the registry."""

    def __init__(self, pool: ReplicaPool, registry: Registry) -> None:
        self._pool, self._registry = pool, registry
        self.moves = Moves()

    async def move(
        self,
        agent: AgentId,
        source: Replica | None,
        target: Replica,
        reason: Reason,
        prefetch_s: float,
        *,
        whole: bool = False,
    ) -> Migration:
        """`source` None: from the store; see migration.migrate. Raises MigrationFailed."""
        pair = (source.node.id, source.actor) if source is not None else None
        try:
            to, disk = (target.node.id, target.actor), self._disk(agent, source, target)
            moving = migrate(agent, pair, to, prefetch_s=prefetch_s, disk=disk, whole=whole)
            done = await self._pool.unless_lost(moving, *filter(None, (source, target)))
        except MigrationFailed:
            self.moves.failed(reason)
            raise
        self._registry.assign(agent, target.node.id)
        self.moves.done(reason, done)
        logger.info("agent %s moved: %s", agent, done)
        return done

    def _disk(self, agent: AgentId, source: Replica | None, target: Replica) -> RemoteDisk | None:
        """The source's, where the agent's rows are to come from there: both have a disk that is
        written to, and placement would not rather go over the store."""
        told = candidate(target)
        if source is None or told is None or not (_writes(source) and _writes(target)):
            return None
        location = replace(self._registry.location(agent), node=source.node.id)
        return self._pool.disks.get(source.node.id) if over_peer(told.links, location) else None


def _writes(replica: Replica) -> bool:
    """To a disk of its node's."""
    local = replica.status.local if replica.status is not None else None
    return local is not None and local.writes
