"""The sampler chain: its draws, each step against llama.cpp's own, penalties, log probabilities."""

import ctypes
import math
from collections.abc import Sequence as Ids
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.fake_engine import FakeVocab
from actors.errors import InvalidRequest
from actors.sampling import Sampler, check, sample, truncated
from actors.turn import SamplingParams


def logits_of(seed: int, n: int = 1000, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


class WideVocab(FakeVocab):
    """As many tokens as a test likes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size


def sampler(
    prompt: Ids[int] = (), reply: Ids[int] = (), *, size: int = 1000, **params: Any
) -> Sampler:
    return Sampler(SamplingParams(**params), WideVocab(size), prompt, reply)


def test_temperature_zero_is_greedy() -> None:
    for seed in range(20):
        logits = logits_of(seed)
        assert sample(logits, SamplingParams(temperature=0, seed=seed), seed) == logits.argmax()


def test_a_draw_depends_on_seed_position_and_logits_only() -> None:
    logits = logits_of(1)
    params = SamplingParams(temperature=1.0, seed=7)
    draws = [sample(logits, params, position) for position in range(50)]
    np.random.seed(3)  # the global state must not matter
    again = [sample(logits.copy(), params, position) for position in reversed(range(50))]
    assert draws == again[::-1]
    assert len(set(draws)) > 10
    other = [sample(logits, SamplingParams(temperature=1.0, seed=8), p) for p in range(50)]
    assert draws != other


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    n = 4000
    counts = np.bincount(
        [sample(logits, SamplingParams(temperature=1.0, seed=1), p) for p in range(n)], minlength=4
    )
    np.testing.assert_allclose(counts / n, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    colder = np.bincount(
        [sample(logits, SamplingParams(temperature=0.5, seed=1), p) for p in range(n)], minlength=4
    )
    p = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(colder / n, p / p.sum(), atol=0.03)


def nucleus(logits: np.ndarray, top_p: float) -> set[int]:
    """The plain definition; temperature comes later in the chain."""
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    chosen: set[int] = set()
    for token in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if sum(p[i] for i in chosen) >= top_p - 1e-6:
            break
        chosen.add(token)
    return chosen


@given(
    st.integers(0, 1000),
    st.sampled_from([2, 10, 300, 600]),
    st.floats(0.05, 0.99),
    st.sampled_from([0.3, 1.0, 2.0]),
)
def test_top_p_draws_from_the_nucleus_alone(
    seed: int, n: int, top_p: float, temperature: float
) -> None:
    logits = logits_of(seed, n, spread=0.5)
    allowed = nucleus(logits, top_p)
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    drawn = {sample(logits, params, position) for position in range(40)}
    assert drawn <= allowed | set(np.argsort(-logits, kind="stable")[: len(allowed) + 1].tolist())
    assert len(drawn - allowed) <= 1  # a sum of floats may end one token later


def test_top_p_reaches_the_whole_nucleus_of_a_flat_distribution() -> None:
    logits = np.zeros(600, np.float32)
    logits[300:] = -50
    params = SamplingParams(temperature=1.0, top_p=0.99, seed=3)
    drawn = {sample(logits, params, position) for position in range(3000)}
    assert drawn <= set(range(300))
    assert len(drawn) > 290


def test_a_tiny_top_p_is_greedy() -> None:
    for seed in range(20):
        logits = logits_of(seed)
        params = SamplingParams(temperature=1.5, top_p=1e-9, seed=seed)
        assert sample(logits, params, 3) == logits.argmax()


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 + 5, 2**200])
def test_any_integer_is_a_seed(seed: int) -> None:
    logits = logits_of(2)
    params = SamplingParams(temperature=1.0, seed=seed)
    assert sample(logits, params, 4) == sample(logits, params, 4)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-38, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = logits_of(2)
    assert sample(logits, SamplingParams(temperature=temperature, seed=1), 4) == logits.argmax()


# ---- the chain, step by step, as llama.cpp has it

PROMPT = [3, 3, 4, 5, 900]
REPLY = [4, 4, 4, 7, 8, 7, 901]


def distribution(logits: np.ndarray, made: Sampler) -> np.ndarray:
    """What `made` draws from."""
    logits = made.adjusted(logits)
    kept = truncated(logits, made.params)
    ids = np.arange(len(logits)) if kept is None else kept
    weights = np.exp((logits[ids] - logits[ids].max()).astype(np.float64) / made.params.temperature)
    p = np.zeros(len(logits))
    p[ids] = weights / weights.sum()
    return p


def theirs(
    logits: np.ndarray, params: SamplingParams, prompt: Ids[int], reply: Ids[int]
) -> np.ndarray:
    """llama.cpp's default chain; its one window of the past is made two, as vLLM counts."""
    llama = pytest.importorskip("llama_cpp")
    everything = [*prompt, *reply]
    repetition = llama.llama_sampler_init_penalties(
        len(logits), len(everything), params.repetition_penalty, 0, 0
    )
    counts = llama.llama_sampler_init_penalties(
        len(logits), len(reply), 1, params.frequency_penalty, params.presence_penalty
    )
    for token in everything:
        llama.llama_sampler_accept(repetition, token)
    for token in reply:
        llama.llama_sampler_accept(counts, token)
    bias = (llama.llama_logit_bias * max(len(params.logit_bias), 1))(*params.logit_bias)
    steps = [
        llama.llama_sampler_init_logit_bias(len(logits), len(params.logit_bias), bias),
        repetition,
        counts,
        llama.llama_sampler_init_top_k(params.top_k),
        llama.llama_sampler_init_top_p(params.top_p, 1),
        llama.llama_sampler_init_min_p(params.min_p, 1),
        llama.llama_sampler_init_temp(params.temperature),
    ]
    data = (llama.llama_token_data * len(logits))(
        *((i, float(logit), 0.0) for i, logit in enumerate(logits))
    )
    array = llama.llama_token_data_array(data, len(logits), -1, False)
    for step in steps:
        llama.llama_sampler_apply(step, ctypes.byref(array))
        llama.llama_sampler_free(step)
    left = [(array.data[i].id, array.data[i].logit) for i in range(array.size)]
    weights = np.exp(np.array([x for _, x in left]) - max(x for _, x in left))
    p = np.zeros(len(logits))
    p[[i for i, _ in left]] = weights / weights.sum()
    return p


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"top_k": 40},
        {"top_k": 1},
        {"top_k": 5000},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.8},
        {"logit_bias": ((5, 4.0), (9, -100.0))},
        {"top_k": 50, "top_p": 0.8, "temperature": 1.7},
        {"top_p": 0.95, "min_p": 0.1, "temperature": 0.5},
        {
            "top_k": 30, "top_p": 0.9, "min_p": 0.02, "temperature": 0.8,
            "repetition_penalty": 1.2, "presence_penalty": 0.6, "frequency_penalty": 0.3,
            "logit_bias": ((4, 6.0), (7, 3.0)),
        },
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_the_chain_is_llama_cpps(params: dict[str, Any], spread: float) -> None:
    for seed in range(4):
        logits = logits_of(seed, 3000, spread)
        made = sampler(PROMPT, REPLY, size=3000, **params)
        expected = theirs(logits, made.params, PROMPT, REPLY)
        got = distribution(logits, made)
        # llama.cpp sums in single precision: a nucleus may end one token earlier or later
        assert ((got > 0) != (expected > 0)).sum() <= (params.get("top_p", 1) < 1)
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_draws_of_the_whole_chain_follow_its_distribution() -> None:
    logits = logits_of(5, 60, 1.0)
    params = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.1, "seed": 3}
    made = sampler([1], [2, 2], size=60, repetition_penalty=1.2, presence_penalty=0.5, **params)
    n = 4000
    counts = np.bincount([made.draw(logits, position) for position in range(n)], minlength=60)
    expected = distribution(logits, made)
    assert not counts[expected == 0].any()
    np.testing.assert_allclose(counts / n, expected, atol=0.03)


def test_equal_logits_are_cut_in_the_order_of_their_ids() -> None:
    """Which of equal ones a partition leaves depends on the machine's vector instructions."""
    logits = np.zeros(5000, np.float32)
    logits[::2] = 1
    for params in (SamplingParams(top_k=100), SamplingParams(top_p=0.0292)):
        kept = truncated(logits, params)  # (2500 e + 2500) * 0.0292 is a bit less than 100 e
        assert kept is not None
        assert kept.tolist() == list(range(0, 200, 2))


# ---- what a sampler remembers


CHAIN = {
    "temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.4,
    "presence_penalty": 0.7, "frequency_penalty": 0.9, "seed": 11, "logit_bias": ((1, 2.0),),
}  # fmt: skip


@given(st.integers(0, 40))
def test_a_sampler_resumed_anywhere_draws_what_the_first_would_have(cut: int) -> None:
    prompt, drawn = [1, 2, 3], []
    first = sampler(prompt, size=50, **CHAIN)
    for position in range(40):
        drawn.append(first.draw(logits_of(position, 50, 1.0), position))
        first.accept(drawn[-1])
    assert len(set(drawn)) > 10
    second = sampler(prompt, drawn[:cut], size=50, **CHAIN)
    for position in range(cut, 40):
        token = second.draw(logits_of(position, 50, 1.0), position)
        assert token == drawn[position]
        second.accept(token)


def test_penalties_count_the_reply_and_repetition_the_prompt_too() -> None:
    logits = np.array([2.0, -2.0, 2.0, 2.0], np.float32)
    repeated = sampler([0, 1], [2], size=4, repetition_penalty=2.0).adjusted(logits)
    assert repeated.tolist() == [1.0, -4.0, 1.0, 2.0]
    present = sampler([0, 1], [2, 2], size=4, presence_penalty=0.5).adjusted(logits)
    assert present.tolist() == [2.0, -2.0, 1.5, 2.0]
    frequent = sampler([0, 1], [2, 2], size=4, frequency_penalty=0.5).adjusted(logits)
    assert frequent.tolist() == [2.0, -2.0, 1.0, 2.0]


def test_the_engines_logits_are_left_as_they_are() -> None:
    """They may be memory of the engine, and log probabilities are read from them."""
    logits = logits_of(1, 50)
    before = logits.copy()
    logits.flags.writeable = False
    sampler([1], [2], size=50, **CHAIN).draw(logits, 5)
    assert (logits == before).all()
    plain = sampler(size=50, top_k=5)
    assert plain.adjusted(logits) is logits
    plain.draw(logits, 5)


@pytest.mark.parametrize("fails", [False, True])
def test_a_bias_is_taken_back_from_the_engines_logits(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = logits_of(1, FakeVocab().size)
    before = logits.copy()
    biased = sampler(logit_bias=((7, 100.0), (9, -np.inf)), ignore_eos=True, temperature=0)
    if fails:
        monkeypatch.setattr("actors.sampling.sample", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            biased.draw(logits, 5)
    else:
        assert biased.draw(logits, 5) == 7
    assert (logits == before).all()


def test_bias_bans_and_forces() -> None:
    logits = logits_of(1, 50)
    best = int(logits.argmax())
    assert sampler(size=50, temperature=0, logit_bias=((best, -100.0),)).draw(logits, 0) != best
    assert sampler(size=50, temperature=0, logit_bias=((7, 100.0),)).draw(logits, 0) == 7


def test_ignore_eos_never_draws_an_end() -> None:
    vocab = FakeVocab()
    (end,) = vocab.eog
    logits = np.zeros(vocab.size, np.float32)
    logits[end] = 1000
    for temperature in (0.0, 1.0):
        assert (
            Sampler(SamplingParams(temperature=temperature), vocab, [], []).draw(logits, 0) == end
        )
        params = SamplingParams(temperature=temperature, ignore_eos=True)
        assert end not in {Sampler(params, vocab, [], []).draw(logits, i) for i in range(50)}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rest", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.2}])
def test_only_what_is_allowed_is_drawn(temperature: float, rest: dict[str, Any]) -> None:
    logits = logits_of(2, 50)
    allowed = np.zeros(50, np.bool_)
    allowed[np.argsort(logits)[:2]] = True  # the least likely
    params = SamplingParams(temperature=temperature, **rest)
    drawn = {sample(logits, params, position, allowed) for position in range(200)}
    assert drawn <= set(np.flatnonzero(allowed).tolist())


@pytest.mark.parametrize("param", ["logit_bias", "stop_token_ids"])
@pytest.mark.parametrize("token", [-1, 1000])
def test_ids_that_the_vocabulary_does_not_have_are_refused(param: str, token: int) -> None:
    given_: Any = ((token, 1.0),) if param == "logit_bias" else (token,)
    with pytest.raises(InvalidRequest, match=str(token)) as caught:
        check(SamplingParams(**{param: given_}), WideVocab(1000))
    assert caught.value.param == param
    check(SamplingParams(logit_bias=((999, 1.0),), stop_token_ids=(0,)), WideVocab(1000))


# ---- log probabilities


def test_log_probabilities_are_the_models_own() -> None:
    """Before bias, penalties and temperature."""
    logits = logits_of(4, FakeVocab().size)
    made = Sampler(SamplingParams(logprobs=3, **CHAIN), FakeVocab(), [97], [98, 98])
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    told = made.logprob(logits, 98)
    assert told.raw == b"b"
    assert told.logprob == pytest.approx(math.log(p[98]), abs=1e-5)
    best = np.argsort(-p)[:3]
    assert [raw for raw, _ in told.top] == [FakeVocab().token_bytes(int(i)) for i in best]
    np.testing.assert_allclose([x for _, x in told.top], np.log(p[best]), atol=1e-5)


def test_without_alternatives_only_the_token_is_told() -> None:
    told = Sampler(SamplingParams(logprobs=0), FakeVocab(), [], []).logprob(logits_of(1, 261), 97)
    assert told.top == ()


def test_an_impossible_token_has_a_number_too() -> None:
    logits = np.array([0.0, -np.inf, 1.0], np.float32)
    told = Sampler(SamplingParams(logprobs=3), WideVocab(3), [], []).logprob(logits, 1)
    assert told.logprob == -9999.0
    assert all(math.isfinite(x) for _, x in told.top)


def plain_heaviest(logits: np.ndarray, k: int) -> np.ndarray:
    """By sorting everything."""
    return np.sort(np.argsort(-logits, kind="stable")[:k])


def plain_nucleus(logits: np.ndarray, top_p: float) -> np.ndarray:
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits - logits.max())
    wanted = top_p * weights.sum(dtype=np.float64)
    mass = weights[order].astype(np.float64).cumsum()
    return np.sort(order[: min(int(np.searchsorted(mass, wanted)) + 1, len(order))])


@pytest.mark.parametrize("n_vocab", [3, 320, 1100, 49152])
@pytest.mark.parametrize("form", ["flat", "peaked", "wide", "tied", "banned", "equal"])
def test_top_k_and_top_p_leave_what_sorting_everything_leaves(form: str, n_vocab: int) -> None:
    rng = np.random.default_rng(n_vocab)
    scale = {"flat": 0.01, "wide": 12.0}.get(form, 3.0)
    logits = rng.normal(0, scale, n_vocab).astype(np.float32)
    if form == "tied":
        logits = np.round(logits)
    elif form == "banned":
        logits[rng.random(n_vocab) < 0.5] = -np.inf
        logits[0] = 1
    elif form == "equal":
        logits[:] = 1.5
    elif form == "peaked":
        logits[:3] += 10
    for top_p in (1e-6, 0.3, 0.5, 0.9, 0.95, 0.999, 1 - 1e-9):
        kept = truncated(logits, SamplingParams(top_p=top_p))
        assert kept is not None
        assert kept.tolist() == plain_nucleus(logits, top_p).tolist(), top_p
    for k in {1, 2, 40, 600, n_vocab - 1}:
        if k < n_vocab:
            kept = truncated(logits, SamplingParams(top_k=k))
            assert kept is not None
            assert kept.tolist() == plain_heaviest(logits, k).tolist(), k
