"""The llama.cpp engine on cells of q4_1: stored codes go in and come out as they are.

The contract holds, with its usual limits, except for one clause: float16 rows that are loaded are
quantized, so they do not come back bit for bit. What comes back bit for bit is the codec's tensors.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines.base import Engine
from actors.errors import EngineFault, ModelUnavailable
from storage.codec import Tensors, concat_rows, decode_rows, encode_rows, get_codec, slice_rows
from storage.spec import GroupRows, KVRows, LayerSpec, ModelCacheSpec
from tests.engine_contract import EngineContract, _log_softmax, assert_equal, feed, forced
from tests.loops import assistant, make_loop, memory_of, run, settle, user
from tests.test_llama_engine import emptied, open_engine

Q4 = get_codec("q4")


def open_quantized(path: Path, n_threads: int = 1) -> Any:
    from actors.engines.llama_engine import LlamaEngine

    return LlamaEngine(
        path, n_seq_max=3, n_ctx=1024, n_cells=1024, n_threads=n_threads, kv_type="q4_1"
    )


def opened(name: str) -> Callable[[dict[str, Path]], Iterator[Any]]:
    """A fixture: the tiny model of that name, on quantized cells."""

    @pytest.fixture(scope="module")
    def engine(tiny_models: dict[str, Path]) -> Iterator[Any]:
        engine = open_quantized(tiny_models[name])
        yield engine
        engine.close()

    return engine


interleaved, half_split = opened("llama64"), opened("qwen3")
BOTH = pytest.mark.parametrize("model", ["llama64", "qwen3"])


@pytest.fixture
def quantized(model: str, request: pytest.FixtureRequest) -> Any:
    return emptied(
        request.getfixturevalue({"llama64": "interleaved", "qwen3": "half_split"}[model])
    )


def assert_same_codes(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name].view(np.uint8), array.view(np.uint8))


class QuantizedContract(EngineContract):
    def test_rows_loaded_block_by_block_give_the_same_logits_bit_for_bit(self, engine: Any) -> None:
        ids = self.ids(engine, 300)
        feed(engine, 0, ids)
        rows = engine.export(0, 0, 300)
        whole = encode_rows(engine.key.spec, Q4, rows)
        for blocks in ([(0, 256), (256, 300)], [(0, 100), (100, 256), (256, 300)]):
            engine.truncate(0, 0)
            for start, stop in blocks:
                engine.load_encoded(0, start, slice_rows(whole, start, stop))
                assert engine.n_rows(0) == stop
            assert_same_codes(engine.export_encoded(0, 0, 300), whole)
            again = feed(engine, 0, [7])
            if blocks[0] == (0, 256):
                expected = again
        assert_equal(expected[None], again[None], exact=True)


class TestInterleavedRope(QuantizedContract):
    @pytest.fixture
    def engine(self, interleaved: Engine) -> Engine:
        return emptied(interleaved)


class TestHalfSplitRope(QuantizedContract):
    @pytest.fixture
    def engine(self, half_split: Engine) -> Engine:
        return emptied(half_split)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@BOTH
def test_computed_rows_are_exported_as_the_model_means_them(
    quantized: Any, tiny_models: dict[str, Path], model: str
) -> None:
    """In layer 0 nothing but llama.cpp's quantization of these rows lies between the two."""
    plain = open_engine(tiny_models[model])
    ids = list(range(5, 105))
    for engine in (plain, quantized):
        feed(engine, 0, ids)
    wanted, found = plain.export(0, 0, 100)[0], quantized.export(0, 0, 100)[0]
    plain.close()
    assert 0.01 < distance(wanted.k[0], found.k[0]) < 0.1
    assert 0.01 < distance(wanted.v[0], found.v[0]) < 0.1


@BOTH
def test_loaded_codes_are_exported_as_the_codec_decodes_them(quantized: Any, model: str) -> None:
    tensors = sample(quantized, 300)
    quantized.load_encoded(0, 0, slice_rows(tensors, 0, 256))
    quantized.load_encoded(0, 256, slice_rows(tensors, 256, 300))
    assert_same_codes(quantized.export_encoded(0, 33, 290), slice_rows(tensors, 33, 290))
    found = quantized.export(0, 0, 300)
    wanted = decode_rows(quantized.key.spec, Q4, tensors)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(x.k.astype("f4"), y.k.astype("f4"), atol=4e-3)
        np.testing.assert_allclose(x.v.astype("f4"), y.v.astype("f4"), atol=4e-3)


def sample(engine: Engine, n: int) -> Tensors:
    """The codec's tensors of n rows of noise."""
    rng = np.random.default_rng(n)
    rows = []
    for g in engine.key.spec.groups:
        lead = (len(g.layers), n, g.n_kv_heads)
        k, v = rng.standard_normal((2, *lead, g.key_dim)).astype(np.float16)
        rows.append(GroupRows(k, v))
    return encode_rows(engine.key.spec, Q4, tuple(rows))


@BOTH
def test_loaded_float16_rows_are_quantized_once_by_the_codec(quantized: Any, model: str) -> None:
    tensors = sample(quantized, 40)
    rows = decode_rows(quantized.key.spec, Q4, tensors)
    quantized.load(0, 0, rows)
    assert_same_codes(quantized.export_encoded(0, 0, 40), encode_rows(quantized.key.spec, Q4, rows))


@BOTH
def test_codes_of_computed_rows_are_refused(quantized: Any, model: str) -> None:
    feed(quantized, 0, [5, 6, 7])
    with pytest.raises(EngineFault, match=r"0\.\.3 were not loaded"):
        quantized.export_encoded(0, 0, 3)


@BOTH
def test_codes_at_a_wrong_place_or_of_no_rows_change_nothing(quantized: Any, model: str) -> None:
    tensors = sample(quantized, 20)
    quantized.load_encoded(0, 0, tensors)
    uneven = tensors | {n: x[:, :5] for n, x in tensors.items() if ".v." in n}
    for start, wrong in ((19, tensors), (21, tensors), (20, slice_rows(tensors, 0, 0))):
        with pytest.raises(EngineFault):
            quantized.load_encoded(0, start, wrong)
    with pytest.raises(EngineFault, match="different lengths"):
        quantized.load_encoded(0, 20, uneven)
    assert quantized.n_rows(0) == 20
    assert_same_codes(quantized.export_encoded(0, 0, 20), tensors)


@BOTH
def test_quantized_cells_take_less_than_a_third(
    quantized: Any, tiny_models: dict[str, Path], model: str
) -> None:
    plain = open_engine(tiny_models[model])
    assert plain.n_cells == quantized.n_cells
    assert quantized.kv_bytes == plain.kv_bytes * 20 // 64
    plain.close()


# ---- refusals


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("llama", "head dim 32"),
        ("llama128", "head dim 128: interleaved rope"),
        ("gemma3", "sliding or latent layers"),
        ("deepseek2", "sliding or latent layers"),
    ],
)
def test_a_model_whose_codes_would_lose_is_refused(
    tiny_models: dict[str, Path], model: str, reason: str
) -> None:
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        open_quantized(tiny_models[model])
    assert str(caught.value).startswith("kv_type = q4_1: ")
    assert "\n" not in str(caught.value)


def test_geometries_that_llama_cpp_rotates_otherwise_are_refused() -> None:
    pytest.importorskip("llama_cpp")
    from actors.engines.llama_rows import Layout
    from actors.engines.llama_spec import Rope

    layer, rope = LayerSpec("full", 2, 64, 64), Rope(True, 0, 64, ())
    spec = ModelCacheSpec("some", (layer,) * 2)
    assert Layout(spec, rope, "q4_1").codec is Q4
    partial = replace(rope, dims=32)
    mixed = replace(spec, layers=(layer, LayerSpec("full", 2, 128, 64)))
    for wrong, turned, reason in (
        (spec, partial, "rope over 32 of 64 dims"),
        (mixed, replace(rope, interleaved=False), "different head dims"),
    ):
        Layout(wrong, turned, "f16")
        with pytest.raises(ModelUnavailable, match=reason):
            Layout(wrong, turned, "q4_1")
    Layout(spec, replace(partial, interleaved=False), "q4_1")


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_a_switched_off_rotation_is_refused(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", value)
    with pytest.raises(ModelUnavailable, match="LLAMA_ATTN_ROT_DISABLE must not be set"):
        open_quantized(tiny_models["llama64"])
    open_engine(tiny_models["llama64"]).close()


# ---- through a replica


def held(loop: Any) -> tuple[Tensors, int]:
    """The stored tensors of the agent's branch, and the engine's sequence of it."""
    memory = memory_of(loop)
    (branch,) = memory.branches
    pieces = [loop.memory.rows.runs.tensors(memory, run, "full") for run in branch.runs]
    assert None not in pieces
    return concat_rows(pieces), loop.residency.find(branch)


@BOTH
def test_turns_go_on_from_stored_codes(
    tiny_models: dict[str, Path], tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(open_quantized(tiny_models[model]), tmp_path, codec="q4")
    messages = [user("What did the fishermen see? " * 12)]
    first = run(loop, messages, n=20)
    messages += [assistant(first.text), user("Why?")]
    settle(loop)
    stored, _ = held(loop)
    loop.close()

    engine = open_quantized(tiny_models[model])
    exported = []
    export = engine.export

    def watched(seq_id: int, start: int, stop: int) -> KVRows:
        exported.append(start)
        return export(seq_id, start, stop)

    monkeypatch.setattr(engine, "export", watched)
    monkeypatch.setattr(engine, "load", None)  # nothing is decoded
    loop = make_loop(engine, tmp_path, codec="q4")
    second = run(loop, messages, n=20)
    assert second.cache == "warm"
    assert second.cached > 256  # a block and a tail
    settle(loop)
    after, seq_id = held(loop)
    n = second.cached
    assert_same_codes(slice_rows(after, 0, n), slice_rows(stored, 0, n))
    resident = loop.call(lambda: engine.export_encoded(seq_id, 0, n)).result(30)
    assert_same_codes(resident, slice_rows(stored, 0, n))
    assert min(exported) == n  # what came from the store is not exported again
    messages += [assistant(second.text), user("And then?")]
    assert run(loop, messages, n=5).cache == "hot"
    assert not loop.memory.faults
    loop.close()


STORY = EngineContract.prompts[0]


@pytest.mark.model
def test_stored_codes_in_quantized_cells_mean_what_decoded_rows_mean(smollm2_gguf: Path) -> None:
    """KL of going on from the same stored codes, on q4_1 cells and decoded on f16 cells. What
    differs is arithmetic on q4_1 and how new rows are kept."""
    plain = open_engine(smollm2_gguf, n_threads=2)
    ids = plain.vocab.tokenize(STORY)
    ids, reply = ids[:-40], ids[-40:]
    n, spec = len(ids), plain.key.spec
    feed(plain, 0, ids)
    tensors = encode_rows(spec, Q4, plain.export(0, 0, n))
    plain.truncate(0, 0)
    plain.load(0, 0, decode_rows(spec, Q4, tensors))
    reference = forced(plain, 0, reply[1:], feed(plain, 0, reply[:1]))
    plain.close()
    engine = open_quantized(smollm2_gguf, n_threads=2)
    engine.load_encoded(0, 0, tensors)
    assert_same_codes(engine.export_encoded(0, 0, n), tensors)
    got = forced(engine, 0, reply[1:], feed(engine, 0, reply[:1]))
    engine.truncate(0, 0)
    shuffled = tensors | {"full.0.k.codes": tensors["full.0.k.codes"][..., ::-1].copy()}
    engine.load_encoded(0, 0, shuffled)
    broken = forced(engine, 0, reply[1:], feed(engine, 0, reply[:1]))
    engine.close()
    kl = mean_kl(reference, got)
    print(f"KL of q4_1 cells to f16 cells, from the same {n} stored rows: {kl:.4f}")
    assert kl < 0.05
    assert mean_kl(reference, broken) > 1


def mean_kl(reference: np.ndarray, other: np.ndarray) -> float:
    p, q = _log_softmax(reference), _log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())
