"""One agent's rows under llama.cpp and under MLX: what crosses, and how little it changes.

KL is in nats per token, of the run that crossed to the engine that it came from, which went on
undisturbed; the reference's text is forced on both. Two engines that share no row differ, too, and
one engine differs from itself when its rows lie elsewhere: those noise floors are printed beside
every figure.
"""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.branches import positions
from actors.engines.base import Chunk, Engine, count_rows
from storage.codec import (
    Tensors,
    concat_rows,
    decode_rows,
    encode_rows,
    get_codec,
    merge_parts,
    slice_rows,
)
from storage.quantizers import Affine
from storage.spec import GroupRows, KVRows
from tests.engine_contract import EngineContract, assert_same_rows, both, feed
from tests.loops import assistant, make_loop, memory_of, run, settle, user
from tests.require import require

pytestmark = pytest.mark.long

F16, Q4 = get_codec("f16"), get_codec("q4")
LIMIT = 0.02  # nats
STORY = " ".join(EngineContract.prompts)
CROSSING = ["no_template", "qwen2", "qwen3", "gemma3", "deepseek2"]
each_model = pytest.mark.parametrize("model", CROSSING)


def open_llama(path: Path, kv_type: str = "f16") -> Any:
    from actors.engines.llama_engine import LlamaEngine

    return LlamaEngine(path, n_seq_max=3, n_ctx=1024, n_cells=1024, n_threads=2, kv_type=kv_type)


def open_mlx(path: Path, cells: str = "f16") -> Any:
    for package in ("mlx", "mlx_lm"):
        found = importlib.util.find_spec(package) is not None
        require("mlx", found, f"{package} is not installed")
    from actors.engines.mlx_engine import MlxEngine

    return MlxEngine(path, n_seq_max=3, n_ctx=1024, n_cells=1024, cells=cells)


def go_on(engine: Engine, ids: list[int], *, keep: bool = False) -> np.ndarray:
    """Log-probabilities at each of `ids`, fed in one step; their rows are cut off or kept."""
    n = engine.n_rows(0)
    logits = engine.step([Chunk(0, ids, n, len(ids))])[0].astype(np.float64)
    if not keep:
        engine.truncate(0, n)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    return float((np.exp(reference) * (reference - other)).sum(-1).mean())


def replace_rows(engine: Engine, rows: KVRows) -> Engine:
    engine.truncate(0, 0)
    engine.load(0, 0, rows)
    return engine


def through(codec: Any, engine: Engine, rows: KVRows) -> KVRows:
    """What a store gives back."""
    spec = engine.key.spec
    full, sliding = (
        decode_rows(spec, codec, encode_rows(spec, codec, rows, part), part)
        for part in ("full", "sliding")
    )
    return merge_parts(spec, full, sliding)


def assert_same_codes(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].view(np.uint8), b[name].view(np.uint8), name)


@each_model
def test_both_engines_have_one_key_and_one_tokenizer(
    tiny_models: dict[str, Path], model: str
) -> None:
    mlx, llama = open_mlx(tiny_models[model]), open_llama(tiny_models[model])
    assert mlx.key.mismatches(llama.key) == []
    assert mlx.key.digest == llama.key.digest
    text = STORY + " Grüße, 世界! 🙂<|im_end|>\n"
    assert mlx.vocab.tokenize(text) == llama.vocab.tokenize(text)
    for field in ("size", "bos", "add_bos", "eog", "chat_template", "bos_text", "eos_text"):
        assert getattr(mlx.vocab, field) == getattr(llama.vocab, field), field
    for engine in (mlx, llama):
        engine.close()


@each_model
def test_rows_make_the_round_trip_bit_for_bit(tiny_models: dict[str, Path], model: str) -> None:
    """And after ten engines they are what they were after one."""
    mlx, llama = open_mlx(tiny_models[model]), open_llama(tiny_models[model])
    ids = llama.vocab.tokenize(STORY)[:200]
    for source, other in ((llama, mlx), (mlx, llama)):
        source.truncate(0, 0)
        feed(source, 0, ids)
        rows = both(source, 0, 0, 200)
        hopped = rows
        for hop in range(10):
            engine = (other, source)[hop % 2]
            hopped = both(replace_rows(engine, hopped), 0, 0, 200)
            assert_same_rows(hopped, rows)
    for engine in (mlx, llama):
        engine.close()


@each_model
def test_either_engine_goes_on_from_the_others_rows(
    tiny_models: dict[str, Path], model: str
) -> None:
    mlx, llama = open_mlx(tiny_models[model]), open_llama(tiny_models[model])
    ids = llama.vocab.tokenize(STORY)[:170]
    own, rows = {}, {}
    for engine in (llama, mlx):
        feed(engine, 0, ids[:120])
        rows[engine.name] = both(engine, 0, 0, 120)
        own[engine.name] = go_on(engine, ids[120:])
    floor = kl(own["llama.cpp"], own["mlx"])
    for source, other in ((llama, mlx), (mlx, llama)):
        crossed = go_on(replace_rows(other, rows[source.name]), ids[120:])
        found = kl(own[source.name], crossed)
        print(f"{model}: {source.name} -> {other.name} KL {found:.1e}, without rows {floor:.1e}")
        assert found <= LIMIT
        assert (own[source.name].argmax(-1) == crossed.argmax(-1)).mean() > 0.9
    for engine in (mlx, llama):
        engine.close()


@pytest.mark.parametrize("model", ["gemma3"])
def test_a_window_crosses_with_nothing_before_it(tiny_models: dict[str, Path], model: str) -> None:
    """Sliding rows of the last window only, as a store keeps them."""
    mlx, llama = open_mlx(tiny_models[model], "q4"), open_llama(tiny_models[model])
    ids, w = llama.vocab.tokenize(STORY)[:250], llama.window
    feed(llama, 0, ids[:200])
    full = llama.export(0, 0, 200)
    window = llama.export_window(0, 200 - w + 1, 200)
    tensors = encode_rows(llama.key.spec, Q4, full)
    sliding = encode_rows(llama.key.spec, Q4, window, "sliding")
    mlx.load_encoded(0, 0, tensors | sliding)
    assert (mlx.n_rows(0), mlx.window_start(0)) == (200, 200 - w + 1)
    assert_same_codes(mlx.export_encoded(0, 0, 200), tensors)
    decoded = decode_rows(llama.key.spec, Q4, sliding, "sliding")
    assert_same_rows(mlx.export_window(0, 0, 200), decoded)
    own = go_on(llama, ids[200:])
    lossy = merge_parts(llama.key.spec, decode_rows(llama.key.spec, Q4, tensors), decoded)
    codec = kl(own, go_on(replace_rows(llama, lossy), ids[200:]))
    found = kl(own, go_on(mlx, ids[200:]))
    print(f"{model}: KL {found:.1e}, of the codec alone {codec:.1e}")
    assert found <= LIMIT + 1.5 * codec
    for engine in (mlx, llama):
        engine.close()


def test_codes_are_the_same_in_cells_of_both(tiny_models: dict[str, Path]) -> None:
    """ggml's Q4_1 blocks and MLX's words hold one and the same codes, scales and biases."""
    path = tiny_models["llama64"]
    llama, mlx, plain = open_llama(path, "q4_1"), open_mlx(path, "q4"), open_llama(path)
    feed(plain, 0, plain.vocab.tokenize(STORY)[:150])
    codes = encode_rows(plain.key.spec, Q4, plain.export(0, 0, 150))
    for hop in range(10):
        engine = (mlx, llama)[hop % 2]
        engine.truncate(0, 0)
        engine.load_encoded(0, 0, codes)
        found = engine.export_encoded(0, 0, 150)
        assert_same_codes(found, codes)
        codes = found
    mlx.truncate(0, 0)
    feed(mlx, 0, plain.vocab.tokenize(STORY)[:150])
    computed = mlx.export_encoded(0, 0, 150)  # of rows that MLX has computed
    llama.truncate(0, 0)
    llama.load_encoded(0, 0, computed)
    assert_same_codes(llama.export_encoded(0, 0, 150), computed)
    for engine in (mlx, llama, plain):
        engine.close()


class Counts:
    """Of rows encoded: by the replica, by cells of codes (once for each layer and side), and of
    tokens that the engine computed."""

    def __init__(self) -> None:
        self.handed_over = self.in_cells = self.computed = 0

    def begin(self, engine: Any) -> None:
        self.__init__()  # type: ignore[misc]
        step = engine.step

        def counting(chunks: Any) -> Any:
            self.computed += sum(len(chunk.token_ids) for chunk in chunks)
            return step(chunks)

        engine.step = counting


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counts:
    require("mlx", importlib.util.find_spec("mlx") is not None, "mlx is not installed")
    from actors import rows
    from actors.engines import mlx_codec

    counts, encode_cells = Counts(), mlx_codec.encode

    def hand_over(spec: Any, codec: Any, x: KVRows, part: Any = "full", **options: Any) -> Tensors:
        counts.handed_over += count_rows(x) if part == "full" else 0
        return encode_rows(spec, codec, x, part, **options)

    def in_cells(quantizer: Any, x: Any) -> Any:
        counts.in_cells += x.shape[0] * x.shape[2] if isinstance(quantizer, Affine) else 0
        return encode_cells(quantizer, x)

    monkeypatch.setattr(rows, "encode_rows", hand_over)
    monkeypatch.setattr(mlx_codec, "encode", in_cells)
    return counts


def stored_rows(loop: Any) -> dict[tuple[str, int], bytes]:
    """(tensor, position) -> the row's bits, of what the agent's branch has stored."""
    memory, found = memory_of(loop), {}
    for start, one in positions(memory.branches[0]):
        for part in ("full", "sliding"):
            has = part == "full" or one.has_window
            tensors = loop.memory.rows.runs.tensors(memory, one, part) if has else {}
            for name, x in tensors.items():
                first = start + one.rows - x.shape[1]  # a window ends where its run does
                for i in range(x.shape[1]):
                    found[f"{part}.{name}", first + i] = x[:, i].tobytes()
    return found


@pytest.mark.parametrize(
    ("model", "codec", "cells"),
    [
        ("llama64", "f16", "f16"),
        ("llama64", "q4", "q4"),
        ("llama64", "q4", "f16"),
        ("gemma3", "q4", "q4"),
        ("deepseek2", "q4", "q4"),
    ],
)
def test_a_conversation_changes_engine_ten_times(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    model: str,
    codec: str,
    cells: str,
    counted: Counts,
) -> None:
    """Through the store: every turn finds all rows that the turn before left there, only the rows
    it adds are encoded, and what is stored keeps its bits."""
    messages, held = [user("What did the fishermen see? " * 8)], 0
    stored: dict[tuple[str, int], bytes] = {}
    for turn in range(11):
        mlx = turn % 2 == 1
        engine = open_mlx(tiny_models[model], cells) if mlx else open_llama(tiny_models[model])
        counted.begin(engine)
        loop = make_loop(engine, tmp_path, codec=codec, node=f"n{turn % 2}")
        answer = run(loop, messages, n=6, turn_id=f"turn{turn}")
        assert answer.cached == held
        assert (answer.cache == "cold") == (turn == 0)
        settle(loop)
        (branch,) = memory_of(loop).branches
        if engine.exports_encoded:  # by the cells, as they are computed
            assert counted.handed_over == 0
            sides = sum(2 if g.value_dim else 1 for g in engine.key.spec.groups for _ in g.layers)
            sliding = sum(2 * len(g.layers) for g in engine.key.spec.groups if g.part == "sliding")
            assert counted.in_cells == counted.computed * (sides - sliding)
        else:
            assert (counted.handed_over, counted.in_cells) == (branch.rows - held, 0)
        found = stored_rows(loop)
        assert found.keys() - stored.keys()
        assert all(found[place] == raw for place, raw in stored.items() if place in found)
        assert {at for at in stored if at[0].startswith("full.")} <= found.keys()
        stored, held = stored | found, branch.rows
        assert held >= len(answer.prompt)
        assert not loop.memory.faults
        loop.close()
        messages += [assistant(answer.text), user(f"And then? {turn}")]
    assert held > 256  # a block was sealed on the way


# ---- the real model


@dataclass
class Crossing:
    """SmolLM2's rows of 78 tokens, and log-probabilities of 50 more under several histories."""

    rows: KVRows
    mlx_rows: KVRows
    llama: np.ndarray  # own rows
    mlx: np.ndarray  # own rows
    to_mlx: np.ndarray
    to_llama: np.ndarray


N, MORE = 78, 50
SHARE = 20  # of the first N, computed by either engine where they take turns


@pytest.fixture(scope="module")
def engines(smollm2_gguf: Path) -> Iterator[tuple[Any, Any]]:
    pair = open_llama(smollm2_gguf), open_mlx(smollm2_gguf)
    yield pair
    for engine in pair:
        engine.close()


@pytest.fixture(scope="module")
def crossing(engines: tuple[Any, Any]) -> Crossing:
    llama, mlx = engines
    ids = llama.vocab.tokenize(STORY)[: N + MORE]
    own, rows = [], []
    for engine in engines:
        feed(engine, 0, ids[:N])
        rows.append(both(engine, 0, 0, N))
        own.append(go_on(engine, ids[N:]))
    to_mlx = go_on(replace_rows(mlx, rows[0]), ids[N:])
    to_llama = go_on(replace_rows(llama, rows[1]), ids[N:])
    return Crossing(rows[0], rows[1], own[0], own[1], to_mlx, to_llama)


@pytest.mark.model
@pytest.mark.timeout(600)
def test_smollm2_goes_on_across_engines(engines: tuple[Any, Any], crossing: Crossing) -> None:
    llama, mlx = engines
    assert mlx.key.digest == llama.key.digest
    floor = kl(crossing.llama, crossing.mlx)
    there, back = kl(crossing.llama, crossing.to_mlx), kl(crossing.mlx, crossing.to_llama)
    print(f"llama.cpp -> mlx KL {there:.4f}, mlx -> llama.cpp {back:.4f}, without rows {floor:.4f}")
    assert there <= LIMIT
    assert back <= LIMIT
    assert_same_rows(both(replace_rows(mlx, crossing.rows), 0, 0, N), crossing.rows)
    assert_same_rows(both(replace_rows(llama, crossing.mlx_rows), 0, 0, N), crossing.mlx_rows)


@pytest.mark.model
@pytest.mark.timeout(600)
def test_smollm2_goes_on_from_four_bits(
    engines: tuple[Any, Any], crossing: Crossing, smollm2_gguf: Path
) -> None:
    """Codes as a llama node has stored them, attended to as they are."""
    llama, _ = engines
    ids = llama.vocab.tokenize(STORY)[N : N + MORE]
    codec = kl(crossing.llama, go_on(replace_rows(llama, through(Q4, llama, crossing.rows)), ids))
    codes = encode_rows(llama.key.spec, Q4, crossing.rows)
    quantized = open_mlx(smollm2_gguf, "q4")
    quantized.load_encoded(0, 0, codes)
    assert_same_codes(quantized.export_encoded(0, 0, N), codes)
    found = kl(crossing.llama, go_on(quantized, ids))
    quantized.close()
    floor = kl(crossing.llama, crossing.mlx)
    print(f"q4 llama.cpp -> mlx KL {found:.4f}, codec {codec:.4f}, engines {floor:.4f}")
    assert found <= LIMIT + codec


@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.parametrize("codec", [F16, Q4], ids=["f16", "q4"])
def test_ten_hops_are_no_worse_than_two(
    engines: tuple[Any, Any], crossing: Crossing, codec: Any
) -> None:
    """Of rows that llama.cpp, MLX and llama.cpp again have computed, and the same text after them.
    Every hop loads what the one before exported; what was stored stays as it was encoded."""
    llama, mlx = engines
    ids, spec = llama.vocab.tokenize(STORY)[: N + MORE], llama.key.spec

    def walked(detours: int) -> float:
        """Two hops and two more for each detour, taken before each engine's share."""
        first = slice_rows(encode_rows(spec, F16, crossing.rows), 0, N - 2 * SHARE)
        stored = encode_rows(spec, codec, decode_rows(spec, F16, first))
        for at, engine in ((N - 2 * SHARE, mlx), (N - SHARE, llama)):
            rows = decode_rows(spec, codec, stored)
            for _ in range(detours):
                other = llama if engine is mlx else mlx
                rows = both(replace_rows(engine, rows), 0, 0, at)
                rows = both(replace_rows(other, rows), 0, 0, at)
            feed(replace_rows(engine, rows), 0, ids[at : at + SHARE])
            added = encode_rows(spec, codec, engine.export(0, at, at + SHARE))
            stored = concat_rows([stored, added])
        ended = replace_rows(llama, decode_rows(spec, codec, stored))
        return kl(crossing.llama, go_on(ended, ids[N:]))

    two, ten, floor = walked(0), walked(2), kl(crossing.llama, crossing.mlx)
    print(f"{codec.name}: 2 hops KL {two:.4f}, 10 hops {ten:.4f}, without rows {floor:.4f}")
    assert ten <= 1.1 * two


@pytest.mark.model
@pytest.mark.timeout(600)
def test_engines_that_take_ten_turns_are_no_worse_than_two(
    engines: tuple[Any, Any], crossing: Crossing
) -> None:
    """Each computes half of the same 40 rows, a half at once or 4 rows at a time; either begins
    once, so that every row is computed by both. llama.cpp differs from itself when it computes
    those rows again after others are loaded: what ten turns add is small against that."""
    llama, mlx = engines
    ids = llama.vocab.tokenize(STORY)[: N + MORE]

    def in_turns(hops: int, order: tuple[Any, Any]) -> float:
        at, rows = N - 2 * SHARE, crossing.rows
        rows = tuple(GroupRows(x.k[:, :at], x.v[:, :at]) for x in rows)
        for number in range(hops):
            engine, n = order[number % 2], 2 * SHARE // hops
            feed(replace_rows(engine, rows), 0, ids[at : at + n])
            at += n
            rows = both(engine, 0, 0, at)
        return kl(crossing.llama, go_on(replace_rows(llama, rows), ids[N:]))

    found = [[in_turns(hops, order) for order in ((mlx, llama), (llama, mlx))] for hops in (2, 10)]
    (two, ten), alone = np.mean(found, axis=1), in_turns(2, (llama, llama))
    print(f"in turns: 2 hops KL {two:.4f}, 10 hops {ten:.4f}, llama.cpp alone {alone:.4f}")
    assert two <= LIMIT
    assert ten <= 1.1 * two + alone / 4
