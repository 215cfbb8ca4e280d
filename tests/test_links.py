"""How fast bytes come is learned from the reads themselves."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.card import BlockRef, PartRef
from storage.codec import encode_rows, get_codec, row_bytes, tensor_bytes
from storage.errors import StoreUnavailable
from storage.links import PROBE_BYTES, Line, Link, probe_link
from storage.store import CacheStore
from storage.tiers import Tiers
from tests.store_contract import AGENT, SPEC, sample_rows

MB = 1 << 20
Q4 = get_codec("q4")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def read(link: Link, clock: Clock, size: int, seconds: float) -> None:
    def fetch() -> bytes:
        clock.now += seconds
        return bytes(size)

    assert link.timed(fetch) is not None


@given(st.floats(0.001, 0.1), st.floats(1e6, 1e9), st.integers(0, 50))
def test_fixed_cost_and_rate_are_told_apart_by_reads_of_different_sizes(
    fixed_s: float, bytes_per_s: float, seed: int
) -> None:
    clock = Clock()
    link = Link(clock)
    for n in range(40):
        size = MB * (1 + (seed + 7 * n) % 8)
        read(link, clock, size, fixed_s + size / bytes_per_s)
    rate = link.rate
    assert rate is not None
    told = rate.fixed_s + 4 * MB / rate.bytes_per_s
    assert told == pytest.approx(fixed_s + 4 * MB / bytes_per_s, rel=0.01)


def test_one_read_across_an_outage_does_not_make_a_slow_link() -> None:
    clock = Clock()
    link = Link(clock)
    for _ in range(20):
        read(link, clock, MB, 0.01)
    read(link, clock, MB, 30.0)
    assert link.seconds(MB) < 0.02
    for _ in range(20):  # this is one
        read(link, clock, MB, 1.0)
    assert link.seconds(MB) > 0.5


def test_the_first_estimate_is_the_fastest_of_three_reads() -> None:
    clock = Clock()
    link = Link(clock)
    times = iter([3.0, 0.1, 0.5])

    def fetch() -> bytes:
        clock.now += next(times)
        return bytes(MB)

    link.probe(fetch)
    assert link.seconds(MB) == pytest.approx(0.1)


def test_one_size_alone_is_a_rate_without_a_fixed_cost() -> None:
    clock = Clock()
    link = Link(clock)
    assert link.rate is None
    read(link, clock, MB, 0.5)
    rate = link.rate
    assert rate is not None
    assert (rate.fixed_s, rate.bytes_per_s) == (0.0, pytest.approx(2 * MB))


def test_reads_that_share_a_link_add_up() -> None:
    """Two at a time, each twice as long: the link is as fast as before."""
    clock = Clock()
    link = Link(clock)

    def first() -> bytes:
        def second() -> bytes:  # begins and ends while the first one runs
            clock.now += 1.0
            return bytes(MB)

        link.timed(second)
        clock.now += 1.0
        return bytes(MB)

    link.timed(first)
    rate = link.rate
    assert rate is not None
    assert rate.bytes_per_s == pytest.approx(MB)


def test_a_link_that_becomes_slower_is_noticed() -> None:
    clock = Clock()
    link = Link(clock)
    for _ in range(30):
        read(link, clock, MB, 0.01)
    for _ in range(60):
        read(link, clock, MB, 0.1)
    rate = link.rate
    assert rate is not None
    assert rate.bytes_per_s == pytest.approx(10 * MB, rel=0.1)


def test_what_is_missing_or_tiny_measures_nothing() -> None:
    link = Link()
    assert link.timed(lambda: None) is None
    assert link.timed(lambda: b"x") == b"x"
    with pytest.raises(StoreUnavailable):
        link.timed(lambda: (_ for _ in ()).throw(StoreUnavailable("u", "gone")))
    assert link.rate is None


def test_a_line_that_is_flat_at_first_needs_a_spread() -> None:
    line = Line(100.0, flat=True)
    assert line.fit() is None
    line.measure(50.0, 2.0)
    line.measure(60.0, 2.0)
    assert line.fit() == (pytest.approx(2.0), 0.0)


def test_noise_does_not_draw_a_line_down() -> None:
    draw, off = random.Random(5), []
    for _ in range(60):
        line = Line(10.0, flat=True)
        for _ in range(80):
            x = draw.uniform(0, 1000)
            line.measure(x, (2.0 + x / 500) * draw.lognormvariate(0, 0.2))
        fit = line.fit()
        assert fit is not None
        off.append((fit[0] + 500 * fit[1]) / 3.0)
    assert 0.99 < sum(off) / len(off) < 1.05  # the noise's own mean is 1.02


def test_the_probe_measures_and_leaves_nothing(tmp_path: Path) -> None:
    store, link = CacheStore(tmp_path.as_uri()), Link()
    probe_link(link, store.files)
    assert link.rate is not None
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert PROBE_BYTES == 1 << 20


def test_reads_of_tiers_measure_their_link(tmp_path: Path) -> None:
    store = CacheStore(tmp_path.as_uri())
    tiers = Tiers(store, SPEC, Q4, pool_bytes=0)
    rows = encode_rows(SPEC, Q4, sample_rows(16))
    part = tiers.write(AGENT, "0" * 64, "full", rows)
    assert isinstance(part, PartRef)
    assert tiers.link_rates() == {}
    assert tiers.read(
        AGENT.tenant, "0" * 64, 16, "full", None, BlockRef("0" * 64, 16, {"full": part})
    )
    assert set(tiers.link_rates()) == {"store"}


@pytest.mark.parametrize("codec", ["q4", "k8v4", "q8", "f16"])
def test_bytes_of_a_row_are_those_of_its_tensors(codec: str) -> None:
    rows = encode_rows(SPEC, get_codec(codec), sample_rows(16))
    assert 16 * row_bytes(SPEC, get_codec(codec)) == tensor_bytes(rows)
