"""Placement: the least total wins, and the owner keeps what is close."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.rates import KnownRates, Rates
from cluster.errors import NoReplica
from cluster.placement import Candidate, Estimate, Location, Placement, PlacementConfig, place

CONFIG = PlacementConfig()
FREE = PlacementConfig(hysteresis_s=0.0, hysteresis=0.0, migrate_s=0.0, pressure_s=0.0)
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
