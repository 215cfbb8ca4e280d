"""Emptying a node while it serves: every agent moves to another replica, live, then it is let go.

    draining -> drained      no new turns; agents leave, a few at a time; its replica is closed
             -> stuck        some agent cannot leave: nothing is closed, nobody new comes

Under critical pressure (battery, memory) a node is emptied likewise, but its replica stays, and
comes back into use when the pressure falls. Lives in the router; a note of it outlives the router,
so that the next one goes on. Knows replicas by the pool, decisions by dispatch.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

from cluster import notes
from cluster.dispatch import Dispatch
from cluster.errors import LastNode, NoReplica, UnknownNode
from cluster.leaving import POLL_S, Drain, Leaving, Lock, Move
from cluster.member import Replica
from cluster.pool import ReplicaPool
from storage.card import AgentId

logger = logging.getLogger(__name__)
Level = Literal["none", "warn", "critical"]
PARALLEL = 4  # agents that leave a node at a time
_DEADLINE_S = 900.0  # longer than a turn may take
_FOUND_S = 60.0  # until a new router has found a node's replica


class Drains:
    """All nodes that are being emptied or have been, and the pressure that nodes report."""

    def __init__(
        self,
        pool: ReplicaPool,
        dispatch: Dispatch,
        lock: Lock,
        move: Move,
        deadline_s: float = _DEADLINE_S,
    ) -> None:
        """`lock`: under which an agent is moved; `move` may raise MigrationFailed."""
        self._pool, self._deadline_s = pool, deadline_s
        self._leaving = Leaving(pool, dispatch, lock, move, self.open)
        self._drains: dict[str, Drain] = {}
        self._pressure: dict[str, Level] = {}
        self._waits: set[str] = set()  # under critical pressure, and nobody could take their agents

    def go_on(self) -> None:
        """With what the router before was at, as it noted. A node that was empty stays held; one
        that was not is emptied, once its replica is found."""
        note = notes.read()
        self._pressure, self._waits = note.get("pressure", {}), set(note.get("waits", ()))
        for node, state, release in note.get("drains", ()):
            drain = self._drains[node] = Drain(node, release)
            if state == "drained":
                drain.state = state
                if release:
                    self._pool.hold(node)
            else:
                drain.task = asyncio.create_task(self._found(drain))

    def _note(self) -> None:
        drains = [(d.node, d.state, d.release) for d in self._drains.values()]
        notes.write({"drains": drains, "pressure": self._pressure, "waits": sorted(self._waits)})

    # ---- for placement

    def candidates(self) -> dict[str, Replica]:
        """Healthy replicas that may take turns, by node; where there is no other, those that are
        being emptied."""
        return {r.node.id: r for r in self.open() or self._pool.healthy()}

    def open(self) -> list[Replica]:
        """Healthy replicas that are not being emptied."""
        return [r for r in self._pool.healthy() if r.node.id not in self._drains]

    def source(self, node: str | None) -> Replica | None:
        """A replica that agents are to leave, if it can hand them over."""
        replica = self._pool.replicas.get(node) if node is not None else None
        return replica if node in self._drains and replica and replica.healthy else None

    def check_open(self, node: str) -> None:
        """Raises NoReplica for a node that is being emptied."""
        if node in self._drains:
            raise NoReplica(f"{node} is {self._drains[node].state}: it takes no agents")

    def warned(self, node: str) -> bool:
        """Whether a node has reported pressure."""
        return self._pressure.get(node, "none") != "none"

    # ---- for operators

    def drain(self, node: str, *, release: bool = True) -> dict[str, Any]:
        """Begin, or try again the agents that could not leave; the state so far. Raises
        UnknownNode, LastNode."""
        self._device(node)
        known = self._drains.get(node)
        if known is not None and known.state != "stuck" and (known.release or not release):
            return known.to_json()
        if not self._relieved(node):
            raise LastNode(_last(node))
        self._cancel(known)
        drain = self._drains[node] = Drain(node, release)
        if release:
            self._pool.hold(node)
        self._note()
        drain.task = asyncio.create_task(self._run(drain))
        return drain.to_json()

    def undrain(self, node: str) -> dict[str, Any]:
        """Back into use: whoever has not left stays, a closed replica is started again. Raises
        UnknownNode."""
        self._device(node)
        self._cancel(self._drains.pop(node, None))
        self._waits.discard(node)
        self._pool.rejoin(node)
        self._note()
        return {"node": node, "state": "open"}

    def progress(self, node: str) -> dict[str, Any]:
        """Raises UnknownNode."""
        self._device(node)
        drain = self._drains.get(node)
        if drain is not None:
            return drain.to_json()
        waits = {"error": _last(node)} if node in self._waits else {}
        return {"node": node, "state": "open"} | waits

    def pressed(self, node: str, level: Level) -> dict[str, Any]:
        """A node says how it is doing. Where no other could take its agents, a critical one is
        emptied when one can. Raises UnknownNode."""
        self._device(node)
        self._pressure[node] = level
        drain = self._drains.get(node)
        if level == "critical":
            self._waits.add(node)
            self.relieve()
        elif drain is not None and not drain.release:  # an operator's drain goes on
            self.undrain(node)
        else:
            self._waits.discard(node)
        self._note()
        return self.progress(node) | {"pressure": level}

    def relieve(self) -> None:
        """Empty the nodes under critical pressure that another could relieve by now."""
        for node in sorted(self._waits):
            if node in self._pool.replicas and self._relieved(node):
                self.drain(node, release=False)
                self._waits.discard(node)
                self._note()

    def _relieved(self, node: str) -> bool:
        """Whether another could take its agents; not one that itself waits for that."""
        return any(replica.node.id not in {node, *self._waits} for replica in self.open())

    def report(self, node: str) -> dict[str, Any]:
        """For the cluster's report."""
        drain = self._drains.get(node)
        state = {"replica": drain.state} if drain is not None else {}
        level = self._pressure.get(node, "none")
        return state | {"pressure": level, "drain": drain.to_json() if drain else None}

    def _device(self, node: str) -> None:
        devices = sorted({n.id for n in self._pool.nodes.values() if n.has_device})
        if node not in {*devices, *self._pool.replicas, *self._drains}:
            known = ", ".join(devices or sorted(self._pool.replicas)) or "none"
            raise UnknownNode(f"no node {node!r} with a device; there are: {known}")

    def _cancel(self, drain: Drain | None) -> None:
        if drain is not None and drain.task is not None:
            drain.task.cancel()

    # ---- the work

    async def _found(self, drain: Drain) -> None:
        """Wait for the replica of a node whose drain a router before has begun."""
        deadline = asyncio.get_running_loop().time() + _FOUND_S
        while asyncio.get_running_loop().time() < deadline:
            replica = self._pool.replicas.get(drain.node)
            if replica is not None and replica.healthy:
                break
            await asyncio.sleep(POLL_S)
        if self._drains.get(drain.node) is drain:
            if drain.release:
                self._pool.hold(drain.node)
            await self._run(drain)

    async def _run(self, drain: Drain) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._empty(drain)
            if drain.failed:
                drain.state, drain.error = "stuck", f"{len(drain.failed)} agents cannot leave"
                return
            self._check_wanted(drain)
            if drain.release:
                await self._pool.release(drain.node)
            drain.state = "drained"
        except TimeoutError:
            drain.state, drain.error = "stuck", f"not empty after {self._deadline_s:g} s"
        except Exception as error:
            logger.exception("draining %s failed", drain.node)
            drain.state, drain.error = "stuck", f"{type(error).__name__}: {error}"
        finally:
            if self._drains.get(drain.node) is drain:
                self._note()

    async def _empty(self, drain: Drain) -> None:
        """Until the node has neither agents, but those that cannot leave, nor turns."""
        free = asyncio.Semaphore(PARALLEL)

        async def leave(agent: AgentId) -> None:
            async with free:
                await self._leaving.leave(drain, agent)

        while (replica := self._pool.replicas.get(drain.node)) is not None:
            self._check_wanted(drain)
            if replica.healthy:
                await asyncio.gather(self._pool.refresh(replica), return_exceptions=True)
            agents = [a for a in self._leaving.agents(drain.node) if a not in drain.failed]
            drain.left = len(agents)
            status = replica.status
            drain.running = status.running + status.waiting if status is not None else 0
            if agents and replica.healthy:
                await asyncio.gather(*(leave(agent) for agent in agents))
            elif not agents and not drain.running:
                return
            else:
                await asyncio.sleep(POLL_S)
        drain.left = drain.running = 0

    def _check_wanted(self, drain: Drain) -> None:
        """Raises CancelledError for a drain that was taken back: where a call ends just when its
        task is cancelled, asyncio.wait_for forgets the cancellation (Python 3.11)."""
        if self._drains.get(drain.node) is not drain:
            raise asyncio.CancelledError


def _last(node: str) -> str:
    return f"no other node could take the agents of {node}"
