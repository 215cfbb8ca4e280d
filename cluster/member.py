"""One replica as the pool knows it: what it last said, what placement reckons with, how often it
died, and whether it fits to the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.report import ReplicaInfo, ReplicaStatus
from cluster.errors import ClusterError
from cluster.loads import Load
from cluster.nodes import Node
from cluster.placement import Candidate, link_cost
from storage.fetch import Progress

LOOP_FAILURES, LOOP_S = 5, 600.0  # so many within so long: it is crash looping
_MAX_BACKOFF_S = 30.0
_REFUSED_S = 600.0  # until a replica that does not fit is tried again
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
    refused: str = ""  # Ray's id of the node, whose last replica did not fit to the others
    by: str = ""  # the incarnation whose model it did not have; none where its versions were wrong

    def waits(self, node: Node, now: float, here: Container[str]) -> bool:
        """A node that was refused is tried at once when it has come back as another one, or when
        who refused it is not `here` any more."""
        anew = self.refused not in ("", node.ray_id)
        gone = self.refused and self.by and self.by not in here
        return now < self.not_before and not anew and not gone

    def failed(self, now: float, reason: str, *, young: bool) -> float:
        """A replica is gone, `young`: before it had served for long. Seconds until the next."""
        self.failures += 1
        if young:
            self.died.append(now)
        delay: float = min(_MAX_BACKOFF_S, 0.25 * 2 ** min(16, self.failures))
        if self.looping(now):
            delay = _MAX_BACKOFF_S
        self.not_before, self.error, self.refused = now + delay, reason, ""
        return delay

    def does_not_fit(self, now: float, refusal: Refused, ray_id: str) -> float:
        """A replica was refused; that it would load its model again changes nothing. Seconds until
        the next."""
        self.not_before, self.error, self.refused = now + _REFUSED_S, str(refusal), ray_id
        self.by = refusal.by
        return _REFUSED_S

    def told(self, now: float) -> str:
        """The error, as it is shown."""
        if self.refused or not self.looping(now):
            return self.error
        return f"crash looping, {LOOP_FAILURES} times in {LOOP_S / 60:g} min: {self.error}"

    def looping(self, now: float) -> bool:
        """Whether short lives have followed one another."""
        return len(self.died) == LOOP_FAILURES and now - self.died[0] < LOOP_S


class Refused(ClusterError):
    """A replica that does not fit to the others; `by`: see Backoff."""

    def __init__(self, message: str, by: str = "") -> None:
        super().__init__(message, by)
        self.message, self.by = message, by

    def __str__(self) -> str:
        return self.message


def check_fits(info: ReplicaInfo, ours: Mapping[str, str], first: ReplicaInfo | None) -> None:
    """A replica may join if its versions are `ours`, and its model that of one that is here.
    Raises Refused."""
    theirs = info.versions
    differ = [
        f"{name} {theirs.get(name, 'unknown')} there, {version} here"
        for name, version in ours.items()
        if theirs.get(name) != version
    ]
    by = first.incarnation if first is not None and not differ else ""
    if first is not None:
        model = info.key.mismatches(first.key)
        differ += [f"{line} (that of {first.node})" for line in model[:_SHOWN]]
        if first.codec != info.codec:
            differ.append(f"codec: {info.codec} != {first.codec}")
    if differ:
        raise Refused(f"refused: {'; '.join(differ)}", by)


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
    cells = status.cells or max(1, info.slots * info.n_ctx)
    pressure = min(1.0, max(status.cells_used / cells, load(info, status).pressure))
    return Candidate(
        replica.node.id, status.queue_s, status.rates, pressure, 0, links, status.prefixes, warned
    )


def load(info: ReplicaInfo, status: ReplicaStatus) -> Load:
    return Load(info.node, status.running, status.waiting, max(1, info.slots))
