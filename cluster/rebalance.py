"""Turns leave a replica that stays busier than another: a few agents that speak, or whose turn
waits for a slot, live. Those that are idle go at their next turn, by placement.

Lives in the router. A difference has to last, every move is judged by new reports, and where moves
do not help the replica is left alone for a while, as every agent is that was moved. Agents whose
affinity is hard stay, and so do those that nobody has asked for since the router started.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from cluster.drain import Drains
from cluster.errors import MigrationFailed
from cluster.leaving import Lock
from cluster.loads import Load, Mobile, extremes, next_move
from cluster.member import Replica, load
from cluster.moves import Mover
from cluster.pool import ReplicaPool
from cluster.registry import Registry
from storage.card import AgentId

logger = logging.getLogger(__name__)
_EVERY_S = 1.0
_LASTS_S = 5.0  # a difference, before anybody moves
_MOVES = 2  # at most, one after the other, until it has to last anew
_TRIES = 4  # of moves, those that fail among them
_REST_S = 60.0  # of an agent that was moved, and of a replica whose moves did not help
_FRESH_TIMEOUT_S = 1.0
_PREFETCH_S = 10.0  # the agent speaks on meanwhile, and stays if that is not enough


class Rebalance:
    def __init__(
        self,
        pool: ReplicaPool,
        registry: Registry,
        drains: Drains,
        lock: Lock,
        mover: Mover,
        threshold: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`lock`: under which an agent is moved."""
        self._pool, self._registry, self._drains = pool, registry, drains
        self._lock, self._mover, self._threshold = lock, mover, threshold
        self._clock = clock
        self._uneven: tuple[str, float] | None = None  # the fullest replica, and since when
        self._rests: dict[str | AgentId, float] = {}  # nodes and agents, until when

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self.look()
            except Exception:
                logger.exception("rebalancing failed; it tries again")

    async def look(self) -> None:
        """Once: move a few agents if a difference has lasted."""
        now = self._clock()
        self._rests = {key: until for key, until in self._rests.items() if until > now}
        pair = extremes(self._loads(targets=False), self._loads(targets=True), self._threshold)
        if pair is None:
            self._uneven = None
            return
        full, free = pair
        if self._uneven is None or self._uneven[0] != full.node:
            self._uneven = (full.node, now)
        if now - self._uneven[1] < _LASTS_S:
            return
        self._uneven = None
        await self._even_out(full.node, free.node)

    async def _even_out(self, full: str, free: str) -> None:
        before = await self._fresh(full, free)
        loads, moved, tries = before, 0, 0
        while loads is not None and moved < _MOVES and tries < _TRIES:
            mobile = next_move(*loads, self._mobiles(full), self._threshold)
            if mobile is None:
                break
            moved += await self._moved(mobile, full, free)
            tries += 1
            loads = await self._fresh(full, free)
        if moved and before and loads and loads[0].pressure >= before[0].pressure:
            self._rests[full] = self._clock() + _REST_S

    def _loads(self, *, targets: bool) -> list[Load]:
        """Of replicas that agents may come to, or leave."""
        unfit = self._drains.warned if targets else self._rests.__contains__
        replicas = [r for r in self._drains.open() if not unfit(r.node.id)]
        return [found for replica in replicas if (found := _load(replica)) is not None]

    async def _fresh(self, full: str, free: str) -> tuple[Load, Load] | None:
        """Of both as they are now; None where one is not open any more."""
        able = {replica.node.id: replica for replica in self._drains.open()}
        if full not in able or free not in able:
            return None
        await self._pool.refresh_all([able[full], able[free]], _FRESH_TIMEOUT_S)
        loads = _load(able[full]), _load(able[free])
        return (loads[0], loads[1]) if loads[0] is not None and loads[1] is not None else None

    def _mobiles(self, node: str) -> list[Mobile]:
        """Those with turns under way; the last that began goes first: it waits, or has the least
        to bring."""
        now = self._clock()
        agents = [record.agent for record in self._registry.on(node)]
        return [
            Mobile(agent, len(untils), -max(untils))
            for agent in agents
            if agent not in self._rests and self._registry.may_move(agent, now)
            if (untils := self._registry.turns(agent, now))
        ]

    async def _moved(self, mobile: Mobile, full: str, free: str) -> bool:
        agent, lock = mobile.agent, self._lock(mobile.agent)
        self._rests[agent] = self._clock() + _REST_S
        if lock.locked():
            return False  # its turn is being placed
        async with lock:
            able = {replica.node.id: replica for replica in self._drains.open()}
            if self._registry.location(agent).node != full or not {full, free} <= able.keys():
                return False
            try:
                source, target = able[full], able[free]
                await self._mover.move(agent, source, target, "rebalance", _PREFETCH_S, whole=True)
            except MigrationFailed as error:
                logger.warning("agent %s stays on %s: %s", agent, full, error)
                return False
            return True


def _load(replica: Replica) -> Load | None:
    info, status = replica.info, replica.status
    return load(info, status) if info is not None and status is not None else None
