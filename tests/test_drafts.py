"""Prompt lookup, acceptance, and the choice of how many drafts a step carries. No engine."""

import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.drafts import Acceptance, Drafting, NGrams
from actors.payoff import Offer, Payoff, StepTimes


def looked_up(tokens: list[int], k: int, least: int = 2, most: int = 4) -> tuple[list[int], int]:
    """The same by scanning: the longest end of `tokens` that occurs before, and there the last."""
    for size in range(most, least - 1, -1):
        for at in range(len(tokens) - 1, size - 1, -1):
            if tokens[at - size : at] == tokens[-size:]:
                ids = list(tokens)
                for _ in range(k):
                    ids.append(ids[at + len(ids) - len(tokens)])
                return ids[len(tokens) :], size
    return [], 0


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 9),
)
def test_the_longest_match_counts_and_of_equal_ones_the_last(
    tokens: list[int], k: int, least: int, step: int
) -> None:
    ngrams = NGrams(least, least + 2)
    for stop in range(0, len(tokens) + step, step):  # as a reply grows
        assert ngrams.follow(tokens[:stop])
    assert ngrams.draft(tokens, k) == looked_up(tokens, k, least, least + 2)


def test_what_followed_is_drafted() -> None:
    ngrams, tokens = NGrams(), [1, 2, 3, 4, 5, 6, 7, 9, 2, 3, 4]
    ngrams.follow(tokens)
    assert ngrams.draft(tokens, 3) == ([5, 6, 7], 3)
    assert ngrams.draft([*tokens, 99, 98], 3) == ([], 0)


def test_a_loop_is_drafted_further_than_it_has_gone() -> None:
    ngrams, tokens = NGrams(), [9, 1, 2, 3, 1, 2, 3]
    ngrams.follow(tokens)
    assert ngrams.draft(tokens, 7) == ([1, 2, 3, 1, 2, 3, 1], 3)


def test_a_long_prompt_is_taken_in_a_share_at_a_time() -> None:
    ngrams, tokens = NGrams(), [random.Random(1).randrange(50) for _ in range(5000)]
    shares = 0
    while not ngrams.follow(tokens, 1000):
        shares += 1
    assert shares == 4
    assert ngrams.draft(tokens, 4) == looked_up(tokens, 4)


def test_a_step_costs_the_same_after_many_tokens() -> None:
    class Counting(list[int]):
        read = 0

        def __getitem__(self, at):  # type: ignore[no-untyped-def]
            Counting.read += len(range(*at.indices(len(self)))) if isinstance(at, slice) else 1
            return super().__getitem__(at)

    def cost(n: int) -> int:
        rng = random.Random(2)
        tokens = Counting(rng.randrange(20) for _ in range(n))
        ngrams = NGrams()
        while not ngrams.follow(tokens):
            pass
        Counting.read = 0
        for _ in range(50):
            tokens.append(rng.randrange(20))
            ngrams.follow(tokens)
            ngrams.draft(tokens, 4)
        return Counting.read

    assert cost(30_000) <= cost(300) + 50


def test_acceptance_follows_what_is_seen() -> None:
    acceptance = Acceptance(0.5)
    for _ in range(40):
        acceptance.record(3, 1)
    assert 0.7 < acceptance.rate < 0.8
    for _ in range(60):
        acceptance.record(0, 1)
    assert acceptance.rate < 0.05


@pytest.mark.parametrize(
    ("became", "expected"),
    [([5, 6, 7], (3, 0)), ([5, 6, 9], (2, 1)), ([8], (0, 1)), ([5], (1, 0)), ([], (0, 0)),
     ([5, 6, 7, 8], (3, 0))],
)  # fmt: skip
def test_a_guess_is_checked_whether_it_was_sent_or_not(
    became: list[int], expected: tuple[int, int]
) -> None:
    drafting = Drafting(guess=[5, 6, 7], n_tokens=2)
    assert drafting.check([1, 2, *became]) == expected
    assert drafting.check([1, 2, *became]) == (0, 0)  # once


# ---- whether drafts pay

Cost = Callable[[int, int], float]  # (sequences, drafted tokens) -> seconds


def free(_: int, x: int) -> float:
    """The weights are read once for all tokens of a step."""
    return 10.0 + 0.1 * x


def linear(d: int, x: int) -> float:
    """Every token costs the same."""
    return 1.0 + d + x


def steep(d: int, x: int) -> float:
    """Free to four tokens, as kernels for small batches are, then dear."""
    return 10.0 + max(0, d + x - 4) * 8.0


def serve(
    payoff: Payoff, cost: Cost, rates: list[float], steps: int = 3000, most: int = 8
) -> tuple[float, float, int]:
    """(tokens/s without drafts, tokens/s, drafts) of a fake engine with a fake clock."""
    rng, tokens, seconds, drafted = random.Random(3), 0, 0.0, 0
    d = len(rates)
    for _ in range(steps):
        counts = payoff.choose([Offer(rate, most, rate) for rate in rates])
        x = sum(counts)
        took = cost(d, x) * rng.uniform(0.98, 1.02)
        payoff.measure(d, x, took)
        seconds, drafted = seconds + took, drafted + x
        for rate, k in zip(rates, counts, strict=True):
            tokens += 1
            while k and rng.random() < rate:
                tokens, k = tokens + 1, k - 1
    return d / cost(d, 0), tokens / seconds, drafted


def test_free_drafts_that_are_right_pay() -> None:
    plain, speed, _ = serve(Payoff(0), free, [0.9])
    assert speed > 4 * plain


@pytest.mark.parametrize(
    ("cost", "rates"),
    [(linear, [0.9] * 8), (linear, [0.5]), (free, [0.01]), (steep, [0.5] * 4), (free, [0.0, 0.0])],
)
def test_drafts_that_do_not_pay_are_left_out(cost: Cost, rates: list[float]) -> None:
    """At most one step in fifty is a trial, and trials get rarer."""
    plain, speed, drafted = serve(Payoff(0), cost, rates)
    assert speed > 0.98 * plain
    assert drafted < 3000 / 50 * 8


def test_as_many_as_pay_and_no_more() -> None:
    payoff = Payoff(0)
    plain, speed, _ = serve(payoff, steep, [0.8])
    assert speed > 1.8 * plain
    assert payoff.best([Offer(0.8, 8)]) == [3]  # four tokens cost as much as one


def test_the_likelier_sequence_gets_more() -> None:
    payoff = Payoff(0)
    for x in range(17):
        payoff.measure(2, x, steep(2, x) - 6 * (x == 16))
    a, b = payoff.best([Offer(0.95, 8), Offer(0.6, 8)])
    assert a > b


def test_nobody_is_slowed_down_for_another_one() -> None:
    """One sequence's drafts would make a step three times as long; the other one has none."""
    payoff = Payoff(0)
    payoff.measure(2, 0, 1.0)
    payoff.measure(2, 8, 3.0)
    assert payoff.best([Offer(1.0, 8)] * 2) == [8, 8]
    assert payoff.best([Offer(1.0, 8), Offer(0.0, 0)]) == [0, 0]


def test_the_bound_of_a_step_counts_drafts() -> None:
    payoff = Payoff(0.25)
    for x in (0, 16):
        payoff.measure(2, x, 0.2 + 0.01 * x)
        payoff.measure(1, x, 0.2 + 0.01 * x)
    assert sum(payoff.best([Offer(0.99, 8)] * 2)) == 5
    assert payoff.best([Offer(0.99, 16)]) == [16]  # alone there is nobody to wait


def test_one_slow_step_decides_nothing() -> None:
    payoff = Payoff(0)
    serve(payoff, free, [0.9], steps=200)
    payoff.measure(1, 8, 1000.0)
    assert payoff.best([Offer(0.9, 8)]) == [8]


def test_an_engine_that_changes_is_noticed() -> None:
    payoff = Payoff(0)
    serve(payoff, linear, [0.4], steps=500)
    assert payoff.best([Offer(0.4, 8)]) == [0]
    plain, speed, _ = serve(payoff, free, [0.4], steps=20_000)
    assert speed > 1.4 * plain
    serve(payoff, linear, [0.4], steps=1500)
    assert payoff.best([Offer(0.4, 8)]) == [0]


def test_the_time_of_a_draft_model_counts() -> None:
    payoff = Payoff(0)
    for x in range(9):
        payoff.measure(1, x, 1.0)
    assert payoff.best([Offer(0.8, 8)]) == [8]
    payoff.draft_s = 0.3
    assert 0 < payoff.best([Offer(0.8, 8)])[0] < 8
    payoff.draft_s = 1.0
    assert payoff.best([Offer(0.8, 8)]) == [0]


def test_times_lie_between_those_measured() -> None:
    times = StepTimes()
    assert times.of(1, 0) is None
    times.measure(1, 4, 3.0)
    assert times.of(1, 4) is None  # nothing to compare with
    times.measure(1, 0, 1.0)
    assert [times.of(1, x) for x in (0, 2, 4, 9)] == [1.0, 2.0, 3.0, 3.0]
    assert times.of(2, 0) is None


def test_nothing_is_looked_up_in_vain() -> None:
    """32K ids of a prompt cost a moment, once."""
    rng, ngrams = random.Random(4), NGrams()
    tokens = [rng.randrange(50_000) for _ in range(32_768)]
    began = time.perf_counter()
    while not ngrams.follow(tokens):
        pass
    assert time.perf_counter() - began < 5
