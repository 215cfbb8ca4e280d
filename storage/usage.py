"""Bytes per agent and tenant, as the newest cards name them; a shared block is counted once.

Reads cards only. Used by `retention` and by the command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from storage.blocks import block_name
from storage.card import CacheCard, CardRef
from storage.errors import StorageError
from storage.reader import CardReader, LoadedCard
from storage.survey import agent_folders


@dataclass(frozen=True)
class AgentUsage:
    """What one agent's newest card holds. `card` is without branches; `modified` is when it was
    written, by the store's clock."""

    card: CacheCard
    ref: CardRef
    tokens: int
    rows: int
    bytes: int
    shared_bytes: int  # of `bytes`, those that other agents name, too
    modified: float
    names: frozenset[str]  # of its block files


@dataclass(frozen=True)
class TenantUsage:
    tenant: str
    agents: tuple[AgentUsage, ...]  # deleted ones excepted
    sizes: dict[str, int]  # block file -> bytes
    sharers: Counter[str]  # block file -> agents that name it
    unreadable: tuple[StorageError, ...]  # newest cards that the keys at hand do not open

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def shared_bytes(self) -> int:
        return self.shared(self.sizes)

    def shared(self, names: Iterable[str]) -> int:
        """Bytes of those that more than one agent names."""
        return sum(self.sizes[name] for name in names if self.sharers[name] > 1)


def tenant_usage(store: CardReader, tenant: str) -> TenantUsage:
    """Raises StoreUnavailable."""
    agents, unreadable = [], []
    sizes: dict[str, int] = {}
    sharers: Counter[str] = Counter()
    for folder in agent_folders(store, tenant):
        newest = folder.newest
        if newest is None:
            continue
        if newest.loaded is None:
            unreadable += [newest.error] if newest.error else []
            continue
        if newest.loaded.card.tombstone:
            continue
        named = _sizes(newest.loaded.card)
        sizes |= named
        sharers.update(named.keys())
        agents.append(_agent(newest.loaded, named, newest.modified))
    usage = TenantUsage(tenant, tuple(agents), sizes, sharers, tuple(unreadable))
    with_shares = [replace(a, shared_bytes=usage.shared(a.names)) for a in agents]
    return replace(usage, agents=tuple(with_shares))


def _agent(loaded: LoadedCard, named: dict[str, int], modified: float) -> AgentUsage:
    card = loaded.card
    return AgentUsage(
        card=replace(card, branches=()),
        ref=loaded.ref,
        tokens=sum(len(branch.tokens) for branch in card.branches),
        rows=sum(branch.rows for branch in card.branches),
        bytes=sum(named.values()),
        shared_bytes=0,
        modified=modified,
        names=frozenset(named),
    )


def _sizes(card: CacheCard) -> dict[str, int]:
    return {
        block_name(ref.id, part, stored.sha256): stored.size
        for branch in card.branches
        for ref in (*branch.blocks, *branch.tail)
        for part, stored in ref.parts.items()
    }
