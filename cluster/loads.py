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
    turns: int = 1  # under way, or waiting
    order: float = 0.0  # the least goes first


@dataclass(frozen=True)
class Load:
    """One replica's turns. Agents that are idle are no load: their rows give way."""

    node: str
    running: int  # turns
    waiting: int
    slots: int

    @property
    def turns(self) -> int:
        return self.running + self.waiting

    @property
    def pressure(self) -> float:
        """1: full. More where turns wait."""
        return self.turns / self.slots

    def without(self, mobile: Mobile) -> Load:
        waiting = max(0, self.waiting - mobile.turns)
        running = max(0, self.turns - mobile.turns - waiting)
        return replace(self, running=running, waiting=waiting)

    def plus(self, mobile: Mobile) -> Load:
        return replace(self, running=self.running + mobile.turns)


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
    free = min(targets, key=lambda load: (load.pressure, load.node))
    return (full, free) if uneven(full, free, threshold) else None


def next_move(full: Load, free: Load, mobiles: Iterable[Mobile], threshold: float) -> Mobile | None:
    """The agent of `full` that is to go to `free`."""
    if not uneven(full, free, threshold):
        return None
    for mobile in sorted(mobiles, key=lambda m: (m.order, str(m.agent))):
        relieved = full.without(mobile).pressure
        if relieved < full.pressure and free.plus(mobile).pressure <= relieved:
            return mobile
    return None
