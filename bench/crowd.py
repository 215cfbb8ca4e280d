"""Ten thousand agents in one store: does a turn, or a start, take longer for the others?"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from actors.config import ReplicaConfig
from actors.replica import ModelReplica
from cluster.registry import Registry
from storage.card import AgentId, BlockRef, BranchCard, Owner, PartRef
from storage.claims import new_card
from storage.pool import Pool
from storage.spec import CompatibilityKey
from storage.store import CacheStore

_OWNER = Owner("bench", "1")
_TOKENS = 1000


@dataclass(frozen=True)
class Crowd:
    """Seconds, medians; `start` is what the router reads in the background after its own start, to
    list agents that nobody has asked for yet."""

    agents: int
    open: float
    commit: float
    look: float  # whether the agent is still ours: what a turn asks the store
    evict: float  # one entry of a full pool
    replica: float  # a replica's start, model aside
    start: float


def crowds(folder: Path, key: CompatibilityKey, sizes: list[int]) -> list[Crowd]:
    """Fill one store step by step; measure at each size."""
    store, made, figures = CacheStore(f"file://{folder}"), 0, []
    for size in sizes:
        while made < size:
            _commit(store, key, f"agent-{made}")
            made += 1
        figures.append(_measure(store, key, size))
    return figures


def _commit(store: CacheStore, key: CompatibilityKey, session: str) -> tuple[float, float, float]:
    """One agent from nothing to a card; seconds of claim, commit and look."""
    agent = AgentId("default", session)
    at = [time.perf_counter()]
    card = store.claim(new_card(agent, key, "q4", _OWNER)).card
    at.append(time.perf_counter())
    refs = tuple(
        BlockRef(f"{n:064x}", 256, {"full": PartRef(f"{n:064x}", 1 << 20)}) for n in range(3)
    )
    branch = BranchCard(0, tuple(range(_TOKENS)), refs)
    store.commit(replace(card, generation=1, branches=(branch,)))
    at.append(time.perf_counter())
    if store.epoch(agent, key) != card.epoch:
        raise RuntimeError(f"agent {agent} was claimed by nobody else, and yet is not ours")
    at.append(time.perf_counter())
    opened, committed, looked = (b - a for a, b in pairwise(at))
    return opened, committed, looked


def _measure(store: CacheStore, key: CompatibilityKey, size: int) -> Crowd:
    probes = [_commit(store, key, f"probe-{size}-{n}") for n in range(50)]
    began = time.perf_counter()
    registry, found = Registry(), 0
    for loaded in store.cards(store.tenants(), key):
        registry.found_in_store(loaded)
        found += 1
    start = time.perf_counter() - began
    if found < size:
        raise RuntimeError(f"{found} of {size} agents were listed")
    opened, committed, looked = (median(p[i] for p in probes) for i in range(3))
    return Crowd(size, opened, committed, looked, _evict_s(size), _replica_s(store.url), start)


def _replica_s(url: str) -> float:
    began = time.perf_counter()
    replica = ModelReplica(ReplicaConfig(model="fake://", store=url), "bench")
    seconds = time.perf_counter() - began
    replica.close()
    return seconds


def _evict_s(n_entries: int) -> float:
    """A put into a pool that is full with n_entries rows."""
    import numpy as np

    rows = {"x": np.zeros((1, 1, 1, 1), np.uint32)}
    pool = Pool(4 * n_entries)
    for n in range(n_entries):
        pool.put((str(n), "full"), rows, pinned=False)
    began = time.perf_counter()
    for n in range(1000):
        pool.put((f"new-{n}", "full"), rows, pinned=False)
    return (time.perf_counter() - began) / 1000
