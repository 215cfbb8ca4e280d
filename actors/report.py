"""What a replica tells the cluster about itself: plain values, picklable."""

from __future__ import annotations

import hashlib
import platform
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import takewhile
from typing import TYPE_CHECKING

from actors.branches import AgentMemory, durable_rows
from actors.memory import Memory
from actors.rates import Rates
from actors.turn import Message, StreamItem, ToolUse, TurnRequest, TurnStarted
from storage.card import AgentId
from storage.links import LinkRate
from storage.spec import CompatibilityKey

if TYPE_CHECKING:
    from actors.loop import ReplicaLoop


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
    kv_bytes: int  # allocated for the engine's cells, and the draft model's
    row_bytes: int = 0  # of one token, encoded
    versions: Mapping[str, str] = field(default_factory=dict)  # of what must be alike everywhere


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
    links: Mapping[str, LinkRate] = field(default_factory=dict)  # "store", "disk", "peer"
    prefixes: Mapping[str, int] = field(default_factory=dict)  # digest -> tokens in RAM
    store_answers: bool = True  # False while the shared store is known not to
    lagging_agents: int = 0  # of which the shared store lacks something
    lagging_bytes: int = 0
    cells: int = 0  # in all, some of them used


def versions() -> dict[str, str]:
    """Of Python, Ray and kvferry in this process; "none" for what is not installed."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("ray", "kvferry"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def local_status(memory: Memory) -> LocalStatus | None:
    local, replicator = memory.tiers.local, memory.commits.replicator
    if local is None or replicator is None:
        return None
    return LocalStatus(
        used_bytes=local.used_bytes,
        lagging_bytes=local.pinned_bytes,
        lagging_agents=replicator.pending,
        written_bytes=local.written_bytes,
        writes=local.writes,
    )


def status_of(
    loop: ReplicaLoop,
    at: float,
    since: float,
    known: Sequence[AgentMemory],
    local: LocalStatus | None,
    prefixes: Mapping[str, int],
) -> ReplicaStatus:
    """`known`: all its agents."""
    memory = loop.memory
    agents, size = memory.commits.lag()
    return ReplicaStatus(
        at=at,
        running=len(loop.scheduler.running),
        waiting=len(loop.scheduler.waiting),
        idle=loop.residency.n_idle,
        queue_s=loop.scheduler.queue_seconds(loop.engine.n_seq_max),
        rates=loop.rates,
        pool_bytes=memory.tiers.pool.used_bytes,
        local=local,
        cells_used=loop.residency.cells_used,
        n_agents=len(known),
        agents=tuple(_agent_report(loop, m) for m in known if m.changed >= since),
        faults=dict(memory.faults),
        served=dict(loop.served),
        links=memory.tiers.link_rates(),
        prefixes=prefixes,
        store_answers=not memory.outage.lasts,
        cells=loop.engine.n_cells,
        lagging_agents=local.lagging_agents if local is not None else agents,
        lagging_bytes=local.lagging_bytes if local is not None else size,
    )


def _agent_report(loop: ReplicaLoop, memory: AgentMemory) -> AgentReport:
    assert memory.card is not None
    branches, rows = list(memory.branches), loop.memory.rows
    latest = max(branches, key=lambda b: b.last_used, default=None)
    resident = latest is not None and loop.residency.find(latest) is not None
    return AgentReport(
        agent=memory.agent,
        epoch=memory.card.epoch,
        generation=memory.card.generation,
        branches=len(branches),
        tokens=len(latest.tokens) if latest else 0,
        rows=latest.rows if latest else 0,
        durable_rows=durable_rows(latest) if latest else 0,
        in_ram=resident or (latest is not None and rows.in_ram(latest)),
        ram_bytes=rows.ram_bytes(branches),
        stored_bytes=memory.card.bytes_stored,
        last_used=memory.last_used,
    )


def prefix_digest(tenant: str, messages: Sequence[Message], tools: ToolUse | None = None) -> str:
    """Names what agents of a tenant may share: system prompt and tools. Needs no tokenizer; ""
    where there are none."""
    system = [*_system(messages), *_shown(tools)]
    if not system:
        return ""
    digest = hashlib.blake2b(person=b"kvferry.prefix", digest_size=16)
    for text in (tenant, *system):
        raw = text.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "big") + raw)
    return digest.hexdigest()


def _shown(tools: ToolUse | None) -> list[str]:
    """What a prompt says of its tools."""
    each = tools.tools if tools is not None else ()
    return [text for tool in each for text in (tool.name, tool.description or "", tool.parameters)]


class HeldPrefixes:
    """System prompts of the turns that ran here last, and about how many whole blocks each fills.
    Used by the replica's event loop only."""

    def __init__(self, block_tokens: int, most: int = 256) -> None:
        self._block, self._most = block_tokens, most
        self._tokens: OrderedDict[str, int] = OrderedDict()  # the latest used last

    def note(self, request: TurnRequest, items: Iterable[StreamItem]) -> None:
        """Items of a turn: its start says how long the prompt is, in tokens."""
        started = next((item for item in items if isinstance(item, TurnStarted)), None)
        if started is None or not request.persist:
            return
        digest = prefix_digest(request.agent.tenant, request.messages, request.tools)
        shown = sum(map(len, _shown(request.tools)))
        whole = shown + sum(len(str(message.get("content") or "")) for message in request.messages)
        share = (shown + sum(map(len, _system(request.messages)))) / max(1, whole)
        tokens = int(share * len(started.prompt_ids)) // self._block * self._block
        if digest and tokens:
            self._tokens[digest] = tokens
            self._tokens.move_to_end(digest)
            if len(self._tokens) > self._most:
                self._tokens.popitem(last=False)

    def clear(self) -> None:
        """RAM was emptied."""
        self._tokens.clear()

    def held(self) -> dict[str, int]:
        return dict(self._tokens)


def _system(messages: Sequence[Message]) -> list[str]:
    leading = takewhile(lambda message: message.get("role") == "system", messages)
    return [str(message.get("content") or "") for message in leading]
