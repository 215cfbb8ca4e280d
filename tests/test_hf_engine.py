"""transformers as the reference: the engine contract, and cards that llama.cpp has written.

torch is large: the tests are skipped without it, unless KVFERRY_REQUIRE lists `hf`. `make test
EXTRAS=hf` installs it.
"""

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.engines.base import Engine
from actors.errors import EngineFault, ModelUnavailable
from tests.engine_contract import (
    EngineContract,
    SlidingContract,
    assert_equal,
    both,
    feed,
    greedy,
)
from tests.loops import assistant, make_loop, memory_of, run, settle, user
from tests.require import require
from tests.test_cross_engine import go_on, kl, open_llama, replace_rows

FLOOR = 1e-4  # nats: float32 against llama.cpp's float16 rows and kernels
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # torch takes long to load on a busy machine
    # torch and transformers warn of their own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def open_hf(path: Path, **options: Any) -> Any:
    for package in ("torch", "transformers", "accelerate"):
        found = importlib.util.find_spec(package) is not None
        require("hf", found, f"{package} is not installed")
    importlib.import_module("torch").set_num_threads(1)  # the models are tiny: more would wait
    from actors.engines.hf_engine import HfEngine

    return HfEngine(path, **({"n_seq_max": 3, "n_ctx": 1024, "n_cells": 1024} | options))


def opened(name: str) -> Callable[[dict[str, Path]], Iterator[Engine]]:
    @pytest.fixture(scope="module")
    def engine(tiny_models: dict[str, Path]) -> Iterator[Engine]:
        engine = open_hf(tiny_models[name])
        yield engine
        engine.close()

    return engine


llama, gemma3 = opened("no_template"), opened("gemma3")


def emptied(engine: Engine) -> Engine:
    for seq_id in range(engine.n_seq_max):
        engine.truncate(seq_id, 0)
    return engine


class TestLlama(EngineContract):
    @pytest.fixture
    def engine(self, llama: Engine) -> Engine:
        return emptied(llama)


class TestGemma3(SlidingContract):
    @pytest.fixture
    def engine(self, gemma3: Engine) -> Engine:
        return emptied(gemma3)


STORY = " ".join(EngineContract.prompts)


@pytest.mark.parametrize("model", ["no_template", "qwen2", "qwen3", "gemma3"])
def test_rows_of_llama_cpp_go_on_in_transformers(tiny_models: dict[str, Path], model: str) -> None:
    """And back: in both directions the KL is that of two engines which share no row."""
    hf, llama = open_hf(tiny_models[model]), open_llama(tiny_models[model])
    assert hf.key.mismatches(llama.key) == []
    ids = llama.vocab.tokenize(STORY)[:170]
    own, rows = {}, {}
    for engine in (llama, hf):
        feed(engine, 0, ids[:120])
        rows[engine.name] = both(engine, 0, 0, 120)
        own[engine.name] = go_on(engine, ids[120:], keep=True)
    floor = kl(own["llama.cpp"], own["hf"])
    assert floor <= 10 * FLOOR  # the weights are the same
    for source, other in ((llama, hf), (hf, llama)):
        crossed = go_on(replace_rows(other, rows[source.name]), ids[120:], keep=True)
        found = kl(own[source.name], crossed)
        print(f"{model}: {source.name} -> {other.name} KL {found:.1e}, without rows {floor:.1e}")
        assert found <= max(FLOOR, 1.5 * floor)
    for engine in (hf, llama):
        engine.close()


@pytest.mark.parametrize("model", ["llama64", "gemma3"])
def test_a_card_of_llama_cpp_goes_on_in_transformers(
    tiny_models: dict[str, Path], tmp_path: Path, model: str
) -> None:
    """The whole way through a store: every row is taken up, and the prompt's next tokens are those
    of llama.cpp taking up the same card."""
    messages = [user("What did the fishermen see? " * 8)]
    loop = make_loop(open_llama(tiny_models[model]), tmp_path / "hf", node="a")
    answer = run(loop, messages, n=12, turn_id="one")
    settle(loop)
    held = memory_of(loop).branches[0].rows
    loop.close()
    shutil.copytree(tmp_path / "hf", tmp_path / "llama")
    messages += [assistant(answer.text), user("And then?")]
    found = {}
    for name, opener in (("hf", open_hf), ("llama", open_llama)):
        other = make_loop(opener(tiny_models[model]), tmp_path / name, node="b")
        found[name] = run(other, messages, n=12, turn_id="two")
        assert found[name].cached == held >= len(answer.prompt)
        assert not other.memory.faults
        settle(other)
        other.close()
    assert found["hf"].prompt == found["llama"].prompt
    assert found["hf"].ids[0] == found["llama"].ids[0]


@pytest.mark.parametrize("model", ["no_template", "gemma3"])
def test_greedy_generation_is_llama_cpps(tiny_models: dict[str, Path], model: str) -> None:
    """transformers' own `generate` over a DynamicCache of llama.cpp's rows, which leaves the
    sequence as it was."""
    hf, llama = open_hf(tiny_models[model]), open_llama(tiny_models[model])
    ids = llama.vocab.tokenize(STORY)[:150]
    feed(llama, 0, ids[:-1])
    hf.load(0, 0, both(llama, 0, 0, 149))
    tokens, reference = greedy(llama, 0, ids[-1:], 16)
    generated = hf.generate(0, ids, 16)
    assert hf.n_rows(0) == 149
    stepped, logits = greedy(hf, 0, ids[-1:], 16)
    assert generated == stepped
    parted = next((i for i in range(16) if tokens[i] != generated[i]), 15)
    assert_equal(reference[: parted + 1], logits[: parted + 1], exact=False)
    with pytest.raises(EngineFault, match="none to compute"):
        hf.generate(0, ids[:100], 1)
    for engine in (hf, llama):
        engine.close()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("deepseek2", "this architecture"),
        ("uneven", "this architecture, or layers of several shapes"),
        ("pattern", "sliding layers that transformers places elsewhere"),
        ("truncated", "cannot load this file"),
    ],
)
def test_a_model_it_would_compute_otherwise_is_refused(
    tiny_models: dict[str, Path], model: str, reason: str
) -> None:
    with pytest.raises(ModelUnavailable, match=reason) as caught:
        open_hf(tiny_models[model])
    assert "\n" not in str(caught.value)
