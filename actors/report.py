"""What a replica tells the cluster about itself: plain values, picklable."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.memory import Memory
from actors.rates import Rates
from storage.card import AgentId
from storage.spec import CompatibilityKey


@dataclass(frozen=True)
class ReplicaInfo:
    """Fixed for the life of a replica."""

    node: str
    incarnation: str
    pid: int
    raylet_pid: int
    engine: str
    device: str
    n_ctx: int
    slots: int
    codec: str
    key: CompatibilityKey
    kv_bytes: int  # allocated for the engine's cells


@dataclass(frozen=True)
class AgentReport:
    """One agent this replica owns."""

    agent: AgentId
    epoch: int
    generation: int
    branches: int
    tokens: int  # of the branch used last
    rows: int  # of them encoded
    in_ram: bool  # its next turn needs no file
    ram_bytes: int
    stored_bytes: int
    last_used: float  # unix seconds
    durable_rows: int = 0  # of `rows`, in the shared store


@dataclass(frozen=True)
class LocalStatus:
    """The node's own disk."""

    used_bytes: int
    lagging_bytes: int  # of them not in the shared store yet
    lagging_agents: int
    written_bytes: int  # by this process
    writes: bool  # False: full, or the day's budget is spent


@dataclass(frozen=True)
class ReplicaStatus:
    """As of now; `agents` lists those that changed since the caller's last status."""

    at: float
    running: int
    waiting: int
    idle: int
    queue_s: float
    rates: Rates
    pool_bytes: int
    cells_used: int
    n_agents: int
    agents: tuple[AgentReport, ...]
    local: LocalStatus | None = None
    faults: dict[str, int] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)


def local_status(memory: Memory) -> LocalStatus | None:
    local, replicator = memory.tiers.local, memory.replicator
    if local is None or replicator is None:
        return None
    return LocalStatus(
        used_bytes=local.used_bytes,
        lagging_bytes=local.pinned_bytes,
        lagging_agents=replicator.pending,
        written_bytes=local.written_bytes,
        writes=local.writes,
    )
