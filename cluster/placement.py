"""Which replica serves a turn? Pure: numbers in, a decision with its reasons out.

    T(replica) = queue + min(bring, prefill) + decode          all in seconds

`bring` is nothing where the agent's rows are in RAM, loading where they are stored, and a migration
on top where another replica owns the agent. The least T wins; the owner keeps a tie, and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.rates import KnownRates, Rates
from cluster.errors import NoReplica


@dataclass(frozen=True)
class PlacementConfig:
    hysteresis_s: float = 0.5  # an agent moves only when it gains more than this …
    hysteresis: float = 0.25  # … and this share of what the turn costs: rates are estimates
    migrate_s: float = 0.2  # fixed cost of a migration: freeze, commit, claim
    pressure_s: float = 0.2  # cost of a replica that is full


@dataclass(frozen=True)
class Candidate:
    """One healthy replica, from its last status."""

    node: str
    queue_s: float
    rates: Rates
    pressure: float  # 0 .. 1: how full its cells or its sequences are
    n_agents: int


@dataclass(frozen=True)
class Location:
    """Where an agent's memory is. `node` None: in the store only, or nowhere (tokens 0)."""

    node: str | None = None
    tokens: int = 0
    in_ram: bool = False


@dataclass(frozen=True)
class Estimate:
    """Seconds of one candidate, and how it would get the agent's rows."""

    node: str
    queue_s: float
    bring_s: float
    prefill_s: float
    decode_s: float
    extra_s: float  # pressure, and the hysteresis of leaving the owner
    action: str  # "stay", "load", "migrate" or "prefill"

    @property
    def total_s(self) -> float:
        memory = min(self.bring_s, self.prefill_s)
        return self.queue_s + memory + self.decode_s + self.extra_s


@dataclass(frozen=True)
class Placement:
    node: str
    action: str
    estimates: tuple[Estimate, ...]  # of all candidates, best first


def place(
    new_tokens: int,
    reply_tokens: int,
    location: Location,
    candidates: Sequence[Candidate],
    config: PlacementConfig,
) -> Placement:
    """new_tokens: of the prompt, beyond what the agent's memory holds. Raises NoReplica."""
    if not candidates:
        raise NoReplica("no replica is ready")
    measured = [candidate.rates for candidate in candidates]
    estimates = [
        _estimate(c, c.rates.filled(measured), new_tokens, reply_tokens, location, config)
        for c in candidates
    ]
    agents = {candidate.node: candidate.n_agents for candidate in candidates}
    ranked = sorted(
        estimates,
        key=lambda e: (round(e.total_s, 3), e.node != location.node, agents[e.node], e.node),
    )
    return Placement(ranked[0].node, ranked[0].action, tuple(ranked))


def _estimate(
    candidate: Candidate,
    rates: KnownRates,
    new_tokens: int,
    reply_tokens: int,
    location: Location,
    config: PlacementConfig,
) -> Estimate:
    owner = location.node == candidate.node
    moves = location.node is not None and not owner
    load = location.tokens / rates.restore_tokens_per_s
    suffix = new_tokens / rates.prefill_tokens_per_s
    bring = suffix + (0.0 if owner and location.in_ram else load)
    if moves:
        bring += config.migrate_s
    prefill = suffix + location.tokens / rates.prefill_tokens_per_s
    if not location.tokens or prefill < bring:
        action = "prefill"
    else:
        action = "migrate" if moves else ("stay" if owner and location.in_ram else "load")
    decode = reply_tokens * rates.decode_step_s
    extra = candidate.pressure * config.pressure_s
    if moves:
        extra += config.hysteresis_s + config.hysteresis * (min(bring, prefill) + decode)
    return Estimate(
        node=candidate.node,
        queue_s=candidate.queue_s,
        bring_s=bring,
        prefill_s=prefill,
        decode_s=decode,
        extra_s=extra,
        action=action,
    )
