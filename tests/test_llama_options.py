"""The llama.cpp engine on other options than its own: without flash attention (V transposed), on
cells of q8_0 and q4_0, on small micro-batches.

Without flash attention the contract holds as it is. Quantized cells keep it with one clause less:
float16 rows that are loaded are quantized. What was computed is then nearly the same, and what was
loaded twice is the same bit for bit.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines import llama_context
from actors.engines.base import Engine
from actors.engines.options import EngineOptions
from actors.errors import ModelUnavailable
from storage.spec import KVRows
from tests.engine_contract import (
    EngineContract,
    SlidingContract,
    assert_equal,
    assert_same_rows,
    both,
    feed,
)
from tests.test_llama_engine import emptied, open_engine


def open_with(path: Path, **options: Any) -> Any:
    from actors.engines.llama_engine import LlamaEngine

    return LlamaEngine(path, n_seq_max=3, n_ctx=1024, n_cells=1024, n_threads=1, **options)


def opened(name: str, **options: Any) -> Callable[[dict[str, Path]], Iterator[Any]]:
    """A fixture: the tiny model of that name on an engine of these options."""

    @pytest.fixture(scope="module")
    def engine(tiny_models: dict[str, Path]) -> Iterator[Any]:
        engine = open_with(tiny_models[name], **options)
        yield engine
        engine.close()

    return engine


plain_llama = opened("llama", flash_attention=False)
plain_gemma3 = opened("gemma3", flash_attention=False, n_ubatch=64)
plain_deepseek2 = opened("deepseek2", flash_attention=False)
plain_uneven = opened("uneven", flash_attention=False)
q8_llama, q8_qwen3 = opened("llama64", kv_type="q8_0"), opened("qwen3", kv_type="q8_0")
q8_gemma3 = opened("gemma3", kv_type="q8_0", n_ubatch=128)
q8_deepseek2 = opened("deepseek2", kv_type="q8_0")
q4_qwen3 = opened("qwen3", kv_type="q4_0")


class TestNoFlashAttention(EngineContract):
    @pytest.fixture
    def engine(self, plain_llama: Engine) -> Engine:
        return emptied(plain_llama)


class TestNoFlashAttentionSliding(SlidingContract):
    @pytest.fixture
    def engine(self, plain_gemma3: Engine) -> Engine:
        return emptied(plain_gemma3)


class TestNoFlashAttentionLatent(EngineContract):
    @pytest.fixture
    def engine(self, plain_deepseek2: Engine) -> Engine:
        return emptied(plain_deepseek2)


class TestNoFlashAttentionUneven(EngineContract):
    @pytest.fixture
    def engine(self, plain_uneven: Engine) -> Engine:
        return emptied(plain_uneven)


class Quantized(EngineContract):
    def test_rows_loaded_block_by_block_give_the_same_logits_bit_for_bit(self, engine: Any) -> None:
        ids = self.ids(engine, 300)
        feed(engine, 0, ids)
        computed = both(engine, 0, 0, 300)
        seen, rows = [], []
        for blocks in ([(0, 256), (256, 300)], [(0, 100), (100, 256), (256, 300)]):
            engine.truncate(0, 0)
            for start, stop in blocks:
                engine.load(0, start, cut(computed, start, stop, 300))
            rows.append(both(engine, 0, 0, 300))
            seen.append(feed(engine, 0, [7]))
        assert_same_rows(rows[0], rows[1])
        assert_equal(seen[0][None], seen[1][None], exact=True)
        assert loss(computed, rows[0]) < 2e-3


class TestQ8Llama(Quantized):
    @pytest.fixture
    def engine(self, q8_llama: Engine) -> Engine:
        return emptied(q8_llama)


class TestQ8Qwen3(Quantized):
    @pytest.fixture
    def engine(self, q8_qwen3: Engine) -> Engine:
        return emptied(q8_qwen3)


class TestQ8DeepSeek2(Quantized):
    @pytest.fixture
    def engine(self, q8_deepseek2: Engine) -> Engine:
        return emptied(q8_deepseek2)


class TestQ8Gemma3(Quantized, SlidingContract):
    @pytest.fixture
    def engine(self, q8_gemma3: Engine) -> Engine:
        return emptied(q8_gemma3)


class TestQ40Qwen3(Quantized):
    @pytest.fixture
    def engine(self, q4_qwen3: Engine) -> Engine:
        return emptied(q4_qwen3)


def cut(rows: KVRows, start: int, stop: int, end: int) -> KVRows:
    """Rows start..stop of a run of `end`, of which sliding groups have the last ones."""
    from storage.spec import GroupRows

    found = []
    for g in rows:
        first = end - g.k.shape[1]
        part = slice(max(start - first, 0), max(stop - first, 0))
        found.append(GroupRows(g.k[:, part], g.v[:, part]))
    return tuple(found)


def loss(wanted: KVRows, found: KVRows) -> float:
    """The greatest distance of a side's layer, as a share of its norm."""
    sides = [
        (x, y) for g, h in zip(wanted, found, strict=True) for x, y in ((g.k, h.k), (g.v, h.v))
    ]
    return max(
        float(np.linalg.norm(a.astype("f4") - b.astype("f4")) / np.linalg.norm(a.astype("f4")))
        for x, y in sides
        for a, b in zip(x, y, strict=True)
        if a.size
    )


@pytest.mark.parametrize(
    ("kv_type", "low", "high"), [("q8_0", 1e-3, 0.01), ("q4_0", 0.02, 0.12), ("f16", 0.0, 2e-3)]
)
@pytest.mark.parametrize("model", ["llama64", "llama128", "qwen3", "gemma3", "deepseek2", "llama"])
def test_computed_rows_are_exported_as_the_model_means_them(
    tiny_models: dict[str, Path], model: str, kv_type: str, low: float, high: float
) -> None:
    """In layer 0 nothing but quantization lies between the rows of the two: not turned back, or
    turned over another length, they would differ by more than their norm."""
    plain = open_engine(tiny_models[model])
    other = open_with(tiny_models[model], kv_type=kv_type, flash_attention=kv_type != "f16")
    rows = []
    for engine in (plain, other):
        feed(engine, 0, list(range(5, 65)))
        rows.append(both(engine, 0, 0, 60))
        engine.close()
    at = next(i for i, g in enumerate(plain.key.spec.groups) if 0 in g.layers)
    first = [tuple((type(g)(g.k[:1], g.v[:1])) for g in x[at : at + 1]) for x in rows]
    assert low <= loss(*first) < high


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("model", ["llama64", "llama128", "qwen3", "gemma3", "deepseek2"])
def test_rows_in_quantized_cells_lose_once(
    tiny_models: dict[str, Path], model: str, kv_type: str
) -> None:
    """Rows of noise go in and lose what the type loses; what comes out keeps its codes."""
    engine = open_with(tiny_models[model], kv_type=kv_type)
    rng = np.random.default_rng(3)
    from storage.spec import GroupRows

    noise = tuple(
        GroupRows(
            rng.standard_normal((len(g.layers), 50, g.n_kv_heads, g.key_dim)).astype("f2"),
            rng.standard_normal((len(g.layers), 50, g.n_kv_heads, g.value_dim)).astype("f2"),
        )
        for g in engine.key.spec.groups
    )
    engine.load(0, 0, noise)
    first = both(engine, 0, 0, 50)
    engine.truncate(0, 0)
    engine.load(0, 0, first)
    second = both(engine, 0, 0, 50)
    engine.close()
    assert loss(noise, first) < {"q8_0": 0.008, "q4_0": 0.12}[kv_type]
    assert loss(first, second) < 5e-4  # float16's own rounding


def test_transposed_values_are_padded_to_the_widest_layer(plain_uneven: Any) -> None:
    """llama-kv-cache.cpp pads V without flash attention; 5 layers of 1, 2, 2, 1 and 4 heads."""
    assert plain_uneven.kv_bytes == plain_uneven.n_cells * 2 * 32 * (10 + 5 * 4)


# ---- refusals


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_1", "q4_0"])
def test_quantized_values_want_flash_attention(tiny_models: dict[str, Path], kv_type: str) -> None:
    with pytest.raises(ModelUnavailable, match=f"^kv_type = {kv_type}: wants flash attention$"):
        open_with(tiny_models["llama64"], kv_type=kv_type, flash_attention=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv_type": "q5_1"}, "kv_type = 'q5_1'"),
        ({"n_ubatch": 0}, "ubatch = 0"),
        ({"n_ubatch": 1024}, "ubatch = 1024"),
    ],
)
def test_unknown_options_are_refused(
    tiny_models: dict[str, Path], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelUnavailable, match=says):
        open_with(tiny_models["llama"], **options)


def test_a_head_dim_that_fills_no_block_is_refused() -> None:
    pytest.importorskip("llama_cpp")
    from actors.engines.llama_rows import Layout
    from actors.engines.llama_spec import Rope
    from storage.spec import LayerSpec, ModelCacheSpec

    rope = Rope(False, 0, 80, ())
    cases = ((((80, 80),), "head dim of 80"), (((64, 64), (128, 64)), "different head dims"))
    for dims, says in cases:
        spec = ModelCacheSpec("some", tuple(LayerSpec("full", 2, *d) for d in dims))
        Layout(spec, rope, "f16")
        with pytest.raises(ModelUnavailable, match=says):
            Layout(spec, rope, "q8_0")


def test_an_engine_is_opened_again_on_other_options(tiny_models: dict[str, Path]) -> None:
    """The same weights, empty sequences, and the cells that were asked for; a refusal is no end."""
    engine = open_with(tiny_models["llama64"])
    key, f16 = engine.key, engine.kv_bytes
    wanted = feed(engine, 0, [5, 6, 7])
    engine.reopen(EngineOptions(1, kv_type="q8_0"), 512)
    assert (engine.n_rows(0), engine.n_cells, engine.n_ctx) == (0, 512, 512)
    assert engine.kv_bytes == f16 // 2 * 34 // 64
    with pytest.raises(ModelUnavailable):
        engine.reopen(EngineOptions(1, False, "q8_0"), 512)
    engine.reopen(EngineOptions(1), 1024)
    assert (engine.key, engine.kv_bytes, engine.loads_encoded) == (key, f16, "")
    assert_equal(wanted[None], feed(engine, 0, [5, 6, 7])[None], exact=True)
    engine.close()


@pytest.mark.parametrize(("info", "repacks"), [(b"AVX512 = 1 | AMX_INT8 = 1", False), (b"", True)])
def test_weights_stay_as_they_are_where_amx_would_kill_the_process(
    monkeypatch: pytest.MonkeyPatch, info: bytes, repacks: bool
) -> None:
    asked: list[bool] = []

    def load(path: bytes, params: Any) -> int:
        asked.append(params.use_extra_bufts)
        return 1

    monkeypatch.setattr(llama_context.llama, "llama_print_system_info", lambda: info)
    monkeypatch.setattr(llama_context.llama, "llama_model_load_from_file", load)
    llama_context.open_model(Path("model.gguf"))
    assert asked == [repacks]
