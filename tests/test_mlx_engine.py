"""The MLX engine: the contract in float16 cells and in a codec's, and its edges."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.engines.base import Engine
from storage.codec import Tensors, encode_rows, get_codec, slice_rows
from tests.engine_contract import (
    EngineContract,
    SlidingContract,
    assert_equal,
    assert_same_rows,
    both,
    feed,
    merge,
)
from tests.require import require

Q4 = get_codec("q4")


def open_engine(path: Path, cells: str = "f16", **options: Any) -> Any:
    for package in ("mlx", "mlx_lm"):
        found = importlib.util.find_spec(package) is not None
        require("mlx", found, f"{package} is not installed")
    from actors.engines.mlx_engine import MlxEngine

    sizes = {"n_seq_max": 3, "n_ctx": 1024, "n_cells": 1024} | options
    return MlxEngine(path, cells=cells, **sizes)


def opened(name: str, cells: str) -> Callable[[dict[str, Path]], Iterator[Engine]]:
    @pytest.fixture(scope="module")
    def engine(tiny_models: dict[str, Path]) -> Iterator[Engine]:
        engine = open_engine(tiny_models[name], cells)
        yield engine
        engine.close()

    return engine


llama, qwen2, qwen3 = opened("no_template", "f16"), opened("qwen2", "f16"), opened("qwen3", "f16")
gemma3, deepseek2 = opened("gemma3", "f16"), opened("deepseek2", "f16")
llama_q4, gemma3_q4 = opened("no_template", "q4"), opened("gemma3", "q4")
deepseek2_q4, qwen3_k8v4 = opened("deepseek2", "q4"), opened("qwen3", "k8v4")


def emptied(engine: Engine) -> Engine:
    for seq_id in range(engine.n_seq_max):
        engine.truncate(seq_id, 0)
    return engine


def assert_same_codes(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].view(np.uint8), b[name].view(np.uint8), name)


class TestLlama(EngineContract):
    @pytest.fixture
    def engine(self, llama: Engine) -> Engine:
        return emptied(llama)


class TestQwen2(EngineContract):
    @pytest.fixture
    def engine(self, qwen2: Engine) -> Engine:
        return emptied(qwen2)


class TestQwen3(EngineContract):
    @pytest.fixture
    def engine(self, qwen3: Engine) -> Engine:
        return emptied(qwen3)


class TestDeepSeek2(EngineContract):
    @pytest.fixture
    def engine(self, deepseek2: Engine) -> Engine:
        return emptied(deepseek2)


class TestGemma3(SlidingContract):
    kl = EngineContract.kl  # no cell moves

    @pytest.fixture
    def engine(self, gemma3: Engine) -> Engine:
        return emptied(gemma3)


class CodesContract(EngineContract):
    """Of engines whose cells are a codec's codes."""

    def test_rows_loaded_block_by_block_give_the_same_logits_bit_for_bit(self, engine: Any) -> None:
        """Codes that were computed here, not only codes that were loaded."""
        ids, spec = self.ids(engine, 300), engine.key.spec
        feed(engine, 0, ids)
        whole = engine.export_encoded(0, 0, 300)
        window = encode_rows(spec, get_codec("f16"), engine.export_window(0, 0, 300), "sliding")
        expected = feed(engine, 0, [7])
        for blocks in ([(0, 256), (256, 300)], [(0, 100), (100, 256), (256, 300)]):
            engine.truncate(0, 0)
            for start, stop in blocks:
                engine.load_encoded(0, start, slice_rows(whole, start, stop))
                assert engine.n_rows(0) == stop
            assert_same_codes(engine.export_encoded(0, 0, 300), whole)
            if not window:
                assert_equal(expected[None], feed(engine, 0, [7])[None], exact=True)


class TestLlamaInCodes(CodesContract):
    @pytest.fixture
    def engine(self, llama_q4: Engine) -> Engine:
        return emptied(llama_q4)


class TestQwen3InCodesOfTwoWidths(CodesContract):
    @pytest.fixture
    def engine(self, qwen3_k8v4: Engine) -> Engine:
        return emptied(qwen3_k8v4)


class TestDeepSeek2InCodes(CodesContract):
    @pytest.fixture
    def engine(self, deepseek2_q4: Engine) -> Engine:
        return emptied(deepseek2_q4)


class TestGemma3InCodes(CodesContract, SlidingContract):
    @pytest.fixture
    def engine(self, gemma3_q4: Engine) -> Engine:
        return emptied(gemma3_q4)
