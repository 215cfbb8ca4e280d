"""How the agents of a node that is emptied leave it: each to the replica that is cheapest for it,
in a few attempts. Called by cluster.drain.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.dispatch import Dispatch
from cluster.errors import MigrationFailed, NoReplica
from cluster.member import Replica
from cluster.pool import ReplicaPool
from cluster.remote import ReplicaLost
from storage.card import AgentId

logger = logging.getLogger(__name__)
POLL_S = 0.1
_ATTEMPTS = 3  # to move one agent

Lock = Callable[[AgentId], asyncio.Lock]
Move = Callable[[AgentId, Replica, Replica], Coroutine[Any, Any, Any]]


@dataclass
class Drain:
    """What became of a node's agents. `release`: its replica is closed in the end."""

    node: str
    release: bool
    state: Literal["draining", "drained", "stuck"] = "draining"
    moved: int = 0
    left: int = 0  # agents still there
    running: int = 0  # turns still there
    failed: dict[AgentId, str] = field(default_factory=dict)
    error: str = ""
    task: asyncio.Task[None] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "state": self.state,
            "release": self.release,
            "moved": self.moved,
            "left": self.left,
            "running": self.running,
            "failed": [{"agent": str(a), "error": e} for a, e in self.failed.items()],
            "error": self.error or None,
        }


class Leaving:
    def __init__(
        self,
        pool: ReplicaPool,
        dispatch: Dispatch,
        lock: Lock,
        move: Move,
        open_: Callable[[], list[Replica]],
    ) -> None:
        """`lock`: under which an agent is moved; `move` may raise MigrationFailed; `open_`: the
        replicas that may take agents."""
        self._pool, self._dispatch, self._lock, self._move = pool, dispatch, lock, move
        self._open = open_

    def agents(self, node: str) -> list[AgentId]:
        return [record.agent for record in self._dispatch.registry.on(node)]

    async def leave(self, drain: Drain, agent: AgentId) -> None:
        error: Exception | None = None
        for attempt in range(_ATTEMPTS):
            source = self._pool.replicas.get(drain.node)
            if source is None or not source.healthy:
                return  # it is dead or silent: whoever takes its turns claims its agents
            try:
                moved = await self._bring_away(agent, source)
            except (MigrationFailed, NoReplica, ReplicaLost) as failure:
                logger.warning("agent %s cannot leave %s: %s", agent, drain.node, failure)
                error = failure
                await asyncio.sleep(POLL_S * 2**attempt)
            else:
                drain.moved += moved
                drain.left -= 1
                return
        drain.failed[agent] = str(error)

    async def _bring_away(self, agent: AgentId, source: Replica) -> bool:
        """False when it has left already."""
        async with self._lock(agent):
            record = self._dispatch.registry.get(agent)
            if record is None or record.node != source.node.id:
                return False
            await self._move(agent, source, self._target(agent))
            return True

    def _target(self, agent: AgentId) -> Replica:
        """Raises NoReplica."""
        able = {replica.node.id: replica for replica in self._open()}
        if not able:
            raise NoReplica("no other node is ready")
        return able[self._dispatch.cheapest(agent, able)]
