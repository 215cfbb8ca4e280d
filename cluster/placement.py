"""Which replica serves a turn? Pure: numbers in, a decision with its reasons out.

    T(replica) = queue + min(bring, mixed, prefill) + decode          all in seconds

`bring` is nothing where the agent's rows are in RAM, loading where they are stored, and a migration
on top where another replica owns the agent. `mixed` brings a first part and prefills the rest. The
least T wins; the owner keeps a tie, and more. `cluster.fleet` decides the same for many replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.rates import KnownRates, Rates, fill
from actors.turn import Affinity
from cluster.errors import NoReplica
from storage.links import LinkRate, peer_link
from storage.spec import BLOCK_TOKENS


@dataclass(frozen=True)
class PlacementConfig:
    hysteresis_s: float = 0.5  # an agent moves only when it gains more than this …
    hysteresis: float = 0.25  # … and this share of what the turn costs: rates are estimates
    migrate_s: float = 0.2  # fixed cost of a migration: freeze, commit, claim
    pressure_s: float = 0.2  # cost of a replica that is full
    warn_s: float = 5.0  # cost of a node that is short of battery or memory: idle agents leave it
    rebalance: float = 0.5  # turns over slots: from that difference on they are moved; 0: never


@dataclass(frozen=True)
class LinkCost:
    """Bringing n tokens' rows over a link takes fixed_s + n * token_s."""

    fixed_s: float
    token_s: float

    def seconds(self, tokens: int) -> float:
        return self.fixed_s + tokens * self.token_s


def link_cost(rate: LinkRate, row_bytes: int) -> LinkCost:
    """Rows come block by block, a read each."""
    token_s = rate.fixed_s / BLOCK_TOKENS + row_bytes / rate.bytes_per_s
    return LinkCost(rate.fixed_s, token_s)


GUESSED_LINK = LinkCost(0.0, 1e-4)


@dataclass(frozen=True)
class Candidate:
    """One healthy replica, from its last status. `links`: "store", "disk" where it has a tier of
    its own, peer_link(node) for every node from whose disk it has read; the store's is borrowed or
    guessed until it is measured."""

    node: str
    queue_s: float
    rates: Rates
    pressure: float  # 0 .. 1: the share of its cells that is taken, or of its slots by turns
    n_agents: int
    links: Mapping[str, LinkCost] = field(default_factory=dict)
    prefixes: Mapping[str, int] = field(default_factory=dict)  # digest -> tokens in its RAM
    warned: bool = False  # its node has reported pressure


@dataclass(frozen=True)
class Location:
    """Where an agent's memory is. `node` None: in the store only, or nowhere (tokens 0)."""

    node: str | None = None
    tokens: int = 0
    in_ram: bool = False
    lag: int = 0  # of `tokens`, not in the shared store yet


@dataclass(frozen=True)
class Estimate:
    """Seconds of one candidate, and how it would get the agent's rows."""

    node: str
    queue_s: float
    bring_s: float  # bring all there is, prefill what is new
    prefill_s: float  # prefill everything
    decode_s: float
    extra_s: float  # pressure, and the hysteresis of leaving the owner
    action: str  # "stay", "load", "migrate", "mixed", "share" or "prefill"
    mixed_s: float = math.inf  # bring or share a first part, prefill the rest
    kept: int = 0  # tokens that are not prefilled
    link: str = ""  # over which stored rows would come: "disk", "store", or a peer's

    @property
    def memory_s(self) -> float:
        return min(self.bring_s, self.mixed_s, self.prefill_s)

    @property
    def total_s(self) -> float:
        return self.queue_s + self.memory_s + self.decode_s + self.extra_s


@dataclass(frozen=True)
class Placement:
    node: str
    action: str
    estimates: tuple[Estimate, ...]  # best first: of all candidates, or the chosen and the owner
    restore_tokens: int | None = None  # rows to load at most; None: all there are

    def of(self, node: str | None) -> Estimate | None:
        return next((e for e in self.estimates if e.node == node), None)


def place(
    new_tokens: int,
    reply_tokens: int,
    location: Location,
    candidates: Sequence[Candidate],
    config: PlacementConfig,
    prefix: str = "",
    affinity: Affinity = "soft",
) -> Placement:
    """new_tokens: of the prompt, beyond what the agent's memory holds. `prefix`: the digest of its
    system prompt. Raises NoReplica."""
    if not candidates:
        raise NoReplica("no replica is ready")
    costs = [
        estimate(c, known, new_tokens, reply_tokens, location, config, prefix)
        for c, known in filled(candidates)
        if affinity == "soft" or not _owned(location, candidates) or c.node == location.node
    ]
    agents = {candidate.node: candidate.n_agents for candidate in candidates}
    ranked = sorted(
        costs, key=lambda e: (ms(e.total_s), e.node != location.node, agents[e.node], e.node)
    )
    return placed(tuple(ranked), location)


def placed(ranked: tuple[Estimate, ...], location: Location) -> Placement:
    """The first of the estimates is the choice."""
    best = ranked[0]
    limited = location.tokens and best.action in ("mixed", "prefill")
    return Placement(best.node, best.action, ranked, best.kept if limited else None)


def filled(candidates: Sequence[Candidate]) -> list[tuple[Candidate, KnownRates]]:
    """Rates as numbers, and a store link for everybody: the mean of those who have measured it."""
    if not candidates:
        return []
    known = fill([candidate.rates for candidate in candidates])
    stores = [c.links["store"] for c in candidates if "store" in c.links]
    mean = GUESSED_LINK
    if stores:
        fixed, token = (
            math.fsum(values) / len(stores)
            for values in zip(*((x.fixed_s, x.token_s) for x in stores), strict=True)
        )
        mean = LinkCost(fixed, token)
    linked = [
        c if "store" in c.links else replace(c, links={**c.links, "store": mean})
        for c in candidates
    ]
    return list(zip(linked, known, strict=True))


def ms(seconds: float) -> float:
    """Whole milliseconds: less is no difference."""
    return math.floor(seconds * 1000.0 + 0.5)


def _owned(location: Location, candidates: Sequence[Candidate]) -> bool:
    return any(candidate.node == location.node for candidate in candidates)


def estimate(
    candidate: Candidate,
    rates: KnownRates,
    new_tokens: int,
    reply_tokens: int,
    location: Location,
    config: PlacementConfig,
    prefix: str = "",
) -> Estimate:
    """Seconds of one candidate that has a store link; `rates` are its own or borrowed."""
    have, end = location.tokens, location.tokens + new_tokens
    owner = location.node == candidate.node
    moves = location.node is not None and not owner
    move_s = config.migrate_s if moves else 0.0
    shared = min(candidate.prefixes.get(prefix, 0), have or end)
    prefill = rates.prefill_s(0, end)
    bring, mixed, part, name = prefill, math.inf, 0, ""
    if have and owner and location.in_ram:
        bring = rates.prefill_s(have, end)
    elif have or shared:
        name, link = way(candidate.links, location, owner=owner, moves=moves)
        if have:
            bring = kept_s(rates, link, shared, have, end)
        for kept in breakpoints(rates, link, shared, have):
            if (total := kept_s(rates, link, shared, kept, end)) < mixed:
                mixed, part = total, kept
    memory = min(bring, mixed, prefill)
    decode = reply_tokens * rates.decode_step_s
    extra = candidate.pressure * config.pressure_s + candidate.warned * config.warn_s
    if moves:
        extra += config.hysteresis_s + config.hysteresis * (move_s + memory + decode)
    action, kept = "prefill", 0
    if have and bring <= memory:
        action = "migrate" if moves else ("stay" if owner and location.in_ram else "load")
        kept = have
    elif mixed <= memory and mixed < prefill:
        action, kept = ("mixed" if have else "share"), part
    return Estimate(
        candidate.node,
        candidate.queue_s,
        move_s + bring,
        move_s + prefill,
        decode,
        extra,
        action,
        move_s + mixed,
        kept,
        name,
    )


def kept_s(rates: KnownRates, link: LinkCost, shared: int, kept: int, end: int) -> float:
    """Seconds until a prompt of `end` tokens is in the engine whose first `kept` rows are loaded,
    all but `shared` of them over the link. Both go on at the same time."""
    load = kept / rates.restore_tokens_per_s
    if kept > shared:
        load = link.fixed_s + max(load, (kept - shared) * link.token_s)
    return load + rates.prefill_s(kept, end)


def breakpoints(rates: KnownRates, link: LinkCost, shared: int, have: int) -> list[int]:
    """Where the best number of rows to keep can lie, but for none and all.

    Between these points kept_s is concave: loading grows in proportion, and every token that is
    not prefilled saves more than the one before. The bend is where shipping, which has `shared`
    tokens less to do, is overtaken by loading; whole blocks on either side of it.
    """
    points = [shared] if 0 < shared < (have or shared + 1) else []
    load_s = 1.0 / rates.restore_tokens_per_s
    if have and shared and link.token_s > load_s:
        bend = shared * link.token_s / (link.token_s - load_s)
        below = math.floor(min(bend, 1e12) / BLOCK_TOKENS) * BLOCK_TOKENS
        points += [k for k in (below, below + BLOCK_TOKENS) if shared < k < have]
    return points


def way(
    links: Mapping[str, LinkCost], location: Location, *, owner: bool, moves: bool
) -> tuple[str, LinkCost]:
    """The owner's own disk, or the cheapest link and what it costs. What the store still lacks
    comes from the owner's disk where that link is known: nobody can say when the store will have
    it; else with what the owner has to upload first."""
    store = links["store"]
    if owner:
        return ("disk", links["disk"]) if "disk" in links else ("store", store)
    if not moves:
        return "store", store
    name = peer_link(location.node or "")
    if name not in links:
        return "store", LinkCost(store.fixed_s + location.lag * store.token_s, store.token_s)
    peer = links[name]
    if location.lag or peer.seconds(location.tokens) < store.seconds(location.tokens):
        return name, peer
    return "store", store


def over_peer(links: Mapping[str, LinkCost], location: Location) -> bool:
    """Whether an agent that moves is to come from its owner's disk: `way` says so, or it has not
    been measured or reported yet."""
    if "store" not in links or peer_link(location.node or "") not in links or not location.tokens:
        return True
    return way(links, location, owner=False, moves=True)[0] != "store"
