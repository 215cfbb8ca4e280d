"""How loaded replicas are, and which agent evens two of them out. Pure; `rebalance` acts on it.

A move must lower the fuller one's pressure and not lift the other's above it, so the difference
shrinks with every move and none is taken back by a later one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from storage.card import AgentId


@dataclass(frozen=True)
class Mobile:
    """An agent that may be moved."""

    agent: AgentId
    cells: int  # that its rows fill, as far as is known
    turns: int = 0  # under way, or waiting
    order: float = 0.0  # of those that are idle, and of those that are not, the least goes first


@dataclass(frozen=True)
class Load:
    """One replica's. Agents that are idle count by the cells that they fill only."""

    node: str
    cells_used: int
    cells: int
    running: int  # turns
    waiting: int
    slots: int

    @property
    def turns(self) -> int:
        return self.running + self.waiting

    @property
    def pressure(self) -> float:
        """1: full. More where turns wait."""
        return max(self.cells_used / self.cells, self.turns / self.slots)

    def without(self, mobile: Mobile) -> Load:
        waiting = max(0, self.waiting - mobile.turns)
        running = max(0, self.turns - mobile.turns - waiting)
        used = max(0, self.cells_used - mobile.cells)
        return replace(self, cells_used=used, running=running, waiting=waiting)

    def plus(self, mobile: Mobile) -> Load:
        """Rows of idle agents give way where there is no room."""
        used = max(self.cells_used, min(self.cells, self.cells_used + mobile.cells))
        return replace(self, cells_used=used, running=self.running + mobile.turns)


def uneven(full: Load, free: Load, threshold: float) -> bool:
    """Their pressures differ by more than the threshold, or turns wait for one's slots while the
    other has some."""
    waits = full.waiting > 0 and full.running >= full.slots and free.turns < free.slots
    return waits or full.pressure - free.pressure > threshold


def extremes(
    sources: Sequence[Load], targets: Sequence[Load], threshold: float
) -> tuple[Load, Load] | None:
    """The fullest and the emptiest; None where they are even enough."""
    if not sources or not targets:
        return None
    full = max(sources, key=lambda load: (load.pressure, load.node))
    free = min(targets, key=lambda load: (load.pressure, load.turns / load.slots, load.node))
    return (full, free) if uneven(full, free, threshold) else None


def next_move(full: Load, free: Load, mobiles: Iterable[Mobile], threshold: float) -> Mobile | None:
    """The agent of `full` that is to go to `free`: idle ones first."""
    if not uneven(full, free, threshold):
        return None
    for mobile in sorted(mobiles, key=lambda m: (m.turns > 0, m.order, str(m.agent))):
        relieved = full.without(mobile).pressure
        if relieved < full.pressure and free.plus(mobile).pressure <= relieved:
            return mobile
    return None
