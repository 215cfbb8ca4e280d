"""The llama.cpp engine: the contract on a tiny random model and on the real one, and its edges."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.engines.base import Chunk, Engine
from actors.errors import EngineFault, ModelUnavailable
from tests.engine_contract import EngineContract, feed


def open_engine(path: Path, n_threads: int = 1) -> Engine:
    from actors.engines.llama_engine import LlamaEngine

    return LlamaEngine(path, n_seq_max=3, n_ctx=1024, n_cells=1024, n_threads=n_threads)


@pytest.fixture(scope="module")
def tiny(tiny_models: dict[str, Path]) -> Iterator[Engine]:
    engine = open_engine(tiny_models["llama"])
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def half_split(tiny_models: dict[str, Path]) -> Iterator[Engine]:
    engine = open_engine(tiny_models["qwen2"])
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Iterator[Engine]:
    engine = open_engine(smollm2_gguf, n_threads=2)
    yield engine
    engine.close()


def emptied(engine: Engine) -> Engine:
    for seq_id in range(engine.n_seq_max):
        engine.truncate(seq_id, 0)
    return engine


class TestTinyLlama(EngineContract):
    @pytest.fixture
    def engine(self, tiny: Engine) -> Engine:
        return emptied(tiny)


@pytest.mark.model
class TestSmolLM2(EngineContract):
    @pytest.fixture
    def engine(self, smollm2: Engine) -> Engine:
        return emptied(smollm2)


def assert_half_split_rope(engine: Engine) -> None:
    """In layer 0 a key before rope depends on its token alone. So one token at two positions must
    differ by the rope angles, pair (i, i + d/2) by position * base ** (-2i/d)."""
    emptied(engine)
    feed(engine, 0, [9, 3, 9, 4, 9, 9])
    base = dict(engine.key.rope)["base"]
    k = engine.export(0, 0, 6)[0].k[0].astype(np.float64)  # (6, n_kv_heads, d)
    half = k.shape[-1] // 2
    first, x, y = k[0], k[0, :, :half], k[0, :, half:]
    assert np.abs(first).max() > 0.5
    for position in (2, 4, 5):
        angle = position * float(base) ** (-np.arange(half) / half)
        turned = np.concatenate(
            [x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], axis=-1
        )
        np.testing.assert_allclose(k[position], turned, atol=0.02 * np.abs(first).max())


def test_keys_are_half_split_where_rope_pairs_are_interleaved(tiny: Engine) -> None:
    assert_half_split_rope(tiny)


def test_keys_are_half_split_where_rope_pairs_are_halves(half_split: Engine) -> None:
    assert_half_split_rope(half_split)


@pytest.mark.model
def test_keys_of_smollm2_are_half_split(smollm2: Engine) -> None:
    assert_half_split_rope(smollm2)


def test_keys_are_llama_cpps_own_reordered_by_hand(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.engines import llama_state

    emptied(tiny)
    feed(tiny, 0, [9, 3, 4, 300, 12])
    seen = []
    whole = llama_state.parse

    def parse(raw: bytes, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        k, v = whole(raw, start, stop)
        seen.append((k.copy(), v.copy()))
        return k, v

    monkeypatch.setattr(llama_state, "parse", parse)
    rows = tiny.export(0, 1, 5)[0]
    k, v = seen[0]
    for layer in range(2):
        for t in range(4):
            for head in range(2):
                own = k[layer, t, 32 * head : 32 * head + 32]
                by_hand = [*(own[2 * i] for i in range(16)), *(own[2 * i + 1] for i in range(16))]
                assert rows.k[layer, t, head].tolist() == by_hand
                assert (
                    rows.v[layer, t, head].tolist()
                    == v[layer, t, 32 * head : 32 * head + 32].tolist()
                )


def test_rows_cross_where_rope_pairs_are_halves(half_split: Engine) -> None:
    emptied(half_split)
    feed(half_split, 0, list(range(5, 105)))
    rows = half_split.export(0, 0, 100)
    expected = feed(half_split, 0, [7])
    half_split.truncate(0, 0)
    half_split.load(0, 0, rows)
    np.testing.assert_array_equal(feed(half_split, 0, [7]), expected)


def test_a_forked_prefix_takes_no_cells(tiny: Engine) -> None:
    emptied(tiny)
    ids = list(range(5, 405))
    feed(tiny, 0, ids)
    for target in (1, 2):
        tiny.fork(0, target, 400)
    for seq_id in range(3):  # 400 + 3 * 200 cells fit only once
        feed(tiny, seq_id, ids[:200])
    with pytest.raises(EngineFault):
        feed(tiny, 0, ids[:200])


def test_export_and_load_leave_no_cells_behind(tiny: Engine) -> None:
    emptied(tiny)
    feed(tiny, 0, list(range(5, 405)))
    rows = tiny.export(0, 0, 256)
    for _ in range(20):
        tiny.load(1, 0, rows)
        tiny.truncate(1, 0)
    feed(tiny, 1, list(range(5, 505)))
    feed(tiny, 2, list(range(5, 105)))


def test_load_into_a_full_context_is_a_fault_and_no_end(tiny: Engine) -> None:
    emptied(tiny)
    feed(tiny, 0, list(range(5, 505)))
    rows = tiny.export(0, 0, 256)
    feed(tiny, 1, list(range(5, 505)))
    with pytest.raises(EngineFault):
        tiny.load(2, 0, rows)
    assert [tiny.n_rows(i) for i in range(3)] == [500, 500, 0]
    tiny.truncate(1, 0)
    tiny.load(2, 0, rows)
    assert tiny.n_rows(2) == 256


def test_an_unknown_token_is_a_fault_and_no_end(tiny: Engine) -> None:
    emptied(tiny)
    with pytest.raises(EngineFault):
        tiny.step([Chunk(0, [tiny.vocab.size], 0, True)])
    tiny.truncate(0, 0)
    feed(tiny, 0, [5, 6, 7])
    assert tiny.n_rows(0) == 3


def test_two_engines_on_one_file_have_one_key(tiny: Engine, tiny_models: dict[str, Path]) -> None:
    again = open_engine(tiny_models["llama"])
    other = open_engine(tiny_models["no_template"])
    assert again.key == tiny.key
    assert other.key.digest != tiny.key.digest
    for engine in (again, other):
        engine.close()


def test_reported_memory_is_what_the_cells_take(tiny: Engine) -> None:
    assert tiny.kv_bytes == tiny.n_cells * 2 * 2 * 2 * (32 + 32)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma3", "sliding-window"),
        ("truncated", "cannot load"),
        ("garbage", "cannot load"),
    ],
)
def test_a_model_that_cannot_be_carried_is_refused(
    tiny_models: dict[str, Path], name: str, reason: str
) -> None:
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        open_engine(tiny_models[name])
    assert str(tiny_models[name]) in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"none\.gguf"):
        open_engine(tmp_path / "none.gguf")


def test_a_digest_cache_that_cannot_be_written_costs_only_time(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    engine = open_engine(tiny_models["qwen2"])
    monkeypatch.undo()
    again = open_engine(tiny_models["qwen2"])
    assert engine.key == again.key
    for each in (engine, again):
        each.close()
