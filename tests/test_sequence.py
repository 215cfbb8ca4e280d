"""Text of running turns: stop strings and characters that span tokens, and how a reply ends."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actors.engines.fake_engine import FakeVocab
from actors.sequence import Sequence, TextStream, text_of, visible_ids
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


@pytest.mark.slow
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
