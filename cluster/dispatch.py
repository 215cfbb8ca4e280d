"""The router without actors: registry, fleet and log, and the steps of one decision.

Nothing here waits, so no lock is held over I/O; the router calls it between two awaits. Pure but
for the clock it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from actors.turn import Affinity
from cluster.decisions import Choice, DecisionLog, Outcome
from cluster.fleet import Fleet
from cluster.placement import Candidate, Location, Placement, PlacementConfig
from cluster.registry import Registry
from storage.card import AgentId


@dataclass(frozen=True)
class Ask:
    """What is known of a turn before anything is tokenized."""

    agent: AgentId
    n_chars: int  # of all its messages
    reply_tokens: int
    turn_id: str = ""
    prefix: str = ""  # digest of its system prompt
    affinity: Affinity = "soft"
    persist: bool = True


class Dispatch:
    def __init__(self, config: PlacementConfig, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self.fleet, self.log = Fleet(config), DecisionLog()
        self.registry = Registry(self.fleet.owns)
        self._clock = clock

    def reported(self, candidate: Candidate) -> None:
        """A replica's word on itself; its agents are those that the registry counts."""
        n_agents = self.registry.count(candidate.node)
        self.fleet.reported(replace(candidate, n_agents=n_agents))

    def lost(self, node: str) -> None:
        self.registry.node_lost(node)
        self.fleet.lost(node)

    def decide(
        self, ask: Ask, nodes: Collection[str] | None = None, *, stays: bool = False
    ) -> Choice:
        """Among these nodes; `stays`: at its owner, if that is one of them. Changes nothing.
        Raises NoReplica."""
        registry = self.registry
        location = registry.location(ask.agent)
        new_tokens = registry.new_tokens(ask.agent, ask.n_chars)
        owner = location.node
        held = stays and owner is not None and (owner in self.fleet)
        held = held and (nodes is None or owner in nodes)
        affinity: Affinity = "hard" if held else ask.affinity
        placement = self.fleet.choose(
            new_tokens, ask.reply_tokens, location, nodes, ask.prefix, affinity
        )
        return self._choice(ask, location, new_tokens, placement, held=held)

    def cheapest(self, agent: AgentId, nodes: Collection[str]) -> str:
        """For its next turn, of which nothing is known. Raises NoReplica."""
        return self.decide(Ask(agent, 0, 1), nodes).node

    def compare(self, ask: Ask, nodes: Collection[str], *, stays: bool = False) -> Choice:
        """As `decide`, with the estimates of all nodes, the best first after the chosen."""
        choice = self.decide(ask, nodes, stays=stays)
        estimates = self.fleet.estimates(
            choice.new_tokens, ask.reply_tokens, choice.location, nodes, ask.prefix
        )
        ranked = sorted(estimates, key=lambda e: (e.node != choice.node, e.total_s, e.node))
        choice.placement = replace(choice.placement, estimates=tuple(ranked))
        return choice

    def began(self, ask: Ask, choice: Choice, until: float) -> None:
        """The turn goes there; `until`, by the caller's clock: should nobody tell its end."""
        node = choice.node
        if ask.persist:
            self.registry.assign(ask.agent, node)
            self.registry.asked(ask.agent, ask.affinity)
            self.registry.turn_began(ask.agent, ask.turn_id, until)
        estimate = choice.placement.of(node) or choice.placement.estimates[0]
        if node in self.fleet:  # decoding is shared, and holds nobody up
            self.fleet.promise(node, estimate.memory_s)
        self.log.add(choice)

    def ended(
        self, agent: AgentId, turn_id: str, n_chars: int | None, outcome: Outcome | None = None
    ) -> None:
        """n_chars: of its messages and its reply; None if it was not answered."""
        self.registry.turn_ended(agent, turn_id)
        if n_chars is not None:
            self.registry.spoken(agent, n_chars)
        if outcome is not None:
            self.log.ended(turn_id, outcome)
            self.registry.tokenized(outcome.prompt_chars, outcome.prompt_tokens)

    def _choice(
        self, ask: Ask, location: Location, new_tokens: int, placement: Placement, *, held: bool
    ) -> Choice:
        return Choice(
            self._clock(), ask.turn_id, ask.agent, placement.node, location, new_tokens,
            ask.reply_tokens, ask.affinity, placement, held,
        )  # fmt: skip
