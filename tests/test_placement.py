"""Placement: the least expected time wins, ties and small gains keep the owner."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from actors.rates import Rates
from cluster.errors import NoReplica
from cluster.placement import Candidate, Location, PlacementConfig, place

CONFIG = PlacementConfig()
NODES = ("n0", "n1", "n2", "n3")


def candidate(node: str = "n0", **values: object) -> Candidate:
    fields: dict[str, object] = {
        "queue_s": 0.0, "rates": Rates(), "pressure": 0.0, "n_agents": 0,
    }  # fmt: skip
    return Candidate(node=node, **(fields | values))  # type: ignore[arg-type]


rates = st.builds(
    Rates,
    prefill_tokens_per_s=st.floats(10, 5000),
    decode_step_s=st.floats(0.001, 0.2),
    restore_tokens_per_s=st.floats(100, 1e6),
    turn_s=st.floats(0.01, 60),
)
candidates = st.lists(
    st.sampled_from(NODES), min_size=1, max_size=4, unique=True
).flatmap(
    lambda names: st.tuples(
        *(
            st.builds(
                Candidate,
                node=st.just(name),
                queue_s=st.floats(0, 60),
                rates=rates,
                pressure=st.floats(0, 1),
                n_agents=st.integers(0, 50),
            )
            for name in names
        )
    )
)  # fmt: skip
locations = st.builds(
    Location,
    node=st.one_of(st.none(), st.sampled_from(NODES)),
    tokens=st.integers(0, 100_000),
    in_ram=st.booleans(),
)
tokens = st.integers(16, 10_000)


@given(tokens, tokens, locations, candidates)
def test_nobody_is_better_than_the_chosen_one(
    new: int, reply: int, location: Location, found: tuple[Candidate, ...]
) -> None:
    placement = place(new, reply, location, found, CONFIG)
    assert placement.node == placement.estimates[0].node
    assert placement.action == placement.estimates[0].action
    best = placement.estimates[0].total_s
    assert all(best <= other.total_s + 0.001 for other in placement.estimates)
    assert {e.node for e in placement.estimates} == {c.node for c in found}
    assert all(e.total_s >= 0 for e in placement.estimates)


@given(tokens, tokens, locations, candidates, st.randoms(use_true_random=False))
def test_the_order_of_the_candidates_does_not_matter(
    new: int, reply: int, location: Location, found: tuple[Candidate, ...], random: object
) -> None:
    mixed = list(found)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    assert place(new, reply, location, mixed, CONFIG) == place(new, reply, location, found, CONFIG)


@given(tokens, tokens, locations, candidates, st.data())
def test_a_dearer_replica_is_not_chosen_for_that(
    new: int, reply: int, location: Location, found: tuple[Candidate, ...], data: st.DataObject
) -> None:
    """Monotone: raise one cost of a replica that was not chosen, and it is not chosen either; its
    total does not fall."""
    placement = place(new, reply, location, found, CONFIG)
    victim = data.draw(st.sampled_from(found))
    assume(victim.node != placement.node)
    change = data.draw(st.sampled_from(["queue", "prefill", "decode", "restore", "full"]))
    factor = data.draw(st.floats(1, 10))
    r = victim.rates
    dearer = {
        "queue": replace(victim, queue_s=victim.queue_s * factor),
        "prefill": replace(
            victim, rates=replace(r, prefill_tokens_per_s=r.prefill_tokens_per_s / factor)
        ),
        "decode": replace(victim, rates=replace(r, decode_step_s=r.decode_step_s * factor)),
        "restore": replace(
            victim, rates=replace(r, restore_tokens_per_s=r.restore_tokens_per_s / factor)
        ),
        "full": replace(victim, pressure=min(1.0, victim.pressure * factor)),
    }[change]
    changed = [dearer if c is victim else c for c in found]
    after = place(new, reply, location, changed, CONFIG)
    assert after.node == placement.node

    def total(p: object) -> float:
        return next(e.total_s for e in p.estimates if e.node == victim.node)  # type: ignore[attr-defined]

    assert total(after) >= total(placement) - 1e-9


@given(tokens, tokens, st.integers(0, 10_000), st.booleans(), st.sampled_from(NODES))
def test_a_tie_keeps_the_owner(new: int, reply: int, held: int, in_ram: bool, owner: str) -> None:
    equal = [candidate(node, n_agents=0 if node != owner else 9) for node in NODES]
    location = Location(owner, held, in_ram)
    assert place(new, reply, location, equal, CONFIG).node == owner
    free = PlacementConfig(hysteresis_s=0, migrate_s=0)
    assert place(new, reply, location, equal, free).node == owner


def test_equal_replicas_share_new_agents() -> None:
    found = [candidate("n0", n_agents=3), candidate("n1", n_agents=1), candidate("n2", n_agents=2)]
    assert place(100, 100, Location(), found, CONFIG).node == "n1"


@pytest.mark.parametrize("in_ram", [True, False])
def test_an_agent_moves_only_for_more_than_the_hysteresis(in_ram: bool) -> None:
    location = Location("n0", 1000, in_ram)
    known = Rates().filled()
    load = 1000 / known.restore_tokens_per_s
    turn = load + CONFIG.migrate_s + 16 / known.prefill_tokens_per_s + 100 * known.decode_step_s
    cost = CONFIG.hysteresis_s + CONFIG.hysteresis * turn + CONFIG.migrate_s
    cost += load if in_ram else 0
    for queue, node in ((cost - 0.01, "n0"), (cost + 0.01, "n1")):
        found = [candidate("n0", queue_s=queue), candidate("n1")]
        assert place(16, 100, location, found, CONFIG).node == node


def test_bringing_or_prefilling_whichever_is_less() -> None:
    slow_disk = candidate("n1", rates=Rates(restore_tokens_per_s=100))
    assert place(16, 1, Location(None, 1000), [slow_disk], CONFIG).action == "prefill"
    assert place(16, 1, Location(None, 1000), [candidate("n1")], CONFIG).action == "load"
    assert place(16, 1, Location("n1", 1000, True), [slow_disk], CONFIG).action == "stay"
    assert place(16, 1, Location("n0", 1000, True), [candidate("n1")], CONFIG).action == "migrate"
    assert place(16, 1, Location(), [candidate("n1")], CONFIG).action == "prefill"


def test_the_sum_of_an_estimate() -> None:
    found = candidate("n1", queue_s=3.0, pressure=0.5, rates=Rates(100, 0.01, 1000, 1))
    (estimate,) = place(50, 20, Location("n0", 500, True), [found], CONFIG).estimates
    assert estimate.queue_s == 3.0
    assert estimate.bring_s == pytest.approx(0.5 + 0.5 + CONFIG.migrate_s)
    assert estimate.prefill_s == pytest.approx(0.5 + 5.0)
    assert estimate.decode_s == pytest.approx(0.2)
    leaving = CONFIG.hysteresis_s + CONFIG.hysteresis * (1.2 + 0.2)
    assert estimate.extra_s == pytest.approx(0.5 * CONFIG.pressure_s + leaving)
    assert estimate.total_s == pytest.approx(3.0 + 1.2 + 0.2 + estimate.extra_s)


def test_rates_that_nobody_has_measured_move_nobody() -> None:
    """A replica that has just started is taken to be as fast as its peers."""
    measured = candidate("n1", rates=Rates(1000.0, 0.005, 50_000.0, 1.0))
    fresh = candidate("n0")
    assert place(500, 128, Location("n0", 2000, True), [fresh, measured], CONFIG).node == "n0"
    assert place(500, 128, Location("n0", 2000, False), [fresh, measured], CONFIG).node == "n0"
    assert place(500, 128, Location(), [replace(measured, n_agents=1), fresh], CONFIG).node == "n0"


def test_without_candidates_there_is_no_replica() -> None:
    with pytest.raises(NoReplica) as caught:
        place(1, 1, Location(), [], CONFIG)
    assert caught.value.retry_after > 0
