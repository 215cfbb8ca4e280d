"""Decisions of the router with their reasons, and later what came of them. Pure.

The log is a ring: it explains what happened lately and is no archive. Entries are cheap to make,
because every turn makes one; what they say is worked out when somebody asks.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from actors.turn import Affinity
from cluster.placement import Estimate, Location, Placement, PlacementConfig
from storage.card import AgentId
from storage.links import peer_link

LOG_SIZE = 1024


@dataclass(frozen=True)
class Outcome:
    """What the ingress measured of an answered turn. Seconds count from the request."""

    first_token_s: float
    total_s: float
    prompt_chars: int
    prompt_tokens: int
    cached_tokens: int
    reply_tokens: int
    failovers: int = 0  # replicas that it lost
    again_tokens: int = 0  # of prompt and reply, prefilled by later replicas


@dataclass
class Choice:
    """Why a turn runs where it does. `placement` ranks what was compared, best first; `node` may
    be another one, where a move failed."""

    at: float  # unix seconds
    turn_id: str
    agent: AgentId
    node: str
    location: Location
    new_tokens: int
    reply_tokens: int
    affinity: Affinity
    placement: Placement
    held: bool = False  # by a turn that runs, or by an operator's migration
    move_failed: str = ""
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Decision:
    """Where a turn runs: the replica's actor handle, and which life of it."""

    node: str
    incarnation: str
    actor: Any
    placement: Placement
    restore_tokens: int | None = None  # of stored rows, load only the first


class DecisionLog:
    def __init__(self, size: int = LOG_SIZE) -> None:
        self._size = size
        self._entries: OrderedDict[int, Choice] = OrderedDict()
        self._last = 0
        self._by_turn: dict[str, int] = {}  # the turn's latest attempt

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, choice: Choice) -> None:
        self._last += 1
        self._entries[self._last] = choice
        if choice.turn_id:
            self._by_turn[choice.turn_id] = self._last
        if len(self._entries) > self._size:
            number, old = self._entries.popitem(last=False)
            if self._by_turn.get(old.turn_id) == number:
                del self._by_turn[old.turn_id]

    def ended(self, turn_id: str, outcome: Outcome) -> None:
        """What came of the turn's last attempt; one that has left the ring is forgotten."""
        number = self._by_turn.get(turn_id)
        if number is not None:
            self._entries[number].outcome = outcome

    def latest(self, tenant: str, limit: int) -> list[Choice]:
        """A tenant's, the newest first."""
        found = []
        for choice in reversed(self._entries.values()):
            if choice.agent.tenant == tenant:
                found.append(choice)
                if len(found) >= limit:
                    break
        return found


def to_json(choice: Choice, config: PlacementConfig) -> dict[str, Any]:
    where, chosen = choice.location, choice.placement
    return {
        "at": round(choice.at, 3),
        "turn": choice.turn_id,
        "agent": str(choice.agent),
        "node": choice.node,
        "action": chosen.action if choice.node == chosen.node else "stay",
        "affinity": choice.affinity,
        "owner": where.node,
        "memory_tokens": where.tokens,
        "new_tokens": choice.new_tokens,
        "reply_tokens": choice.reply_tokens,
        "reasons": reasons(choice, config),
        "estimates": [estimate_json(estimate) for estimate in chosen.estimates],
        "outcome": _outcome_json(choice.outcome),
    }


def estimate_json(estimate: Estimate) -> dict[str, Any]:
    """None for what is impossible: JSON knows no infinity."""
    seconds = {
        name: round(value, 4) if math.isfinite(value := getattr(estimate, name)) else None
        for name in ("total_s", "queue_s", "bring_s", "mixed_s", "prefill_s", "decode_s", "extra_s")
    }
    action = {"action": estimate.action, "kept_tokens": estimate.kept, "link": estimate.link}
    return {"node": estimate.node} | seconds | action


def _outcome_json(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    return {
        "first_token_s": round(outcome.first_token_s, 4),
        "total_s": round(outcome.total_s, 4),
        "prompt_tokens": outcome.prompt_tokens,
        "cached_tokens": outcome.cached_tokens,
        "prefilled_tokens": outcome.prompt_tokens - outcome.cached_tokens,
        "reply_tokens": outcome.reply_tokens,
        "failovers": outcome.failovers,
        "again_tokens": outcome.again_tokens,
    }


def reasons(choice: Choice, config: PlacementConfig) -> list[str]:
    """Sentences for people."""
    placement, where = choice.placement, choice.location
    lines = [_whereabouts(where)]
    chosen = placement.estimates[0]
    if choice.move_failed:
        lines.append(f"it should have moved to {placement.node}, but: {choice.move_failed}")
        return lines
    owner = placement.of(where.node)
    if owner is chosen and choice.affinity == "hard":
        lines.append("affinity is hard: it is not moved while its owner lives")
    elif owner is chosen and choice.held:
        lines.append("it is not moved while a turn of it runs, or just after an operator did")
    lines.append(f"{chosen.node} takes {chosen.total_s:.3f} s: {_shares(chosen)}")
    if owner is not None and owner is not chosen:
        lines.append(f"its owner {owner.node} would take {owner.total_s:.3f} s: {_shares(owner)}")
        lines.append(
            f"moving had to gain more than {config.hysteresis_s:g} s and "
            f"{100 * config.hysteresis:g} % of the turn: both are in the {chosen.extra_s:.3f} s"
        )
    lines.append(_way(chosen, where))
    return lines


def _whereabouts(where: Location) -> str:
    if where.node is not None:
        place = "in RAM" if where.in_ram else "stored"
        return f"{where.node} owns the agent, with {where.tokens} tokens {place}"
    if where.tokens:
        return f"nobody runs the agent; the store has {where.tokens} tokens of it"
    return "the agent has no memory yet"


def _shares(estimate: Estimate) -> str:
    return (
        f"queue {estimate.queue_s:.3f}, memory {estimate.memory_s:.3f}, "
        f"decode {estimate.decode_s:.3f}, pressure and hysteresis {estimate.extra_s:.3f}"
    )


def _way(chosen: Estimate, where: Location) -> str:
    if chosen.action == "share":
        return f"{chosen.kept} tokens of its system prompt are in RAM there"
    if chosen.action == "mixed":
        return (
            f"the first {chosen.kept} of {where.tokens} tokens are brought{_source(chosen)}, "
            "the rest is prefilled: "
            f"{chosen.mixed_s:.3f} s, against {chosen.bring_s:.3f} s and {chosen.prefill_s:.3f} s"
        )
    if chosen.action == "prefill" and where.tokens:
        return (
            f"prefilling takes {chosen.prefill_s:.3f} s, bringing the rows {chosen.bring_s:.3f} s"
        )
    if chosen.action == "prefill":
        return "there is nothing to bring: everything is prefilled"
    return (
        f"bringing the rows{_source(chosen)} takes {chosen.bring_s:.3f} s, "
        f"prefilling {chosen.prefill_s:.3f} s"
    )


def _source(chosen: Estimate) -> str:
    """From where they come."""
    if not chosen.link:
        return ""
    if chosen.link == "store":
        return " from the store"
    node = chosen.node if chosen.link == "disk" else chosen.link.removeprefix(peer_link(""))
    return f" from {node}'s disk"
