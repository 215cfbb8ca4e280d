"""Placement: the least total wins, and the owner keeps what is close."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cluster.placement as placement_module
from actors.rates import KnownRates, Rates
from actors.turn import Affinity
from cluster.errors import NoReplica
from cluster.fleet import Fleet
from cluster.placement import (
    Candidate,
    Estimate,
    LinkCost,
    Location,
    Placement,
    PlacementConfig,
    filled,
    kept_s,
    place,
)
from storage.links import peer_link

CONFIG = PlacementConfig()
FREE = PlacementConfig(hysteresis_s=0.0, hysteresis=0.0, migrate_s=0.0, pressure_s=0.0, warn_s=0.0)
MEASURED = Rates(200.0, 0.02, 10_000.0, 2.0)

seconds = st.floats(0, 60)
rate = st.floats(1, 1e6)
step = st.floats(1e-4, 1)
rates = st.builds(Rates, rate, step, rate, seconds)
maybe_rates = st.builds(
    Rates, st.none() | rate, st.none() | step, st.none() | rate, st.none() | seconds
)


def candidate(node: str, queue_s: float = 0.0, **changes: object) -> Candidate:
    return replace(Candidate(node, queue_s, MEASURED, 0.0, 0), **changes)


def candidates(rates: st.SearchStrategy[Rates]) -> st.SearchStrategy[list[Candidate]]:
    one = st.builds(
        Candidate,
        node=st.sampled_from("abcdef"),
        queue_s=seconds,
        rates=rates,
        pressure=st.floats(0, 1),
        warned=st.booleans(),
        n_agents=st.integers(0, 9),
    )
    return st.lists(one, min_size=1, max_size=6, unique_by=lambda c: c.node)


locations = st.builds(
    Location,
    node=st.none() | st.sampled_from("abcdefg"),  # g is never ready
    tokens=st.integers(0, 100_000),
    in_ram=st.booleans(),
)
tokens = st.integers(0, 20_000)


def of(placement: Placement, node: str) -> Estimate:
    return next(e for e in placement.estimates if e.node == node)


@given(tokens, tokens, locations, candidates(maybe_rates))
def test_the_chosen_total_is_the_least(
    new: int, reply: int, location: Location, ready: list[Candidate]
) -> None:
    placement = place(new, reply, location, ready, CONFIG)
    totals = [e.total_s for e in placement.estimates]
    assert of(placement, placement.node).total_s <= min(totals) + 0.001
    assert sorted(e.node for e in placement.estimates) == sorted(c.node for c in ready)
    first = placement.estimates[0]
    assert (first.node, first.action) == (placement.node, placement.action)
    for left, right in pairwise(totals):
        assert left <= right + 0.001


@given(tokens, tokens, locations, candidates(maybe_rates), seconds)
def test_a_longer_queue_is_nobody_elses_business(
    new: int, reply: int, location: Location, ready: list[Candidate], wait: float
) -> None:
    before = place(new, reply, location, ready, CONFIG)
    slower = [replace(c, queue_s=c.queue_s + wait * (c.node == before.node)) for c in ready]
    after = place(new, reply, location, slower, CONFIG)
    for c in ready:
        if c.node != before.node:
            assert of(after, c.node) == of(before, c.node)
    assert of(after, before.node).total_s >= of(before, before.node).total_s


def dearer(c: Candidate, cost: str, factor: float) -> Candidate:
    if cost == "queue":
        return replace(c, queue_s=c.queue_s + factor)
    if cost == "pressure":
        return replace(c, pressure=min(1.0, c.pressure * factor))
    known = c.rates.filled()
    slower = {
        "prefill": {"prefill_tokens_per_s": known.prefill_tokens_per_s / factor},
        "decode": {"decode_step_s": known.decode_step_s * factor},
        "restore": {"restore_tokens_per_s": known.restore_tokens_per_s / factor},
    }
    return replace(c, rates=replace(c.rates, **slower[cost]))


costs = st.sampled_from(["queue", "pressure", "prefill", "decode", "restore"])


@given(tokens, tokens, locations, candidates(rates), costs, st.floats(1, 100))
def test_no_rising_cost_of_another_unseats_the_chosen(
    new: int, reply: int, location: Location, ready: list[Candidate], cost: str, factor: float
) -> None:
    before = place(new, reply, location, ready, CONFIG)
    for other in [c for c in ready if c.node != before.node]:
        worse = [dearer(c, cost, factor) if c is other else c for c in ready]
        after = place(new, reply, location, worse, CONFIG)
        assert after.node == before.node
        assert of(after, other.node).total_s >= of(before, other.node).total_s - 1e-6


def test_a_tie_keeps_the_owner() -> None:
    ready = [candidate("a"), candidate("b"), candidate("z", n_agents=9)]
    assert place(10, 10, Location("z"), ready, FREE).node == "z"


def test_a_tie_without_an_owner_goes_to_the_fewest_agents_then_by_name() -> None:
    ready = [candidate("a", n_agents=2), candidate("c", n_agents=1), candidate("b", n_agents=1)]
    assert place(10, 10, Location(), ready, CONFIG).node == "b"


def test_less_than_a_millisecond_is_a_tie() -> None:
    ready = [candidate("a"), candidate("z", queue_s=0.0001)]
    assert place(0, 0, Location("z"), ready, FREE).node == "z"


@pytest.mark.parametrize(("wait", "chosen"), [(0.1, "owner"), (0.45, "owner"), (30.0, "other")])
def test_an_agent_moves_for_a_large_gain_only(wait: float, chosen: str) -> None:
    ready = [candidate("owner", wait), candidate("other")]
    assert place(20, 20, Location("owner", 1000, True), ready, CONFIG).node == chosen


@pytest.mark.parametrize(("hysteresis_s", "chosen"), [(0.5, "owner"), (0.4, "other")])
def test_a_gain_below_the_fixed_hysteresis_stays(hysteresis_s: float, chosen: str) -> None:
    ready = [candidate("owner", 0.45), candidate("other")]
    config = PlacementConfig(hysteresis_s=hysteresis_s, hysteresis=0.0, migrate_s=0.0)
    assert place(0, 0, Location("owner"), ready, config).node == chosen


def test_a_gain_below_the_share_of_the_turns_cost_stays() -> None:
    ready = [candidate("owner", 1.0), candidate("other")]
    config = PlacementConfig(hysteresis_s=0.0, hysteresis=0.25, migrate_s=0.0)
    assert place(0, 500, Location("owner"), ready, config).node == "owner"  # decodes for 10 s
    assert place(0, 50, Location("owner"), ready, config).node == "other"


@given(tokens, st.integers(1, 100_000), rates)
def test_rows_in_the_owners_ram_cost_nothing_to_bring(new: int, rows: int, measured: Rates) -> None:
    ready = [candidate("a", rates=measured), candidate("b", rates=measured)]
    placement = place(new, 0, Location("a", rows, True), ready, CONFIG)
    suffix = new / measured.filled().prefill_tokens_per_s
    assert of(placement, "a").bring_s == suffix
    assert of(placement, "b").bring_s > suffix
    assert of(placement, "a").action == "stay"


def test_a_full_replica_costs_its_pressure() -> None:
    ready = [candidate("a", pressure=1.0), candidate("b", pressure=0.5)]
    placement = place(0, 0, Location(), ready, CONFIG)
    assert placement.node == "b"
    assert of(placement, "a").extra_s == CONFIG.pressure_s


def test_a_soft_agent_leaves_a_node_that_warns_and_comes_to_none() -> None:
    owned = Location("a", 1000, True)
    warns = [candidate("a", warned=True), candidate("b")]
    assert place(20, 20, owned, warns, CONFIG).node == "b"
    assert place(20, 20, owned, warns, CONFIG, affinity="hard").node == "a"
    both = [candidate("a", warned=True), candidate("b", warned=True)]
    assert place(20, 20, owned, both, CONFIG).node == "a"
    assert place(20, 20, Location("b", 1000, True), warns, CONFIG).node == "b"


@pytest.mark.parametrize(
    ("location", "action"),
    [
        (Location("a", 1000, True), "stay"),
        (Location("a", 1000, False), "load"),
        (Location(None, 1000, False), "load"),
        (Location("gone", 1000, True), "migrate"),
        (Location("a", 0, True), "prefill"),
        (Location(), "prefill"),
    ],
)
def test_the_action_says_how_the_rows_come(location: Location, action: str) -> None:
    assert place(10, 10, location, [candidate("a")], CONFIG).action == action


def test_prefilling_again_wins_where_loading_is_slower() -> None:
    slow = candidate("a", rates=replace(MEASURED, restore_tokens_per_s=100.0))
    placement = place(0, 0, Location("a", 1000), [slow], CONFIG)
    assert placement.action == "prefill"
    assert placement.estimates[0].total_s == pytest.approx(1000 / 200)


def test_unmeasured_rates_are_borrowed_from_peers() -> None:
    ready = [
        candidate("new", rates=Rates()),
        candidate("fast", rates=Rates(prefill_tokens_per_s=400.0)),
        candidate("slow", rates=Rates(prefill_tokens_per_s=200.0)),
    ]
    placement = place(300, 0, Location(), ready, CONFIG)
    assert of(placement, "new").prefill_s == pytest.approx(1.0)
    assert of(placement, "fast").prefill_s == pytest.approx(0.75)


def test_computing_again_costs_what_was_measured() -> None:
    """Token by token on a replica that has only decoded; a guess may be far too fast."""
    rates = Rates()
    assert rates.again_s(0, 100) == rates.filled().prefill_s(0, 100)
    rates.decode(0.03)
    assert rates.again_s(4000, 4010) == pytest.approx(0.3)
    rates.prefill(1000, 2.0)
    assert rates.again_s(4000, 4010) == pytest.approx(0.02)
    assert rates.again_s(4000, 4010, tile=64) == pytest.approx(0.04)
    assert rates.again_s(4000, 4100, tile=64) == pytest.approx(0.2)


def test_rates_nobody_has_measured_are_guessed_alike() -> None:
    ready = [candidate("a", rates=Rates()), candidate("b", rates=Rates())]
    placement = place(300, 10, Location(), ready, CONFIG)
    assert of(placement, "a").total_s == of(placement, "b").total_s > 0


def test_no_candidates() -> None:
    with pytest.raises(NoReplica) as caught:
        place(1, 1, Location(), [], CONFIG)
    assert caught.value.retry_after > 0


# ---- rates


def test_a_rate_starts_with_the_first_measurement_and_then_follows() -> None:
    measured = Rates()
    measured.decode(1.0)
    assert measured.decode_step_s == 1.0
    measured.decode(2.0)
    assert measured.decode_step_s is not None
    assert 1.0 < measured.decode_step_s < 1.5


def test_a_short_prefill_is_no_measurement() -> None:
    measured = Rates()
    measured.prefill(31, 0.1)
    assert measured.prefill_tokens_per_s is None
    measured.prefill(32, 0.1)
    assert measured.prefill_tokens_per_s == pytest.approx(320)


def test_a_restore_in_no_time_is_a_finite_rate() -> None:
    measured = Rates()
    measured.restore(100, 0.0)
    assert isinstance(measured.filled(), KnownRates)
    assert 0 < measured.filled().restore_tokens_per_s < float("inf")


# ---- what is stored, shared and shipped

link = st.builds(LinkCost, st.floats(0, 1), st.floats(1e-7, 1e-1))
PEERS = [peer_link(node) for node in "abc"]
links = st.fixed_dictionaries({}, optional=dict.fromkeys(["store", "disk", *PEERS], link))
prefixes = st.dictionaries(st.sampled_from(["p", "q"]), st.integers(1, 40).map(lambda n: 256 * n))
deep_rates = st.builds(Rates, rate, step, rate, seconds, st.floats(0, 1e-5))
far_locations = st.builds(
    Location,
    node=st.none() | st.sampled_from("abcdefg"),
    tokens=st.integers(0, 100_000),
    in_ram=st.booleans(),
    lag=st.integers(0, 2000),
)


def linked(rates: st.SearchStrategy[Rates]) -> st.SearchStrategy[list[Candidate]]:
    one = st.builds(
        Candidate,
        node=st.sampled_from("abcdef"),
        queue_s=seconds,
        rates=rates,
        pressure=st.floats(0, 1),
        warned=st.booleans(),
        n_agents=st.integers(0, 9),
        links=links,
        prefixes=prefixes,
    )
    return st.lists(one, min_size=1, max_size=6, unique_by=lambda c: c.node)


prefix = st.sampled_from(["", "p", "q"])
partly = st.one_of(deep_rates, maybe_rates)


@pytest.mark.slow
@settings(max_examples=400)
@given(tokens, tokens, far_locations, linked(partly), prefix)
def test_the_best_number_of_rows_to_bring_is_found_among_all(
    new: int, reply: int, location: Location, ready: list[Candidate], digest: str
) -> None:
    """No whole number of blocks, shipped or shared, beats the estimate's own choice; and that is
    never worse than bringing all or prefilling all."""
    placement = place(new, reply, location, ready, FREE, digest)
    for candidate, known in filled(ready):
        best = of(placement, candidate.node)
        owner = location.node == candidate.node
        assert best.memory_s <= min(best.bring_s, best.prefill_s)
        if not location.tokens or (owner and location.in_ram):
            continue
        _, way = placement_module.way(
            candidate.links, location, owner=owner, moves=not owner and location.node is not None
        )
        shared = min(candidate.prefixes.get(digest, 0), location.tokens)
        end = location.tokens + new
        for kept in [0, *range(256, location.tokens, 256), location.tokens]:
            assert best.memory_s <= kept_s(known, way, shared, kept, end) * (1 + 1e-9)


@pytest.mark.slow
@settings(max_examples=600)
@given(tokens, tokens, far_locations, linked(partly), prefix, st.sampled_from(["soft", "hard"]))
def test_a_fleet_decides_as_one_comparison_after_the_other(
    new: int,
    reply: int,
    location: Location,
    ready: list[Candidate],
    digest: str,
    affinity: Affinity,
) -> None:
    fleet = Fleet(CONFIG)
    for candidate in ready:
        fleet.reported(candidate)
    chosen = fleet.choose(new, reply, location, None, digest, affinity)
    plain = place(new, reply, location, ready, CONFIG, digest, affinity)
    assert (chosen.node, chosen.action) == (plain.node, plain.action)
    assert chosen.restore_tokens == plain.restore_tokens
    for found in chosen.estimates:
        if plain.of(found.node) is not None:
            assert found == plain.of(found.node)


@pytest.mark.slow
@given(tokens, tokens, far_locations, linked(deep_rates), prefix, st.data())
def test_a_fleet_remembers_what_changed_since_the_last_report(
    new: int,
    reply: int,
    location: Location,
    ready: list[Candidate],
    digest: str,
    data: st.DataObject,
) -> None:
    """Promises, counts of agents, reports and losses, in any order, between decisions."""
    fleet = Fleet(CONFIG)
    now = {c.node: replace(c, n_agents=0) for c in ready}
    for candidate in now.values():
        fleet.reported(candidate)
    for _ in range(data.draw(st.integers(1, 6))):
        node = data.draw(st.sampled_from(sorted(now)))
        what = data.draw(st.sampled_from(["promise", "owns", "report", "lose"]))
        if what == "promise":
            wait = data.draw(seconds)
            fleet.promise(node, wait)
            now[node] = replace(now[node], queue_s=now[node].queue_s + wait)
        elif what == "owns":
            n = data.draw(st.integers(0, 12))
            fleet.owns(node, n)
            now[node] = replace(now[node], n_agents=n)
        elif what == "report":
            told = {"pressure": data.draw(st.floats(0, 1)), "warned": data.draw(st.booleans())}
            held = data.draw(prefixes)
            now[node] = replace(now[node], queue_s=data.draw(seconds), prefixes=held, **told)
            fleet.reported(now[node])
        elif len(now) > 1:
            fleet.lost(node)
            del now[node]
        chosen = fleet.choose(new, reply, location, None, digest)
        plain = place(new, reply, location, list(now.values()), CONFIG, digest)
        assert chosen.estimates[0] == plain.estimates[0]


def test_among_some_of_a_fleet() -> None:
    fleet = Fleet(CONFIG)
    for name, wait in (("a", 0.0), ("b", 1.0), ("c", 2.0)):
        fleet.reported(candidate(name, wait))
    assert fleet.choose(10, 10, Location(), ["c", "b"]).node == "b"
    assert fleet.choose(10, 10, Location("a", 500, True), ["c", "b"], "", "hard").node == "b"
    with pytest.raises(NoReplica):
        fleet.choose(10, 10, Location(), [])
    with pytest.raises(NoReplica):
        Fleet(CONFIG).choose(10, 10, Location())


# ---- monotone in every cost


def worse(c: Candidate, cost: str, factor: float) -> Candidate:
    if cost in ("store", "disk", *PEERS):
        if cost not in c.links:
            return c
        old = c.links[cost]
        slow = LinkCost(old.fixed_s * factor, old.token_s * factor)
        return replace(c, links={**c.links, cost: slow})
    if cost == "depth":
        return replace(c, rates=replace(c.rates, depth_s=c.rates.filled().depth_s * factor))
    if cost == "prefix":
        return replace(c, prefixes={})
    return dearer(c, cost, factor)


every_cost = st.sampled_from(
    [
        "queue", "pressure", "prefill", "decode", "restore", "store", "disk", "depth", "prefix",
        *PEERS,
    ]
)  # fmt: skip
with_store = linked(deep_rates).map(
    lambda ready: [replace(c, links={"store": LinkCost(0.01, 1e-4), **c.links}) for c in ready]
)


@pytest.mark.slow
@settings(max_examples=400)
@given(tokens, tokens, far_locations, with_store, prefix, every_cost, st.floats(1, 100))
def test_a_rising_cost_chooses_nobody_and_a_falling_one_unseats_nobody(
    new: int,
    reply: int,
    location: Location,
    ready: list[Candidate],
    digest: str,
    cost: str,
    factor: float,
) -> None:
    cheap = place(new, reply, location, ready, CONFIG, digest).node
    for one in ready:
        dear = [worse(c, cost, factor) if c is one else c for c in ready]
        now = place(new, reply, location, dear, CONFIG, digest).node
        assert now == cheap or cheap == one.node  # who was not chosen is not chosen for it …
        if now == one.node:
            assert cheap == one.node  # … and who is chosen stays chosen at a lower cost


@pytest.mark.slow
@given(tokens, tokens, far_locations, with_store, st.integers(0, 2000))
def test_what_the_store_lacks_makes_no_way_cheaper_and_is_not_the_owners_business(
    new: int, reply: int, location: Location, ready: list[Candidate], more: int
) -> None:
    before = place(new, reply, location, ready, CONFIG)
    lags = replace(location, lag=location.lag + more)
    after = place(new, reply, lags, ready, CONFIG)
    for c in ready:
        if c.node == location.node or location.node is None:
            assert of(after, c.node) == of(before, c.node)
        else:
            assert of(after, c.node).bring_s >= of(before, c.node).bring_s
    if before.node == location.node:
        assert after.node == before.node


# ---- affinity, prefixes, links


def test_hard_affinity_never_moves_while_the_owner_is_there() -> None:
    ready = [candidate("a", 500.0), candidate("b")]
    at_home = Location("a", 1000, True)
    assert place(10, 10, at_home, ready, CONFIG).node == "b"
    assert place(10, 10, at_home, ready, CONFIG, affinity="hard").node == "a"
    assert place(10, 10, at_home, ready[1:], CONFIG, affinity="hard").node == "b"
    assert place(10, 10, Location(), ready, CONFIG, affinity="hard").node == "b"


def test_a_new_agent_goes_where_its_system_prompt_is() -> None:
    ready = [candidate("a"), candidate("b", prefixes={"p": 1024})]
    placement = place(1100, 10, Location(), ready, CONFIG, "p")
    best = placement.estimates[0]
    assert (best.node, best.action, best.kept) == ("b", "share", 1024)
    assert placement.restore_tokens is None
    assert of(placement, "a").memory_s - best.memory_s == pytest.approx(1024 / 200 - 1024 / 10_000)
    assert place(1100, 10, Location(), ready, CONFIG, "q").node == "a"


def test_behind_a_slow_link_the_shared_part_is_kept_and_the_rest_prefilled() -> None:
    slow = {"store": LinkCost(0.1, 0.05)}
    ready = [candidate("a", links=slow, prefixes={"p": 2048})]
    placement = place(10, 10, Location(None, 4000), ready, CONFIG, "p")
    best = placement.estimates[0]
    assert (placement.action, placement.restore_tokens) == ("mixed", 2048)
    assert best.mixed_s < min(best.bring_s, best.prefill_s)


def test_rows_are_shipped_while_shared_ones_are_loaded() -> None:
    """Shipping alone would be dearer than prefilling, but is free while the prefix is loaded."""
    slow_to_load = Rates(1000.0, 0.02, 4000.0, 2.0)
    ready = [
        candidate(
            "a",
            rates=slow_to_load,
            links={"store": LinkCost(0.0, 1.05e-3)},
            prefixes={"p": 8192},
        )
    ]
    placement = place(10, 10, Location(None, 16_384), ready, CONFIG, "p")
    assert placement.action == "mixed"
    assert placement.restore_tokens is not None
    assert 8192 < placement.restore_tokens < 16_384
    assert placement.restore_tokens % 256 == 0


def test_an_owner_reads_its_own_disk_and_a_mover_the_nearer_of_store_and_peer() -> None:
    near, far = LinkCost(0.0, 1e-4), LinkCost(0.0, 4e-3)
    fast = Rates(200.0, 0.02, 1e6, 2.0)
    a = candidate("a", rates=fast, links={"store": far, "disk": near})
    peers = {peer_link("a"): LinkCost(0.3, 2e-4), peer_link("c"): LinkCost(0.0, 1e-6)}
    b = candidate("b", rates=fast, links={"store": far, "disk": near, **peers})
    at_a = place(200, 0, Location("a", 1000), [a, b], FREE)
    assert of(at_a, "a").bring_s == pytest.approx(1.0 + 0.1)
    assert of(at_a, "b").bring_s == pytest.approx(1.0 + 0.5)
    assert (of(at_a, "a").link, of(at_a, "b").link) == ("disk", peer_link("a"))
    nearby = replace(b, links={**b.links, "store": LinkCost(0.0, 1e-6)})
    assert of(place(200, 0, Location("a", 1000), [a, nearby], FREE), "b").link == "store"
    lags = place(200, 0, Location("a", 1000, lag=1), [a, nearby], FREE)
    assert of(lags, "b").link == peer_link("a")  # nobody can say when the store has all
    nowhere = place(200, 0, Location(None, 1000), [a, b], FREE)
    assert of(nowhere, "a").bring_s == of(nowhere, "b").bring_s == pytest.approx(1.0 + 4.0)


def test_an_agent_that_lags_comes_from_its_owners_disk_however_dear_that_link_is() -> None:
    """An exception to the cheapest way: the upload that the store's way would wait for has no
    price, for the store may take nothing at all. Where prefilling is cheaper, that is done."""
    store, dear = LinkCost(0.0, 1e-6), LinkCost(0.0, 1e-2)
    links, lags = {"store": store, peer_link("a"): dear}, Location("a", 1000, lag=1)
    for location, way in ((replace(lags, lag=0), ("store", store)), (lags, (peer_link("a"), dear))):
        assert placement_module.way(links, location, owner=False, moves=True) == way
        assert placement_module.over_peer(links, location) == (way[1] is dear)
    ready = [candidate("a", 500.0), candidate("b", links=links)]
    assert place(200, 0, replace(lags, lag=0), ready, FREE).estimates[0].action == "migrate"
    best = place(200, 0, lags, ready, FREE).estimates[0]
    assert (best.node, best.action) == ("b", "prefill")
    assert best.prefill_s < best.bring_s == pytest.approx(1.0 + 10.0)


def test_what_the_owner_has_to_upload_first_is_a_cost_of_moving() -> None:
    ready = [candidate("a"), candidate("b", links={"store": LinkCost(0.0, 1e-3)})]
    stored = of(place(200, 0, Location("a", 1000), ready, CONFIG), "b")
    lags = of(place(200, 0, Location("a", 1000, False, 400), ready, CONFIG), "b")
    assert lags.bring_s - stored.bring_s == pytest.approx(0.4)


def test_a_deep_token_costs_more_than_a_shallow_one() -> None:
    rates = Rates(400.0, 0.02, 1e5, 2.0, 3e-7).filled()
    first, later = rates.prefill_s(0, 1024), rates.prefill_s(7168, 8192)
    assert later - first == pytest.approx(1024 * 7168 * 3e-7)
    assert rates.prefill_s(0, 8192) == pytest.approx(
        sum(rates.prefill_s(n, n + 1024) for n in range(0, 8192, 1024))
    )


def test_prefills_at_several_depths_tell_what_depth_costs() -> None:
    measured = Rates()
    measured.prefill(512, 512 * (0.0025 + 3e-7 * 256), 256)
    assert measured.prefill_tokens_per_s == pytest.approx(1 / (0.0025 + 3e-7 * 256))
    assert measured.depth_s == 0
    for depth in (256, 1000, 4000, 2000, 256):
        measured.prefill(512, 512 * (0.0025 + 3e-7 * depth), depth)
    assert measured.depth_s == pytest.approx(3e-7, rel=0.01)
    assert measured.prefill_tokens_per_s == pytest.approx(400, rel=0.01)
    for _ in range(50):  # nothing deep for a while: the slope is remembered
        measured.prefill(512, 512 * (0.0025 + 3e-7 * 256), 256)
    assert measured.depth_s == pytest.approx(3e-7, rel=0.05)


def test_a_slow_restore_from_elsewhere_says_nothing_about_loading() -> None:
    measured = Rates()
    measured.restore(1000, 1.0, from_ram=True)
    measured.restore(1000, 100.0, from_ram=False)
    assert measured.restore_tokens_per_s == 1000
    measured.restore(1000, 0.5, from_ram=False)
    assert measured.restore_tokens_per_s is not None
    assert measured.restore_tokens_per_s > 1000
