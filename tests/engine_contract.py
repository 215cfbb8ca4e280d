"""What every engine must hold; inherited by the tests of each.

"Equal" is defined once, here: the reference's tokens are forced on the other run. Every argmax is
the reference's (the same text); or, where one is not, the reference's top two lie less than 0.1
apart and the mean KL is below 1e-3. An engine with `exact` allows identity only.
"""

from collections.abc import Sequence

import numpy as np
import pytest

from actors.engines.base import Chunk, Engine, Logits
from actors.errors import EngineFault
from storage.spec import KVRows

GAP, KL = 0.1, 1e-3


def feed(engine: Engine, seq_id: int, ids: Sequence[int], chunk: int = 0) -> Logits:
    """Prefill `ids` after what the sequence has; the last token's logits."""
    for at in range(0, len(ids), chunk or len(ids)):
        part = ids[at : at + (chunk or len(ids))]
        last = at + len(part) == len(ids)
        logits = engine.step([Chunk(seq_id, part, engine.n_rows(seq_id), last)])
    return logits[seq_id].copy()


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


def assert_equal(reference: np.ndarray, other: np.ndarray, *, exact: bool) -> None:
    """(n, vocab) logits of two runs over the same tokens; see the module docstring."""
    if exact:
        np.testing.assert_array_equal(reference, other)
        return
    parts = np.flatnonzero(reference.argmax(-1) != other.argmax(-1))
    top = np.sort(reference, axis=-1)
    assert (top[parts, -1] - top[parts, -2] < GAP).all(), f"parted at {parts}, not near a tie"
    p, q = _log_softmax(reference), _log_softmax(other)
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    assert kl < (KL if len(parts) else 10 * KL), f"mean KL {kl}"
    if len(parts):
        print(f"near ties: {len(parts)} of {len(reference)} tokens, mean KL {kl:.1e}")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def assert_same_rows(a: KVRows, b: KVRows) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x.k.view(np.uint16), y.k.view(np.uint16))
        np.testing.assert_array_equal(x.v.view(np.uint16), y.v.view(np.uint16))


class EngineContract:
    """Override `engine`: at least 3 sequences, 1,024 to 2,048 cells, and empty at each test."""

    exact = False
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
            chunks = [Chunk(i, [t[at]], engine.n_rows(i), True) for i, (t, _) in enumerate(alone)]
            logits = engine.step(chunks)
            for i in range(3):
                seen[i].append(logits[i].copy())
        for (_, reference), batched in zip(alone, seen, strict=True):
            assert_equal(reference, np.stack(batched), exact=self.exact)

    def test_prefill_beside_decode_equals_prefill_alone(self, engine: Engine) -> None:
        ids, other = self.ids(engine, 90, 0), self.ids(engine, 30, 1)
        tokens, reference = greedy(engine, 0, ids, 8)
        engine.truncate(0, 0)
        feed(engine, 1, other)
        for start, stop in ((0, 40), (40, 90)):
            logits = engine.step(
                [
                    Chunk(1, [5], engine.n_rows(1), True),
                    Chunk(0, ids[start:stop], start, stop == 90),
                ]
            )
            assert logits.keys() == ({0, 1} if stop == 90 else {1})
        first = logits[0].copy()
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact)

    @pytest.mark.parametrize("chunk", [1, 37, 128])
    def test_chunked_prefill_equals_whole_prefill(self, engine: Engine, chunk: int) -> None:
        ids = self.ids(engine, 200)
        tokens, reference = greedy(engine, 0, ids, 8)
        engine.truncate(0, 0)
        first = feed(engine, 0, ids, chunk)
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact)

    def test_rows_loaded_block_by_block_give_the_same_logits_bit_for_bit(
        self, engine: Engine
    ) -> None:
        ids = self.ids(engine, 300)
        feed(engine, 0, ids)
        blocks = [engine.export(0, 0, 256), engine.export(0, 256, 300)]
        expected = feed(engine, 0, [7])
        engine.truncate(0, 0)
        assert engine.n_rows(0) == 0
        engine.load(0, 0, blocks[0])
        assert engine.n_rows(0) == 256
        engine.load(0, 256, blocks[1])
        assert engine.n_rows(0) == 300
        for start, rows in ((0, blocks[0]), (256, blocks[1])):
            assert_same_rows(engine.export(0, start, start + rows[0].k.shape[1]), rows)
        np.testing.assert_array_equal(feed(engine, 0, [7]), expected)

    def test_rows_have_the_shape_of_the_spec(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 10))
        rows = engine.export(0, 2, 9)
        assert len(rows) == len(engine.key.spec.groups)
        for group, x in zip(engine.key.spec.groups, rows, strict=True):
            lead = (len(group.layers), 7, group.n_kv_heads)
            assert x.k.shape == (*lead, group.key_dim)
            assert x.v.shape == (*lead, group.value_dim)
            assert x.k.dtype == x.v.dtype == np.float16
            assert not np.array_equal(x.k.view(np.uint16), x.v.view(np.uint16))

    def test_exported_rows_are_a_copy(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 40))
        rows = engine.export(0, 0, 40)
        kept = tuple(type(x)(x.k.copy(), x.v.copy()) for x in rows)
        engine.truncate(0, 0)
        feed(engine, 0, self.ids(engine, 40, 1))
        engine.export(0, 0, 40)
        assert_same_rows(rows, kept)

    def test_a_range_in_the_middle_is_a_slice_of_the_whole(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 120))
        whole, middle = engine.export(0, 0, 120), engine.export(0, 33, 77)
        sliced = tuple(type(x)(x.k[:, 33:77], x.v[:, 33:77]) for x in whole)
        assert_same_rows(middle, tuple(type(x)(x.k.copy(), x.v.copy()) for x in sliced))

    def test_load_at_the_wrong_place_is_refused(self, engine: Engine) -> None:
        ids = self.ids(engine, 60)
        feed(engine, 0, ids)
        rows = engine.export(0, 40, 60)
        engine.truncate(0, 40)
        for start in (39, 41, 0):
            with pytest.raises(EngineFault):
                engine.load(0, start, rows)
            assert engine.n_rows(0) == 40
        engine.load(0, 40, rows)
        assert engine.n_rows(0) == 60

    def test_export_of_rows_that_do_not_exist_is_refused(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 20))
        for start, stop in ((0, 21), (20, 21), (5, 5)):
            with pytest.raises(EngineFault):
                engine.export(0, start, stop)

    def test_truncate_then_continue(self, engine: Engine) -> None:
        ids, more = self.ids(engine, 70), self.ids(engine, 25, 1)
        feed(engine, 0, ids)
        tokens, reference = greedy(engine, 0, more, 8)
        engine.truncate(0, 0)
        feed(engine, 0, [*ids, *self.ids(engine, 40, 2)])
        engine.truncate(0, 70)
        assert engine.n_rows(0) == 70
        first = feed(engine, 0, more)
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact)

    def test_truncate_to_the_present_length_changes_nothing(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 50))
        before = engine.export(0, 0, 50)
        engine.truncate(0, 50)
        assert engine.n_rows(0) == 50
        assert_same_rows(engine.export(0, 0, 50), before)

    def test_fork_shares_a_prefix_and_both_go_on_alone(self, engine: Engine) -> None:
        ids = self.ids(engine, 80)
        ways = (self.ids(engine, 20, 1), self.ids(engine, 20, 2))
        wanted = []
        for way in ways:
            feed(engine, 0, ids[:64])
            wanted.append(greedy(engine, 0, way, 6))
            engine.truncate(0, 0)
        feed(engine, 0, ids)
        engine.fork(0, 1, 64)
        assert (engine.n_rows(0), engine.n_rows(1)) == (80, 64)
        engine.truncate(0, 64)
        for seq_id, way, (tokens, reference) in zip((1, 0), ways, wanted, strict=True):
            first = feed(engine, seq_id, way)
            assert_equal(reference, forced(engine, seq_id, tokens, first), exact=self.exact)
        engine.truncate(0, 0)
        assert engine.n_rows(1) > 64
        tokens, reference = wanted[0]
        engine.truncate(1, 64)
        first = feed(engine, 1, ways[0])
        assert_equal(reference, forced(engine, 1, tokens, first), exact=self.exact)

    def test_fork_into_a_sequence_in_use_is_refused(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 10))
        feed(engine, 1, self.ids(engine, 12, 1))
        with pytest.raises(EngineFault):
            engine.fork(0, 1, 5)
        assert engine.n_rows(1) == 12

    def test_another_sequence_is_untouched(self, engine: Engine) -> None:
        ids, other = self.ids(engine, 90), self.ids(engine, 70, 1)
        feed(engine, 1, other)
        before = engine.export(1, 0, 70)
        tokens, reference = greedy(engine, 1, self.ids(engine, 5, 2), 6)
        engine.truncate(1, 70)
        feed(engine, 0, ids)
        rows = engine.export(0, 0, 90)
        engine.truncate(0, 30)
        engine.truncate(0, 0)
        engine.load(0, 0, rows)
        assert engine.n_rows(1) == 70
        assert_same_rows(engine.export(1, 0, 70), before)
        first = feed(engine, 1, self.ids(engine, 5, 2))
        assert_equal(reference, forced(engine, 1, tokens, first), exact=self.exact)

    def test_a_step_beyond_the_batch_is_a_fault_and_no_end(self, engine: Engine) -> None:
        tokens, reference = greedy(engine, 0, self.ids(engine, 30), 4)
        engine.truncate(0, 0)
        n = engine.n_batch + engine.n_seq_max
        with pytest.raises(EngineFault):
            engine.step([Chunk(0, self.ids(engine, n + 1), 0, True)])
        assert engine.n_rows(0) == 0
        first = feed(engine, 0, self.ids(engine, 30))
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact)

    def test_more_tokens_than_cells_is_a_fault_and_no_end(self, engine: Engine) -> None:
        tokens, reference = greedy(engine, 0, self.ids(engine, 30), 4)
        engine.truncate(0, 0)
        chunk = 256

        def feed_chunk(number: int) -> None:
            seq_id = number % 2
            ids = self.ids(engine, chunk, seq_id)
            engine.step([Chunk(seq_id, ids, engine.n_rows(seq_id), False)])

        for number in range(engine.n_cells // chunk):
            feed_chunk(number)
        with pytest.raises(EngineFault):
            feed_chunk(engine.n_cells // chunk)
        for seq_id in range(2):
            engine.truncate(seq_id, 0)
            assert engine.n_rows(seq_id) == 0
        first = feed(engine, 0, self.ids(engine, 30))
        assert_equal(reference, forced(engine, 0, tokens, first), exact=self.exact)

    def test_a_step_at_the_wrong_position_is_refused(self, engine: Engine) -> None:
        feed(engine, 0, self.ids(engine, 10))
        with pytest.raises(EngineFault):
            engine.step([Chunk(0, [5], 12, True)])
        assert engine.n_rows(0) == 10

    def test_n_rows_is_the_truth(self, engine: Engine) -> None:
        assert [engine.n_rows(i) for i in range(engine.n_seq_max)] == [0] * engine.n_seq_max
        feed(engine, 2, self.ids(engine, 31))
        engine.step([Chunk(0, self.ids(engine, 3), 0, False), Chunk(2, [5], 31, False)])
        assert [engine.n_rows(i) for i in range(3)] == [3, 0, 32]
        engine.truncate(2, 11)
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
