"""Sampling and text: draws, the nucleus, stop strings and characters that span tokens."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.engines.fake_engine import FakeVocab
from actors.sequence import Sequence, TextStream, sample, text_of, visible_ids
from actors.turn import SamplingParams


class PieceVocab(FakeVocab):
    """Token i adds the bytes `pieces[i]`; the last token ends a generation."""

    def __init__(self, pieces: list[bytes]) -> None:
        super().__init__()
        self.pieces = [*pieces, b""]
        self.size = len(self.pieces)
        self.eog = frozenset({len(pieces)})

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def logits_of(seed: int, n: int = 1000, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


# ---- sampling


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


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> set[int]:
    """The plain definition."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
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
    allowed = nucleus(logits, temperature, top_p)
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


# ---- text


def streamed(pieces: list[bytes], stop: tuple[str, ...]) -> tuple[list[str], TextStream, int]:
    """(what each push made visible and the rest, the stream, tokens taken)."""
    vocab = PieceVocab(pieces)
    stream = TextStream(vocab, stop)
    seen = []
    for index in range(len(pieces)):
        seen.append(stream.push(index))
        if stream.stopped:
            return seen, stream, index + 1
    seen.append(stream.finish())
    return seen, stream, len(pieces)


def offline(pieces: list[bytes], stop: tuple[str, ...]) -> tuple[str, int]:
    """(visible text, tokens taken) with all bytes at hand, one more token at a time."""
    for n in range(1, len(pieces) + 1):
        text = b"".join(pieces[:n]).decode("utf-8", "ignore")  # a cut character is no text yet
        hits = [at for s in stop if (at := text.find(s)) >= 0]
        if hits:
            return text[: min(hits)], n
    return b"".join(pieces).decode("utf-8", "replace"), len(pieces)


words = st.text(alphabet="abé🙂 ", max_size=12)
stops = st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), max_size=3)


def split(raw: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({c % (len(raw) + 1) for c in cuts})
    return [raw[a:b] for a, b in zip([0, *places], [*places, len(raw)], strict=True)]


@given(words, stops, st.lists(st.integers(0, 100), max_size=8))
@example("xaby", ["ab"], [2])
@example("aab", ["ab"], [1, 2])
@example("ababa", ["abab"], [1, 2, 3])
def test_what_is_visible_is_the_offline_cut_for_any_tokens(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    pieces = split(text.encode(), cuts)
    seen, stream, taken = streamed(pieces, tuple(stop))
    visible, n = offline(pieces, tuple(stop))
    assert "".join(seen) == stream.text == visible
    assert taken == n
    assert not any(s in stream.text for s in stop)
    assert text.startswith(stream.text)
    assert stream.stopped == any(s in text for s in stop)


@given(words, stops, st.lists(st.integers(0, 100), max_size=8))
def test_what_was_shown_is_never_taken_back(text: str, stop: list[str], cuts: list[int]) -> None:
    """Nothing that could still become a stop string is shown, and all the rest is."""
    pieces = split(text.encode(), cuts)
    vocab = PieceVocab(pieces)
    stream = TextStream(vocab, stop)
    for index in range(len(pieces)):
        stream.push(index)
        if stream.stopped:
            return
        text = b"".join(pieces[: index + 1]).decode("utf-8", "ignore")
        assert text.startswith(stream.text)
        held = text[len(stream.text) :]
        assert held == "" or any(s.startswith(held) and s != held for s in stop)


def test_a_beginning_that_turns_out_to_be_none_is_shown() -> None:
    seen, stream, _ = streamed([b"one S", b"TO", b"NE", b" two"], ("STOP",))
    assert seen == ["one ", "", "STONE", " two", ""]
    assert not stream.stopped


def test_a_stop_string_across_three_tokens() -> None:
    seen, stream, taken = streamed([b"one S", b"TO", b"P two", b"three"], ("STOP",))
    assert seen == ["one ", "", ""]
    assert stream.stopped
    assert stream.finish() == ""
    assert taken == 3


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    _, stream, _ = streamed([b"ab END cd STOP"], ("STOP", "END"))
    assert stream.text == "ab "


def test_characters_across_tokens_come_whole() -> None:
    raw = "a🙂é".encode()
    seen, stream, _ = streamed([raw[i : i + 1] for i in range(len(raw))], ())
    assert seen == ["a", "", "", "", "🙂", "", "é", ""]
    assert stream.text == "a🙂é"


def test_what_is_no_character_becomes_a_replacement() -> None:
    seen, _, _ = streamed([b"a\xf0\x9f", b"b", b"\xc3"], ())
    assert "".join(seen) == "a\ufffdb\ufffd"


@given(st.binary(max_size=20), st.lists(st.integers(0, 100), max_size=8))
def test_streamed_text_is_the_text_of_the_ids(raw: bytes, cuts: list[int]) -> None:
    """A reply's text is recognised later by text_of(ids): both must agree on broken bytes too."""
    pieces = split(raw, cuts)
    seen, _, _ = streamed(pieces, ())
    assert "".join(seen) == text_of(PieceVocab(pieces), range(len(pieces)))


@given(words, stops, st.lists(st.integers(0, 100), max_size=8))
def test_visible_ids_are_the_most_tokens_inside_the_visible_text(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    pieces = split(text.encode(), cuts)
    vocab = PieceVocab(pieces)
    _, stream, taken = streamed(pieces, tuple(stop))
    ids = list(range(taken))
    n, tail = visible_ids(vocab, ids, stream.text)
    assert text_of(vocab, ids[:n]) + tail == stream.text
    if n < taken:
        assert not stream.text.startswith(text_of(vocab, ids[: n + 1]))


def test_visible_ids_by_hand() -> None:
    vocab = PieceVocab([b"one", b" two", b" thr", b"ee"])
    assert visible_ids(vocab, [0, 1, 2, 3], "one two three") == (4, "")
    assert visible_ids(vocab, [0, 1, 2, 3], "one two th") == (2, " th")
    assert visible_ids(vocab, [0, 1], "") == (0, "")


# ---- sequences


def sequence(pieces: list[bytes], *, max_tokens: int = 99, stop: tuple[str, ...] = ()) -> Sequence:
    vocab = PieceVocab(pieces)
    text = TextStream(vocab, stop)
    return Sequence("t", [0, 0], 2, SamplingParams(stop=stop), max_tokens, text, 0, 2)


def test_the_end_token_is_no_part_of_the_reply() -> None:
    pieces = [b"ab", b"cS"]
    made = sequence(pieces, stop=("STOP",))
    eog = frozenset({2})
    assert made.accept(0, eog) == "ab"
    assert made.accept(1, eog) == "c"
    assert made.accept(2, eog) == "S"
    assert (made.reply, made.finish_reason) == ([0, 1], "stop")


def test_length_shows_what_was_held_back() -> None:
    made = sequence([b"ab", b"cST"], max_tokens=2, stop=("STOP",))
    assert made.accept(0, frozenset()) == "ab"
    assert made.accept(1, frozenset()) == "cST"
    assert made.finish_reason == "length"


def test_a_stop_string_at_the_last_token_is_a_stop() -> None:
    made = sequence([b"ab", b"cSTOP"], max_tokens=2, stop=("STOP",))
    made.accept(0, frozenset())
    assert made.accept(1, frozenset()) == "c"
    assert made.finish_reason == "stop"
    assert made.text.text == "abc"
