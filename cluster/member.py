"""One replica as the pool knows it: what it last said, what placement reckons with, how often it
died, and whether it fits to the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.report import ReplicaInfo, ReplicaStatus
from cluster.errors import ClusterError
from cluster.loads import Load
from cluster.nodes import Node
from cluster.placement import Candidate, link_cost
from storage.fetch import Progress

LOOP_FAILURES, LOOP_S = 5, 600.0  # so many within so long: it is crash looping
_SHOWN = 3  # differences of a model that is refused


@dataclass(eq=False)
class Replica:
    """What the pool knows of one replica; `info` is None while it loads its model."""

    node: Node
    actor: Any
    info: ReplicaInfo | None = None
    status: ReplicaStatus | None = None
    healthy: bool = False
    seen: float = 0.0  # its clock at that report, less a margin
    ready_at: float | None = None
    fetching: Progress | None = None  # of a model that it lacks
    moved: float = 0.0  # the pool's clock when it started, or last told of that
    met: frozenset[str] = frozenset()  # the disks that it knows, by their nodes' Ray ids
    watcher: asyncio.Task[None] | None = None

    @property
    def incarnation(self) -> str:
        return self.info.incarnation if self.info is not None else ""


@dataclass
class Backoff:
    """Of one node: why its last replica died, and when the next one is tried."""

    failures: int = 0
    not_before: float = 0.0
    error: str = ""
    died: deque[float] = field(default_factory=lambda: deque(maxlen=LOOP_FAILURES))

    def looping(self, now: float) -> bool:
        """Whether short lives have followed one another."""
        return len(self.died) == LOOP_FAILURES and now - self.died[0] < LOOP_S


class Refused(ClusterError):
    """A replica that does not fit to the others."""


def check_fits(info: ReplicaInfo, ours: Mapping[str, str], first: ReplicaInfo | None) -> None:
    """A replica may join if its versions are `ours`, and its model that of one that is here.
    Raises Refused."""
    theirs = info.versions
    differ = [
        f"{name} {theirs.get(name, 'unknown')} there, {version} here"
        for name, version in ours.items()
        if theirs.get(name) != version
    ]
    if first is not None:
        model = info.key.mismatches(first.key)
        differ += [f"{line} (that of {first.node})" for line in model[:_SHOWN]]
        if first.codec != info.codec:
            differ.append(f"codec: {info.codec} != {first.codec}")
    if differ:
        raise Refused(f"refused: {'; '.join(differ)}")


def candidate(replica: Replica, *, warned: bool = False) -> Candidate | None:
    """What placement needs of a replica. `warned`: its node has reported pressure."""
    info, status = replica.info, replica.status
    if info is None or status is None:
        return None
    links = {
        name: link_cost(rate, info.row_bytes)
        for name, rate in status.links.items()
        if info.row_bytes
    }
    pressure = min(1.0, load(info, status).pressure)
    return Candidate(
        replica.node.id, status.queue_s, status.rates, pressure, 0, links, status.prefixes, warned
    )


def load(info: ReplicaInfo, status: ReplicaStatus) -> Load:
    cells = status.cells or max(1, info.slots * info.n_ctx)
    return Load(
        info.node, status.cells_used, cells, status.running, status.waiting, max(1, info.slots)
    )
