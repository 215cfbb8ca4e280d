"""The fake engine holds the contract exactly, and notices every wrong row."""

import numpy as np
import pytest

from actors.engines.base import Engine
from actors.engines.fake_engine import FakeEngine
from storage.spec import GroupRows
from tests.engine_contract import EngineContract, SlidingContract, feed, merge


class TestFakeEngine(EngineContract):
    exact = True

    @pytest.fixture
    def engine(self) -> Engine:
        return FakeEngine(3, n_ctx=1024, n_cells=1024)


class TestSlidingFakeEngine(SlidingContract):
    exact = True

    @pytest.fixture
    def engine(self) -> Engine:
        return FakeEngine(3, n_ctx=1024, n_cells=1024, window=16)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("row", [0, 100, 299])
def test_a_changed_row_is_noticed(side: str, row: int) -> None:
    engine = FakeEngine()
    feed(engine, 0, engine.vocab.tokenize("a short story about the sea " * 11)[:300])
    rows = engine.export(0, 0, 300)
    expected = feed(engine, 0, [65])
    engine.truncate(0, 0)
    changed = {"k": rows[0].k.copy(), "v": rows[0].v.copy()}
    changed[side][1, row, 1, 5] += np.float16(0.5)
    engine.load(0, 0, (GroupRows(**changed),))
    assert (feed(engine, 0, [65]) != expected).any()


@pytest.mark.parametrize("row", [0, 7, 14])
def test_a_changed_row_inside_the_window_is_noticed(row: int) -> None:
    engine = FakeEngine(window=16)
    feed(engine, 0, engine.vocab.tokenize("a short story about the sea"))
    full, window = engine.export(0, 0, 27), engine.export_window(0, 0, 27)
    expected = feed(engine, 0, [65])
    engine.truncate(0, 0)
    assert engine.key.spec.groups[0].part == "sliding"
    assert window[0].k.shape[1] == 15
    window[0].v[0, row, 1, 5] += np.float16(0.5)
    engine.load(0, 0, merge(engine, full, window))
    assert (feed(engine, 0, [65]) != expected).any()


def test_models_of_different_seeds_do_not_share_a_key() -> None:
    assert FakeEngine(seed=1).key.digest != FakeEngine(seed=2).key.digest
    assert FakeEngine(seed=1).key.digest == FakeEngine(seed=1).key.digest
