"""Which replicas can take an agent's turn, and waiting for one that can."""

from __future__ import annotations

import asyncio

from cluster.drain import Drains
from cluster.errors import NoReplica
from cluster.member import Replica
from cluster.pool import ReplicaPool
from cluster.registry import Registry
from storage.card import AgentId

_PLACE_TIMEOUT_S = 30.0  # to wait for a replica, when none is ready


class Able:
    """`avoid`: incarnations that failed this turn, taken only where nothing else is ready. `bound`:
    an agent that is for its owner alone, if that lives."""

    def __init__(self, pool: ReplicaPool, registry: Registry, drains: Drains) -> None:
        self._pool, self._registry, self._drains = pool, registry, drains

    def now(self, avoid: frozenset[str], bound: AgentId | None) -> dict[str, Replica]:
        """By node; empty when none is ready."""
        owner = self._registry.location(bound).node if bound is not None else None
        healthy = self._drains.candidates()
        leaves = self._drains.source(owner) is not None
        if owner is not None and owner in self._pool.replicas and not leaves:
            return {owner: healthy[owner]} if owner in healthy else {}
        fresh = {n: r for n, r in healthy.items() if r.incarnation not in avoid}
        return fresh or healthy

    async def wait(self, avoid: frozenset[str], bound: AgentId | None = None) -> dict[str, Replica]:
        """As `now`, waiting for one if need be. Raises NoReplica."""
        deadline = asyncio.get_running_loop().time() + _PLACE_TIMEOUT_S
        while True:
            found = self.now(avoid, bound)
            if found:
                return found
            if asyncio.get_running_loop().time() > deadline:
                reasons = "; ".join(f"{n}: {e}" for n, e in self._pool.errors().items())
                raise NoReplica(f"no replica is ready{f' ({reasons})' if reasons else ''}")
            await asyncio.sleep(0.05)

    def stays(
        self, agent: AgentId, replicas: dict[str, Replica], avoid: frozenset[str], now: float
    ) -> bool:
        """Whether the agent is to stay for a while where an operator has put it; `now`: as of
        time.monotonic."""
        owner = replicas.get(self._registry.location(agent).node or "")
        able = owner is not None and owner.incarnation not in avoid
        return able and self._registry.stays(agent, now)
