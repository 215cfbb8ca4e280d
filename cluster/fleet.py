"""The replicas as columns of numbers: the decision of `placement.place` for hundreds of them at
once, by the same operations in the same order, so that both always agree.

Kept by `dispatch`: what a report changes is written when it comes, so that a decision only reads.
Pure, and not thread-safe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from actors.turn import Affinity
from cluster.columns import Column, Columns
from cluster.errors import NoReplica
from cluster.placement import (
    Candidate,
    Estimate,
    Location,
    Placement,
    PlacementConfig,
    estimate,
    placed,
)


class _Turn(NamedTuple):
    new_tokens: int
    reply_tokens: int
    location: Location
    prefix: str


class Fleet:
    """Candidates by node. `choose` answers as `placement.place` would for the same ones."""

    def __init__(self, config: PlacementConfig) -> None:
        self._config = config
        self._candidates: dict[str, Candidate] = {}
        self._holders: dict[str, dict[str, int]] = {}  # prefix -> node -> tokens
        self._columns: Columns | None = None  # None: reports have come since

    def __contains__(self, node: str) -> bool:
        return node in self._candidates

    @property
    def nodes(self) -> list[str]:
        return sorted(self._candidates)

    def reported(self, candidate: Candidate) -> None:
        """A replica's new word."""
        node, old = candidate.node, self._candidates.get(candidate.node)
        if old is None or old.prefixes != candidate.prefixes:
            self._drop_prefixes(old)
            for digest, tokens in candidate.prefixes.items():
                self._holders.setdefault(digest, {})[node] = tokens
        self._candidates[node] = candidate
        if self._columns is not None and not self._columns.update(candidate):
            self._columns = None

    def lost(self, node: str) -> None:
        self._drop_prefixes(self._candidates.pop(node, None))
        self._columns = None

    def promise(self, node: str, seconds: float) -> None:
        """A turn of so many seconds goes there; until its next report it counts as queued."""
        candidate = self._candidates[node]
        queue_s = candidate.queue_s + seconds
        self._candidates[node] = _with(candidate, queue_s=queue_s)
        if self._columns is not None:
            self._columns.queue[self._columns.row[node]] = queue_s

    def owns(self, node: str, n_agents: int) -> None:
        """The registry counts so many agents of a node now."""
        candidate = self._candidates.get(node)
        if candidate is None or candidate.n_agents == n_agents:
            return
        self._candidates[node] = _with(candidate, n_agents=n_agents)
        if self._columns is not None:
            self._columns.agents[self._columns.row[node]] = n_agents

    def candidates(self, nodes: Iterable[str] | None = None) -> list[Candidate]:
        return [self._candidates[n] for n in (self.nodes if nodes is None else sorted(nodes))]

    # ---- the decision

    def choose(
        self,
        new_tokens: int,
        reply_tokens: int,
        location: Location,
        nodes: Iterable[str] | None = None,
        prefix: str = "",
        affinity: Affinity = "soft",
    ) -> Placement:
        """As `place`, among `nodes` (all, when None) with rates borrowed from the whole fleet. The
        estimates are those of the chosen and the owner. Raises NoReplica."""
        columns = self._current()
        rows = None if nodes is None else [columns.row[n] for n in nodes if n in columns.row]
        if not columns.row or (rows is not None and not rows):
            raise NoReplica("no replica is ready")
        turn = _Turn(new_tokens, reply_tokens, location, prefix)
        owner = columns.row.get(location.node or "")
        if owner is not None and rows is not None and owner not in rows:
            owner = None
        if affinity == "hard" and owner is not None:
            best = owner
        else:
            best = self._least(columns, turn, rows)
        chosen = [best] if owner is None or owner == best else [best, owner]
        return placed(tuple(self._estimate(columns, row, turn) for row in chosen), location)

    def estimates(
        self,
        new_tokens: int,
        reply_tokens: int,
        location: Location,
        nodes: Iterable[str],
        prefix: str = "",
    ) -> list[Estimate]:
        """Of these nodes, in their order."""
        columns = self._current()
        turn = _Turn(new_tokens, reply_tokens, location, prefix)
        return [self._estimate(columns, columns.row[node], turn) for node in nodes]

    def _current(self) -> Columns:
        if self._columns is None:
            self._columns = Columns([self._candidates[node] for node in self.nodes], self._config)
        return self._columns

    def _estimate(self, columns: Columns, row: int, turn: _Turn) -> Estimate:
        candidate, rates = columns.known[row]
        now = self._candidates[candidate.node]
        candidate = _with(candidate, queue_s=now.queue_s, n_agents=now.n_agents)
        new, reply, location, prefix = turn
        return estimate(candidate, rates, new, reply, location, self._config, prefix)

    def _least(self, columns: Columns, turn: _Turn, rows: list[int] | None) -> int:
        """The row of the least total; ties keep the owner, then the fewest agents, then the
        name."""
        new, reply, location, prefix = turn
        shared = self._shared(columns, prefix, location.tokens or new)
        total = np.floor(columns.totals(new, reply, location, shared) * 1000.0 + 0.5)
        if rows is not None:
            allowed = np.full(len(total), np.inf)
            allowed[rows] = 0.0
            total += allowed
        tied = np.flatnonzero(total == total.min())
        owner = columns.row.get(location.node or "")
        if owner is not None and owner in tied:
            return owner
        return int(tied[columns.agents[tied].argmin()])

    def _shared(self, columns: Columns, prefix: str, most: int) -> Column | None:
        """Tokens of the prefix that each holds; None where nobody does."""
        holders = self._holders.get(prefix)
        if not holders:
            return None
        shared = np.zeros(len(columns.row))
        for node, tokens in holders.items():
            shared[columns.row[node]] = min(tokens, most)
        return shared

    def _drop_prefixes(self, candidate: Candidate | None) -> None:
        if candidate is None:
            return
        for digest in candidate.prefixes:
            holders = self._holders.get(digest, {})
            holders.pop(candidate.node, None)
            if not holders:
                self._holders.pop(digest, None)


def _with(candidate: Candidate, **changes: float | Mapping[str, int]) -> Candidate:
    """dataclasses.replace, at a tenth of its price."""
    copy = object.__new__(Candidate)
    copy.__dict__.update(candidate.__dict__, **changes)
    return copy
