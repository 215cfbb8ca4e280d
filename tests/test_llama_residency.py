from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.engines.base import Engine
from tests.engine_contract import EngineContract
from tests.test_llama_engine import emptied


def open_quantized(path: Path, n_threads: int = 1):
    from actors.engines.llama_engine import LlamaEngine

    return LlamaEngine(
        path, n_seq_max=3, n_ctx=1024, n_cells=1024, n_threads=n_threads, kv_type="q4_1"
    )


def opened(name: str) -> Callable[[dict[str, Path]], Iterator[Engine]]:
    @pytest.fixture(scope="module")
    def engine(tiny_models):
        engine = open_quantized(tiny_models[name])
        yield engine
        engine.close()

    return engine


interleaved, half_split = opened("llama64"), opened("qwen3")


class TestInterleaved(EngineContract):
    @pytest.fixture
    def engine(self, interleaved: Engine) -> Engine:
        return emptied(interleaved)


class TestHalf(EngineContract):
    @pytest.fixture
    def engine(self, half_split: Engine) -> Engine:
        return emptied(half_split)
