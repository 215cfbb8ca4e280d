"""What every engine must hold; inherited by the tests of each.

"Equal" is defined once, here: the reference's tokens are forced on the other run. Every argmax is
the reference's (the same text); or, where one is not, the reference's top two lie less than 0.1
apart and the mean KL is below 1e-3. An engine with `exact` allows identity only. Models with
sliding layers have a limit of their own (`kl`): moving their cells alone changes float16 sums.
"""

from collections.abc import Sequence

import numpy as np
import pytest

from actors.engines.base import Chunk, Engine, Logits
from actors.errors import EngineFault
from storage.codec import decode_rows, encode_rows, get_codec, slice_rows
from storage.spec import GroupRows, KVRows

GAP, KL = 0.1, 1e-3


def feed(engine: Engine, seq_id: int, ids: Sequence[int], chunk: int = 0) -> Logits:
    """Prefill `ids` after what the sequence has; the last token's logits."""
    for at in range(0, len(ids), chunk or len(ids)):
        part = ids[at : at + (chunk or len(ids))]
        last = at + len(part) == len(ids)
        logits = engine.step([Chunk(seq_id, part, engine.n_rows(seq_id), int(last))])
    assert logits[seq_id].flags.writeable
    return logits[seq_id][-1].copy()


def greedy(engine: Engine, seq_id: int, ids: Sequence[int], n: int) -> tuple[list[int], np.ndarray]:
    """(tokens, their logits) of a greedy run after `ids`."""
    tokens, seen = [], [feed(engine, seq_id, ids)]
    while len(tokens) < n:
        tokens.append(int(seen[-1].argmax()))
        seen.append(feed(engine, seq_id, tokens[-1:]))
    return tokens, np.stack(seen[:n])


def forced(engine: Engine, seq_id: int, tokens: Sequence[int], first: Logits) -> np.ndarray:
    """Logits at each of `tokens`, fed one by one after `first`."""
    seen = [first]
    seen += [feed(engine, seq_id, [token]) for token in tokens[:-1]]
    return np.stack(seen)


def assert_equal(
    reference: np.ndarray, other: np.ndarray, *, exact: bool, limit: float = KL
) -> None:
    """(n, vocab) logits of two runs over the same tokens; see the module docstring."""
    if exact:
        np.testing.assert_array_equal(reference, other)
        return
    parts = np.flatnonzero(reference.argmax(-1) != other.argmax(-1))
    top = np.sort(reference, axis=-1)
    assert (top[parts, -1] - top[parts, -2] < GAP).all(), f"parted at {parts}, not near a tie"
    p, q = _log_softmax(reference), _log_softmax(other)
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    assert kl < (limit if len(parts) else max(limit, 10 * KL)), f"mean KL {kl}"
    if len(parts):
        print(f"near ties: {len(parts)} of {len(reference)} tokens, mean KL {kl:.1e}")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def assert_same_rows(a: KVRows, b: KVRows) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.k.view(np.uint16), y.k.view(np.uint16))
        np.testing.assert_array_equal(x.v.view(np.uint16), y.v.view(np.uint16))


def both(engine: Engine, seq_id: int, start: int, stop: int) -> KVRows:
    """Rows of both parts: all full ones, and the sliding ones that are held."""
    return merge(
        engine, engine.export(seq_id, start, stop), engine.export_window(seq_id, start, stop)
    )


def merge(engine: Engine, full: KVRows, sliding: KVRows, last: int | None = None) -> KVRows:
    """Full rows, and the `last` of the sliding ones (None: all)."""
    rows = []
    for group, x, y in zip(engine.key.spec.groups, full, sliding, strict=True):
        if group.part == "sliding":
            first = 0 if last is None else y.k.shape[1] - last
            assert first >= 0
            x = GroupRows(y.k[:, first:], y.v[:, first:])
        rows.append(x)
    return tuple(rows)


def go_back(engine: Engine, seq_id: int, ids: Sequence[int]) -> None:
    """Cut the sequence, which starts with `ids`, to their number; compute them again where its
    sliding rows there are gone."""
    if engine.can_truncate(seq_id, len(ids)):
        engine.truncate(seq_id, len(ids))
        return
    n_rows = engine.n_rows(seq_id)
    with pytest.raises(EngineFault):
        engine.truncate(seq_id, len(ids))
    assert engine.n_rows(seq_id) == n_rows
    engine.truncate(seq_id, 0)
    feed(engine, seq_id, ids)


class EngineContract:
    """Override `engine`: at least 3 sequences, 1,024 to 2,048 cells, and empty at each test."""

    exact = False
    kl = KL
    moves_exactly = True  # cells loaded in order give the same bits wherever they lie
    prompts = (
        "The sea was calm that morning, and the fishermen went out early. They rowed past the old "
        "lighthouse, where the keeper used to wave to them with a white cloth, and set their nets "
        "in the deep water behind the island. Nobody spoke much. The youngest of them, a boy of "
        "fifteen, had never been out so far, and he watched the coast until it was only a thin "
        "grey line. Toward noon the wind turned. The oldest man looked at the sky, said that they "
        "would have rain before the evening, and began to pull in the first of the nets.",
        "def read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n\n"
        "def count_words(lines):\n    total = 0\n    for line in lines:\n"
        "        total += len(line.split())\n    return total\n\n",
        "The Danube rises in the Black Forest and flows through Vienna, Bratislava, Budapest and "
        "Belgrade before it reaches the Black Sea. The Rhine comes from the Swiss Alps. It passes "
        "Basel, Strasbourg and Cologne and ends in the Netherlands. The Seine flows through Paris.",
    )

    @pytest.fixture
    def engine(self) -> Engine:
        raise NotImplementedError

    def ids(self, engine: Engine, n: int, prompt: int = 0) -> list[int]:
        ids = engine.vocab.tokenize(self.prompts[prompt] + " ")
        return (ids * (n // len(ids) + 1))[:n]

    def test_batched_decode_equals_one_by_one(self, engine: Engine) -> None:
        starts = [self.ids(engine, 20 + 7 * i, i) for i in range(3)]
        alone = []
        for ids in starts:
            alone.append(greedy(engine, 0, ids, 12))
            engine.truncate(0, 0)
        seen = [[feed(engine, i, ids)] for i, ids in enumerate(starts)]
        for at in range(11):
            chunks = [Chunk(i, [t[at]], engine.n_rows(i), 1) for i, (t, _) in enumerate(alone)]
            logits = engine.step(chunks)
            for i in range(3):
                seen[i].append(logits[i][-1].copy())
        for (_, reference), batched in zip(alone, seen, strict=True):
            assert_equal(reference, np.stack(batched), exact=self.exact, limit=self.kl)

    def test_logits_of_several_tokens_are_those_of_one_after_another(self, engine: Engine) -> None:
        """What drafts are checked with."""
        ids = self.ids(engine, 60)
        tokens, reference = greedy(engine, 0, ids, 6)
        engine.truncate(0, 0)
        other = feed(engine, 1, self.ids(engine, 30, 1))
        first = feed(engine, 0, ids)
        logits = engine.step([Chunk(0, tokens[:5], 60, 5), Chunk(1, [int(other.argmax())], 30, 1)])
        assert [len(logits[i]) for i in (0, 1)] == [5, 1]
        assert_equal(reference, np.stack([first, *logits[0]]), exact=self.exact, limit=self.kl)
        if engine.can_truncate(0, 62):  # a draft that was refused leaves nothing behind
            engine.truncate(0, 62)
            again = forced(engine, 0, tokens[2:], logits[0][1].copy())
            assert_equal(reference[2:], again, exact=self.exact, limit=self.kl)

    def test_prefill_beside_decode_equals_prefill_alone(self, engine: Engine) -> None:
        """In the same chunks; what chunks of other lengths do is the next test's."""
        ids, other = self.ids(engine, 90, 0), self.ids(engine, 30, 1)
        feed(engine, 0, ids[:40])
        tokens, reference = greedy(engine, 0, ids[40:], 8)
        engine.truncate(0, 0)
        feed(engine, 1, other)
        for start, stop in ((0, 40), (40, 90)):
            logits = engine.step(
                [
                    Chunk(1, [5], engine.n_rows(1), 1),
                    Chunk(0, ids[start:stop], start, int(stop == 90)),
                ]
            )
            assert logits.keys() == ({0, 1} if stop == 90 else {1})
        first = logits[0][-1].copy()
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact, limit=self.kl)

    @pytest.mark.parametrize("chunk", [1, 37, 128])
    def test_chunked_prefill_equals_whole_prefill(self, engine: Engine, chunk: int) -> None:
        ids = self.ids(engine, 200)
        tokens, reference = greedy(engine, 0, ids, 8)
        engine.truncate(0, 0)
        first = feed(engine, 0, ids, chunk)
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact, limit=self.kl)

    def test_rows_loaded_block_by_block_give_the_same_logits_bit_for_bit(
        self, engine: Engine
    ) -> None:
        ids = self.ids(engine, 300)
        feed(engine, 0, ids)
        blocks = [both(engine, 0, 0, 256), both(engine, 0, 256, 300)]
        expected = feed(engine, 0, [7])
        engine.truncate(0, 0)
        assert engine.n_rows(0) == 0
        engine.load(0, 0, blocks[0])
        assert engine.n_rows(0) == 256
        engine.load(0, 256, blocks[1])
        assert engine.n_rows(0) == 300
        for start, stop, rows in ((0, 256, blocks[0]), (256, 300, blocks[1])):
            assert_same_rows(both(engine, 0, start, stop), rows)
        again = feed(engine, 0, [7])
        exact = self.exact or self.moves_exactly
        assert_equal(expected[None], again[None], exact=exact, limit=self.kl)

    def test_rows_have_the_shape_of_the_spec(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 10))
        apart = {"full": engine.export(0, 2, 9), "sliding": engine.export_window(0, 2, 9)}
        for part, rows in apart.items():
            assert len(rows) == len(engine.key.spec.groups)
            for group, x in zip(engine.key.spec.groups, rows, strict=True):
                lead = (len(group.layers), 7 if group.part == part else 0, group.n_kv_heads)
                assert x.k.shape == (*lead, group.key_dim)
                assert x.v.shape == (*lead, group.value_dim)
                assert x.k.dtype == x.v.dtype == np.float16
                if group.part == part:
                    assert not np.array_equal(x.k.view(np.uint16), x.v.view(np.uint16))

    def test_exported_rows_are_a_copy(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 40))
        rows = both(engine, 0, 0, 40)
        kept = tuple(GroupRows(x.k.copy(), x.v.copy()) for x in rows)
        engine.truncate(0, 0)
        feed(engine, 0, self.ids(engine, 40, 1))
        both(engine, 0, 0, 40)
        assert_same_rows(rows, kept)

    def test_a_range_in_the_middle_is_a_slice_of_the_whole(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 120))
        whole, middle = engine.export(0, 0, 120), engine.export(0, 33, 77)
        sliced = tuple(GroupRows(x.k[:, 33:77], x.v[:, 33:77]) for x in whole)
        assert_same_rows(middle, tuple(GroupRows(x.k.copy(), x.v.copy()) for x in sliced))

    def test_load_at_the_wrong_place_is_refused(self, engine: Engine) -> None:
        ids = self.ids(engine, 60)
        feed(engine, 0, ids)
        rows = both(engine, 0, 40, 60)
        go_back(engine, 0, ids[:40])
        for start in (39, 41, 0):
            with pytest.raises(EngineFault):
                engine.load(0, start, rows)
            assert engine.n_rows(0) == 40
        engine.load(0, 40, rows)
        assert engine.n_rows(0) == 60

    def test_a_load_of_no_rows_is_refused(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 20))
        none = tuple(GroupRows(x.k[:, :0], x.v[:, :0]) for x in engine.export(0, 0, 20))
        with pytest.raises(EngineFault):
            engine.load(0, 20, none)
        assert engine.n_rows(0) == 20
        feed(engine, 0, [5])

    def test_encoded_rows_are_taken_or_refused(self, engine: Engine) -> None:
        """Taken as they are: the decoded rows, loaded, make no difference but rounding's."""
        ids, spec = self.ids(engine, 60), engine.key.spec
        feed(engine, 0, ids)
        codec = get_codec(engine.loads_encoded or "f16")
        tensors = encode_rows(spec, codec, engine.export(0, 0, 60))
        if not engine.loads_encoded:
            with pytest.raises(EngineFault):
                engine.load_encoded(1, 0, tensors)
            assert engine.n_rows(1) == 0
            return
        for seq_id, start, stop in ((0, 60, 60), (1, 1, 60), (1, 0, 0)):
            with pytest.raises(EngineFault):
                engine.load_encoded(seq_id, start, slice_rows(tensors, start, stop))
        engine.load_encoded(1, 0, slice_rows(tensors, 0, 40))
        engine.load_encoded(1, 40, slice_rows(tensors, 40, 60))
        assert [engine.n_rows(0), engine.n_rows(1)] == [60, 60]
        found, wanted = engine.export(1, 0, 60), decode_rows(spec, codec, tensors)
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x.k.astype("f4"), y.k.astype("f4"), atol=0.02)
            np.testing.assert_allclose(x.v.astype("f4"), y.v.astype("f4"), atol=0.02)

    def test_encoded_rows_are_exported_as_they_are_held(self, engine: Engine) -> None:
        if not engine.exports_encoded:
            return
        feed(engine, 0, self.ids(engine, 60))
        codec, whole = get_codec(engine.exports_encoded), engine.export_encoded(0, 0, 60)
        decoded = decode_rows(engine.key.spec, codec, whole)
        assert_same_rows(engine.export(0, 0, 60), decoded)
        for name, x in engine.export_encoded(0, 7, 33).items():
            np.testing.assert_array_equal(x, whole[name][:, 7:33])
        with pytest.raises(EngineFault):
            engine.export_encoded(0, 0, 61)

    def test_export_of_rows_that_do_not_exist_is_refused(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 20))
        for start, stop in ((0, 21), (20, 21), (5, 5)):
            with pytest.raises(EngineFault):
                engine.export(0, start, stop)
            with pytest.raises(EngineFault):
                engine.export_window(0, start, stop)

    def test_truncate_then_continue(self, engine: Engine) -> None:
        ids, more = self.ids(engine, 70), self.ids(engine, 25, 1)
        feed(engine, 0, ids)
        tokens, reference = greedy(engine, 0, more, 8)
        engine.truncate(0, 0)
        feed(engine, 0, [*ids, *self.ids(engine, 40, 2)])
        go_back(engine, 0, ids)
        assert engine.n_rows(0) == 70
        first = feed(engine, 0, more)
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact, limit=self.kl)

    def test_truncate_to_the_present_length_changes_nothing(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 50))
        before = both(engine, 0, 0, 50)
        for n_rows in (50, 51):
            engine.truncate(0, n_rows)
            assert engine.n_rows(0) == 50
        assert_same_rows(both(engine, 0, 0, 50), before)

    def test_fork_shares_a_prefix_and_both_go_on_alone(self, engine: Engine) -> None:
        ids = self.ids(engine, 80)
        ways = (self.ids(engine, 20, 1), self.ids(engine, 20, 2))
        wanted = []
        for way in ways:
            feed(engine, 0, ids[:64])
            wanted.append(greedy(engine, 0, way, 6))
            engine.truncate(0, 0)
        feed(engine, 0, ids[:64])
        engine.fork(0, 1, 64)
        feed(engine, 0, ids[64:])
        assert (engine.n_rows(0), engine.n_rows(1)) == (80, 64)
        go_back(engine, 0, ids[:64])
        for seq_id, way, (tokens, reference) in zip((1, 0), ways, wanted, strict=True):
            first = feed(engine, seq_id, way)
            assert_equal(
                reference, forced(engine, seq_id, tokens, first), exact=self.exact, limit=self.kl
            )
        engine.truncate(0, 0)
        assert engine.n_rows(1) > 64
        tokens, reference = wanted[0]
        go_back(engine, 1, ids[:64])
        first = feed(engine, 1, ways[0])
        assert_equal(reference, forced(engine, 1, tokens, first), exact=self.exact, limit=self.kl)

    def test_fork_before_the_end(self, engine: Engine) -> None:
        ids, way = self.ids(engine, 80), self.ids(engine, 20, 1)
        feed(engine, 0, ids[:64])
        tokens, reference = greedy(engine, 0, way, 6)
        engine.truncate(0, 0)
        feed(engine, 0, ids)
        if not engine.can_truncate(0, 64):
            with pytest.raises(EngineFault):
                engine.fork(0, 1, 64)
            assert (engine.n_rows(0), engine.n_rows(1)) == (80, 0)
            return
        engine.fork(0, 1, 64)
        assert (engine.n_rows(0), engine.n_rows(1)) == (80, 64)
        first = feed(engine, 1, way)
        assert_equal(reference, forced(engine, 1, tokens, first), exact=self.exact, limit=self.kl)

    def test_fork_of_more_rows_than_there_are_is_refused(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 10))
        with pytest.raises(EngineFault):
            engine.fork(0, 1, 11)
        assert engine.n_rows(1) == 0

    def test_fork_into_a_sequence_in_use_is_refused(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 10))
        feed(engine, 1, self.ids(engine, 12, 1))
        with pytest.raises(EngineFault):
            engine.fork(0, 1, 5)
        assert engine.n_rows(1) == 12

    def test_another_sequence_is_untouched(self, engine: Engine) -> None:
        ids, other = self.ids(engine, 90), self.ids(engine, 70, 1)
        feed(engine, 1, other)
        before = both(engine, 1, 0, 70)
        tokens, reference = greedy(engine, 1, self.ids(engine, 5, 2), 6)
        go_back(engine, 1, other)
        feed(engine, 0, ids)
        rows = both(engine, 0, 0, 90)
        go_back(engine, 0, ids[:30])
        engine.truncate(0, 0)
        engine.load(0, 0, rows)
        assert engine.n_rows(1) == 70
        assert_same_rows(both(engine, 1, 0, 70), before)
        first = feed(engine, 1, self.ids(engine, 5, 2))
        assert_equal(reference, forced(engine, 1, tokens, first), exact=self.exact, limit=self.kl)

    def test_a_step_beyond_the_batch_is_a_fault_and_no_end(self, engine: Engine) -> None:
        tokens, reference = greedy(engine, 0, self.ids(engine, 30), 4)
        engine.truncate(0, 0)
        n = engine.n_batch + engine.n_seq_max
        with pytest.raises(EngineFault):
            engine.step([Chunk(0, self.ids(engine, n + 1), 0, 1)])
        assert engine.n_rows(0) == 0
        first = feed(engine, 0, self.ids(engine, 30))
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact, limit=self.kl)

    def test_more_tokens_than_cells_is_a_fault_and_no_end(self, engine: Engine) -> None:
        tokens, reference = greedy(engine, 0, self.ids(engine, 30), 4)
        engine.truncate(0, 0)
        chunk = 256

        def feed_chunk(number: int) -> None:
            seq_id = number % 2
            ids = self.ids(engine, chunk, seq_id)
            engine.step([Chunk(seq_id, ids, engine.n_rows(seq_id), 0)])

        for number in range(engine.n_cells // chunk):
            feed_chunk(number)
        with pytest.raises(EngineFault):
            feed_chunk(engine.n_cells // chunk)
        for seq_id in range(2):
            engine.truncate(seq_id, 0)
            assert engine.n_rows(seq_id) == 0
        first = feed(engine, 0, self.ids(engine, 30))
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact, limit=self.kl)

    def test_a_step_at_the_wrong_position_is_refused(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 10))
        with pytest.raises(EngineFault):
            engine.step([Chunk(0, [5], 12, 1)])
        assert engine.n_rows(0) == 10

    def test_n_rows_is_the_truth(self, engine: Engine) -> None:
        assert [engine.n_rows(i) for i in range(engine.n_seq_max)] == [0] * engine.n_seq_max
        ids = self.ids(engine, 31)
        feed(engine, 2, ids)
        engine.step([Chunk(0, self.ids(engine, 3), 0, 0), Chunk(2, [5], 31, 0)])
        assert [engine.n_rows(i) for i in range(3)] == [3, 0, 32]
        go_back(engine, 2, ids[:11])
        assert engine.n_rows(2) == 11
        engine.truncate(2, 0)
        assert [engine.n_rows(i) for i in range(3)] == [3, 0, 0]

    def test_a_sequence_always_fits_into_the_cells(self, engine: Engine) -> None:
        assert engine.n_ctx <= engine.n_cells

    def test_vocabulary(self, engine: Engine) -> None:
        vocab = engine.vocab
        text = "Grüße, 世界! 🙂 def f(x):\n\treturn x"
        ids = vocab.tokenize(text)
        assert b"".join(map(vocab.token_bytes, ids)).decode() == text
        assert all(0 <= i < vocab.size for i in ids)
        assert vocab.eog
        assert all(vocab.token_bytes(i) == b"" for i in vocab.eog)
        assert vocab.tokenize("") == []
        assert vocab.tokenize(vocab.eos_text)[0] in vocab.eog

    def test_whether_a_sequence_can_be_cut(self, engine: Engine) -> None:
        ids = self.ids(engine, 200)
        feed(engine, 0, ids)
        assert engine.can_truncate(0, 0)
        assert engine.can_truncate(0, 200)
        assert not engine.can_truncate(0, 201)
        assert not engine.can_truncate(0, -1)
        spec = engine.key.spec
        assert engine.window == max(layer.window for layer in spec.layers)
        if not engine.window:
            assert engine.window_start(0) == 0
            assert all(engine.can_truncate(0, n) for n in range(200))


class SlidingContract(EngineContract):
    """Of engines whose model has sliding layers; the window is 64 or less."""

    kl = 1e-2
    moves_exactly = False

    def same(self, reference: Logits, other: Logits) -> None:
        assert_equal(reference[None], other[None], exact=self.exact, limit=self.kl)

    def test_the_last_window_is_all_that_need_be_loaded(self, engine: Engine) -> None:
        ids, w = self.ids(engine, 400), engine.window
        feed(engine, 0, ids, 128)
        first, second = engine.export(0, 0, 256), engine.export(0, 256, 400)
        window = engine.export_window(0, 256, 400)
        expected = feed(engine, 0, [7])
        engine.truncate(0, 0)
        engine.load(0, 0, first)
        assert (engine.n_rows(0), engine.window_start(0)) == (256, 256)
        self.assert_stuck(engine, 0)
        engine.load(0, 256, merge(engine, second, window, w - 1))
        assert (engine.n_rows(0), engine.window_start(0)) == (400, 400 - w + 1)
        self.same(expected, feed(engine, 0, [7]))

    def assert_stuck(self, engine: Engine, seq_id: int) -> None:
        """A sequence without its window takes no step and no fork, and can only be emptied."""
        n_rows = engine.n_rows(seq_id)
        assert not engine.can_truncate(seq_id, n_rows)
        with pytest.raises(EngineFault):
            feed(engine, seq_id, [7])
        with pytest.raises(EngineFault):
            engine.fork(seq_id, 2, n_rows)
        with pytest.raises(EngineFault):
            engine.truncate(seq_id, n_rows - 1)
        assert (engine.n_rows(seq_id), engine.n_rows(2)) == (n_rows, 0)

    def test_a_window_one_row_short_is_refused(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 256))
        full, window = engine.export(0, 0, 256), engine.export_window(0, 0, 256)
        engine.truncate(0, 0)
        engine.load(0, 0, merge(engine, full, window, engine.window - 2))
        self.assert_stuck(engine, 0)
        engine.truncate(0, 0)
        engine.load(0, 0, merge(engine, full, window, engine.window - 1))
        feed(engine, 0, [7])

    def test_rows_before_a_gap_are_no_window(self, engine: Engine) -> None:
        n = 256 + engine.window // 2
        feed(engine, 0, self.ids(engine, n))
        full = engine.export(0, 0, 256), engine.export(0, 256, n)
        rest = engine.export_window(0, 256, n)
        go_back(engine, 0, self.ids(engine, 256))
        window = engine.export_window(0, 0, 256)
        engine.truncate(0, 0)
        whole = merge(engine, full[0], window)
        for last, fits in ((None, True), (n - 257, False), (0, False)):
            engine.load(0, 0, whole)
            assert engine.can_truncate(0, 256)
            engine.load(0, 256, merge(engine, full[1], rest, last))
            assert engine.can_truncate(0, n) == fits
            if not fits:
                self.assert_stuck(engine, 0)
                assert not engine.can_truncate(0, 256)
            engine.truncate(0, 0)
        feed(engine, 0, self.ids(engine, n))  # nothing is remembered of an emptied sequence
        assert engine.can_truncate(0, n)

    def test_a_cut_anywhere_is_refused_or_right(self, engine: Engine) -> None:
        ids = self.ids(engine, 300)
        for cut in (299, 290, 300 - engine.window, 200, 100, 10):
            feed(engine, 0, ids[:cut])
            reference = feed(engine, 0, [7])
            engine.truncate(0, 0)
            feed(engine, 0, ids, 100)
            go_back(engine, 0, ids[:cut])
            assert engine.n_rows(0) == cut
            self.same(reference, feed(engine, 0, [7]))
            engine.truncate(0, 0)

    def test_an_idle_sequence_keeps_its_window(self, engine: Engine) -> None:
        ids = self.ids(engine, 200)
        feed(engine, 1, ids)
        reference = feed(engine, 1, [7])
        go_back(engine, 1, ids)
        before = engine.export_window(1, 200 - engine.window + 1, 200)
        feed(engine, 0, self.ids(engine, 700, 1), 256)
        assert engine.can_truncate(1, 200)
        assert_same_rows(engine.export_window(1, 200 - engine.window + 1, 200), before)
        cut = ids[:150]  # its older rows may be gone by now: refused or right
        go_back(engine, 1, cut)
        feed(engine, 1, ids[150:])
        self.same(reference, feed(engine, 1, [7]))

    def test_the_window_is_there_after_the_longest_step(self, engine: Engine) -> None:
        n, w = engine.n_batch, engine.window
        feed(engine, 1, self.ids(engine, 200, 1))
        feed(engine, 0, self.ids(engine, 256))
        feed(engine, 0, self.ids(engine, n, 2)[: 1024 - 456 - 8])
        stop = engine.n_rows(0)
        assert engine.window_start(0) <= stop - w + 1
        rows = engine.export_window(0, stop - w + 1, stop)
        sliding = [x for g, x in zip(engine.key.spec.groups, rows, strict=True) if x.k.shape[1]]
        assert [x.k.shape[1] for x in sliding] == [w - 1] * len(sliding) != []
        feed(engine, 0, [7])

    def test_forks_and_their_source_go_on_side_by_side(self, engine: Engine) -> None:
        ids = self.ids(engine, 100)
        feed(engine, 0, ids)
        for turn in range(5):
            for seq_id in (1, 2):
                engine.fork(0, seq_id, engine.n_rows(0))
            for seq_id in (1, 0, 2):
                feed(engine, seq_id, self.ids(engine, 40, (turn + seq_id) % 3))
            ids += self.ids(engine, 40, turn % 3)
            for seq_id in (1, 2):
                engine.truncate(seq_id, 0)
        got = feed(engine, 0, [7])
        engine.truncate(0, 0)
        feed(engine, 0, ids)
        self.same(feed(engine, 0, [7]), got)
