"""What placement.estimate adds up, for all candidates at once: a column per cost, a row each.

The same operations in the same order, so that both agree to the last bit. Used by `fleet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from actors.rates import KnownRates
from cluster.placement import Candidate, Location, PlacementConfig, filled
from storage.links import peer_link
from storage.spec import BLOCK_TOKENS

Column = NDArray[np.float64]
_LINKS = ("store", "disk")


class Columns:
    """`queue` and `agents` may change; everything else is as reported."""

    def __init__(self, candidates: Sequence[Candidate], config: PlacementConfig) -> None:
        """`candidates`: in the order of their names."""
        self._config, self._told = config, list(candidates)
        self.known = filled(candidates)
        self.row = {candidate.node: row for row, candidate in enumerate(candidates)}
        self._borrow = {row for row, told in enumerate(candidates) if not _complete(told)}
        n = len(candidates)
        self.queue, self.agents = np.zeros(n), np.zeros(n)
        self._pressure, self._warned = np.zeros(n), np.zeros(n)
        self._tokens_per_s, self._depth = np.zeros(n), np.zeros(n)
        self._decode, self._restore, self._load = np.zeros(n), np.zeros(n), np.zeros(n)
        self._fixed = {name: np.full(n, np.inf) for name in _LINKS}
        self._token = {name: np.full(n, np.inf) for name in _LINKS}
        self._peers: dict[str, tuple[Column, Column]] = {}  # link -> (fixed, per token)
        self._no_prefix = np.zeros(n)
        for row in range(n):
            self._write(row)

    def update(self, candidate: Candidate) -> bool:
        """A new report; with it changes what others borrow. False of one that is not here."""
        row = self.row.get(candidate.node)
        if row is None:
            return False
        self._told[row] = candidate
        (self._borrow.discard if _complete(candidate) else self._borrow.add)(row)
        if self._borrow:
            self.known = filled(self._told)
        else:
            self.known[row] = candidate, candidate.rates.filled()
        self._write(row)
        for other in self._borrow - {row}:
            self._write_rates(other)
        return True

    def _write(self, row: int) -> None:
        candidate = self._told[row]
        self.queue[row], self.agents[row] = candidate.queue_s, candidate.n_agents
        self._pressure[row], self._warned[row] = candidate.pressure, candidate.warned
        self._write_rates(row)

    def _write_rates(self, row: int) -> None:
        candidate, rates = self.known[row]
        self._tokens_per_s[row], self._depth[row] = rates.prefill_tokens_per_s, rates.depth_s
        self._decode[row], self._restore[row] = rates.decode_step_s, rates.restore_tokens_per_s
        self._load[row] = 1.0 / rates.restore_tokens_per_s
        for name in _LINKS:
            link = candidate.links.get(name)
            self._fixed[name][row] = link.fixed_s if link else np.inf
            self._token[name][row] = link.token_s if link else np.inf
        for fixed, token in self._peers.values():  # links that it has no longer
            fixed[row] = token[row] = np.inf
        for name in candidate.links.keys() - set(_LINKS):
            n, link = len(self.row), candidate.links[name]
            columns = self._peers.setdefault(name, (np.full(n, np.inf), np.full(n, np.inf)))
            columns[0][row], columns[1][row] = link.fixed_s, link.token_s

    def totals(
        self, new_tokens: int, reply_tokens: int, location: Location, shared: Column | None
    ) -> Column:
        """Seconds of every candidate; `shared`: tokens of the prompt's prefix in its RAM."""
        config, have, end = self._config, location.tokens, location.tokens + new_tokens
        owner = self.row.get(location.node or "")
        moves = location.node is not None
        memory = self._prefill(0, end)
        if have:
            memory = np.minimum(memory, self._bring(shared, location, owner, end))
        elif shared is not None:
            memory = np.minimum(memory, self._part(shared, end))
        decode = reply_tokens * self._decode
        extra = self._pressure * config.pressure_s + self._warned * config.warn_s
        move_s = 0.0
        if moves:
            move_s = config.migrate_s
            moving = extra + (config.hysteresis_s + config.hysteresis * (move_s + memory + decode))
            if owner is not None:
                moving[owner] = extra[owner]
            extra = moving
        total: Column = self.queue + (move_s + memory) + decode + extra
        if owner is not None:
            total[owner] = self.queue[owner] + memory[owner] + decode[owner] + extra[owner]
        return total

    def _bring(
        self, shared: Column | None, location: Location, owner: int | None, end: int
    ) -> Column:
        """The least of bringing all rows and bringing a first part."""
        have = location.tokens
        fixed, token = self._links(location, owner)
        held = self._no_prefix if shared is None else shared
        rest = self._prefill(have, end)
        # What is shared already need not be shipped; a fixed cost is for what does.
        whole = have / self._restore
        ships = held < have
        shipped = fixed + np.maximum(whole, (have - held) * token)
        best = np.where(ships, shipped, whole) + rest
        if shared is not None:
            best = np.minimum(best, self._part(held, end, have))
            best = np.minimum(best, self._bend(held, fixed, token, have, end))
        if owner is not None and location.in_ram:
            best[owner] = rest[owner]
        return best

    def _part(self, kept: Column, end: int, have: int | None = None) -> Column:
        """Load what is shared, prefill the rest; infinite where nothing is, or everything."""
        cost = kept / self._restore + self._prefill(kept, end)
        real = kept > 0 if have is None else (kept > 0) & (kept < have)
        return np.where(real, cost, np.inf)

    def _bend(self, held: Column, fixed: Column, token: Column, have: int, end: int) -> Column:
        """Whole blocks around where shipping overtakes loading; see placement.breakpoints."""
        bends = (held > 0) & (token > self._load)
        if not bends.any():
            return np.full(len(held), np.inf)
        bend = held * token / np.where(bends, token - self._load, np.inf)
        below = np.floor(np.minimum(bend, 1e12) / BLOCK_TOKENS) * BLOCK_TOKENS
        kept = np.stack((below, below + BLOCK_TOKENS))
        shipped = np.maximum(kept / self._restore, (kept - held) * token)
        cost = fixed + shipped + self._prefill(kept, end)
        within = bends & (held < kept) & (kept < have)
        best: Column = np.where(within, cost, np.inf).min(axis=0)
        return best

    def _links(self, location: Location, owner: int | None) -> tuple[Column, Column]:
        """(fixed, per token) of the way that each would bring the rows; see placement.way."""
        fixed, token = self._fixed["store"], self._token["store"]
        if location.node is not None:
            fixed = fixed + location.lag * token
        peer = self._peers.get(peer_link(location.node)) if location.node is not None else None
        if peer is not None:
            there = np.isfinite(peer[0])  # 0 tokens over no link cost nothing, else
            cost = np.where(there, peer[0] + location.tokens * peer[1], np.inf)
            nearer = there if location.lag else cost < fixed + location.tokens * token
            fixed, token = np.where(nearer, peer[0], fixed), np.where(nearer, peer[1], token)
        if owner is not None:
            fixed, token = fixed.copy(), token.copy()
            own = "disk" if np.isfinite(self._fixed["disk"][owner]) else "store"
            fixed[owner], token[owner] = self._fixed[own][owner], self._token[own][owner]
        return fixed, token

    def _prefill(self, start: Column | float, stop: float) -> Column:
        flat = (stop - start) / self._tokens_per_s
        result: Column = flat + self._depth * ((stop * stop - start * start) / 2.0)
        return result


def _complete(candidate: Candidate) -> bool:
    """It has measured everything itself."""
    rates = candidate.rates
    measured = (getattr(rates, entry.name) for entry in fields(KnownRates))
    return "store" in candidate.links and None not in measured
