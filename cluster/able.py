"""Which replicas can take an agent's turn, or the agent, and waiting for one that can."""

from __future__ import annotations

import asyncio

from cluster.dispatch import Dispatch
from cluster.drain import Drains
from cluster.errors import NoReplica, UnknownNode
from cluster.member import Replica
from cluster.pool import ReplicaPool
from storage.card import AgentId

_PLACE_TIMEOUT_S = 30.0  # to wait for a replica, when none is ready


class Able:
    """`avoid`: incarnations that failed this turn, taken only where nothing else is ready. `bound`:
    an agent that is for its owner alone, if that lives."""

    def __init__(self, pool: ReplicaPool, dispatch: Dispatch, drains: Drains) -> None:
        self._pool, self._dispatch, self._drains = pool, dispatch, drains
        self._registry = dispatch.registry

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

    def target(self, agent: AgentId, node: str | None) -> Replica:
        """Where an operator moves the agent: to that node, or to the cheapest one but its owner.
        Raises UnknownNode, NoReplica."""
        if node is None:
            owner = self._registry.location(agent).node
            others = {r.node.id: r for r in self._drains.open() if r.node.id != owner}
            if not others:
                raise NoReplica(f"no other node could take agent {agent}")
            return others[self._dispatch.cheapest(agent, others)]
        replica = self._pool.replicas.get(node)
        if replica is None:
            known = ", ".join(sorted(self._pool.replicas)) or "none"
            raise UnknownNode(f"no node {node!r} with a replica; there are: {known}")
        if not replica.healthy:
            raise NoReplica(f"the replica on {node} is not ready")
        self._drains.check_open(node)
        return replica
