"""An adapter makes another model of the same file: other logits, another key, no memory shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="no gguf package")
pytest.importorskip("llama_cpp", reason="no llama-cpp-python")

from gguf import GGUFWriter

from actors.config import ReplicaConfig
from actors.engine_settings import parse_lora
from actors.engines.base import Engine
from actors.errors import ModelUnavailable
from actors.models import open_engine
from actors.tuned import Source, Tunable, key_of
from cluster.config import ConfigError, load_config
from tests.engine_contract import feed
from tests.loops import make_loop, run, settle, user
from tests.tiny_gguf import HIDDEN

RANK = 4
IDS = [7, 30, 3, 99, 12, 250, 41, 8, 8, 100]

WriteLora = Callable[..., Path]


@pytest.fixture
def write_lora(tmp_path: Path) -> WriteLora:
    def write(
        *, seed: int = 0, arch: str = "llama", n_in: int = HIDDEN, kind: str = "lora",
        tokens: tuple[int, ...] = (), tensor: str = "blk.0.attn_q.weight",
    ) -> Path:  # fmt: skip
        path = tmp_path / f"{seed}{arch}{n_in}{kind}{len(tokens)}{tensor}.gguf"
        rng = np.random.default_rng(seed)
        writer = GGUFWriter(path, arch)
        writer.add_type("adapter")
        writer.add_string("adapter.type", kind)
        writer.add_float32("adapter.lora.alpha", RANK)
        if tokens:
            writer.add_key_value("adapter.alora.invocation_tokens", list(tokens), *_uint32_array())
        writer.add_tensor(f"{tensor}.lora_a", rng.standard_normal((RANK, n_in), np.float32))
        writer.add_tensor(f"{tensor}.lora_b", rng.standard_normal((HIDDEN, RANK), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _uint32_array():  # type: ignore[no-untyped-def]
    from gguf import GGUFValueType

    return GGUFValueType.ARRAY, GGUFValueType.UINT32


def engine_of(model: Path, lora: object = "", profile: str = "default") -> Engine:
    return open_engine(
        ReplicaConfig(
            model=str(model), lora=str(lora), profile=profile, slots=2, n_ctx=512, threads=1
        )
    )


def logits_of(model: Path, lora: object = "") -> tuple[str, np.ndarray]:
    engine = engine_of(model, lora)
    logits = feed(engine, 0, IDS)
    engine.close()
    return engine.key.digest, logits


def test_logits_and_key_are_the_adapters(
    tiny_models: dict[str, Path], write_lora: WriteLora
) -> None:
    model, lora = tiny_models["llama"], write_lora()
    bare_key, bare = logits_of(model)
    key, logits = logits_of(model, lora)
    assert key != bare_key
    assert np.abs(logits - bare).max() > 0.1
    same_key, same = logits_of(model, lora)
    assert same_key == key
    np.testing.assert_array_equal(same, logits)
    whole_key, whole = logits_of(model, f"{lora}:1.0")
    assert whole_key == key
    np.testing.assert_array_equal(whole, logits)
    half_key, half = logits_of(model, f"{lora}:0.5")
    other_key, other = logits_of(model, write_lora(seed=1))
    assert len({bare_key, key, half_key, other_key}) == 4
    assert np.abs(half - logits).max() > 0.1 < np.abs(other - logits).max()


def test_without_an_adapter_the_key_is_the_files(tiny_models: dict[str, Path]) -> None:
    from actors.engines.llama_spec import digests

    engine = engine_of(tiny_models["llama"])
    engine.close()
    assert (engine.key.weights, engine.key.tokenizer) == digests(tiny_models["llama"])


def test_a_kept_profile_is_of_the_weights_with_their_adapter(
    tiny_models: dict[str, Path], write_lora: WriteLora, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def open_tuned(config: ReplicaConfig, source: Source, **_: object) -> tuple[Tunable, None]:
        measured.append(key_of(config, source)["model"])
        return source.open(source.defaults, source.n_cells), None

    monkeypatch.setattr("actors.models.open_tuned", open_tuned)
    lora = write_lora()
    for adapter in ("", lora, f"{lora}:0.5", write_lora(seed=1)):
        engine = engine_of(tiny_models["llama"], adapter, profile="auto")
        engine.close()
        assert engine.key.weights == measured[-1]
    assert len(set(measured)) == 4


def test_only_the_weights_differ(tiny_models: dict[str, Path], write_lora: WriteLora) -> None:
    bare, adapted = (engine_of(tiny_models["llama"], x) for x in ("", write_lora()))
    bare.close()
    adapted.close()
    (line,) = bare.key.mismatches(adapted.key)
    assert line.startswith("weights: ")


def test_memory_is_not_shared(
    tiny_models: dict[str, Path], write_lora: WriteLora, tmp_path: Path
) -> None:
    """One session on one store: each of the models has a history of its own, and no block of the
    other."""
    question = [user("Tell me about the sea, the wind and the harbour. " * 30)]
    cached = []
    for lora in ("", write_lora(), "", write_lora()):
        loop = make_loop(engine_of(tiny_models["llama"], lora), tmp_path / "store")
        cached.append(run(loop, question, n=4).cached)
        settle(loop)
        loop.close()
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) > 256


@pytest.mark.parametrize(
    "wrong",
    [
        {"arch": "qwen2"},
        {"kind": "dora"},
        {"n_in": 96},
        {"tensor": "blk.9.attn_q.weight"},
        {"tokens": (1, 2)},
    ],
)
def test_an_adapter_that_does_not_fit(
    tiny_models: dict[str, Path], write_lora: WriteLora, wrong: dict[str, object]
) -> None:
    with pytest.raises(ModelUnavailable, match=r"\.gguf: ") as caught:
        engine_of(tiny_models["llama"], write_lora(**wrong))
    assert "\n" not in str(caught.value)


def test_an_adapter_that_is_not_there(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="cannot read it"):
        engine_of(tiny_models["llama"], tmp_path / "none.gguf:0.5")
    (tmp_path / "text.gguf").write_text("no adapter")
    with pytest.raises(ModelUnavailable, match="not a GGUF file"):
        engine_of(tiny_models["llama"], tmp_path / "text.gguf")
    with pytest.raises(ModelUnavailable, match="no LoRA adapter"):
        engine_of(tiny_models["llama"], tiny_models["no_template"])


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("a.gguf", ("a.gguf", 1.0)),
        ("/x/a.gguf:0.25", ("/x/a.gguf", 0.25)),
        ("pkg://p/a.gguf", ("pkg://p/a.gguf", 1.0)),
        ("pkg://p/a.gguf:-2", ("pkg://p/a.gguf", -2.0)),
        ("a:b.gguf", ("a:b.gguf", 1.0)),
    ],
)
def test_reference_and_scale(text: str, parsed: tuple[str, float]) -> None:
    assert parse_lora(text) == parsed


@pytest.mark.parametrize("text", ["a.gguf:0", "a.gguf:nan", "a.gguf:inf"])
def test_a_scale_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^lora = "):
        load_config(None, {"KVFERRY_LORA": text})
    with pytest.raises(ValueError, match="a file, and perhaps"):
        parse_lora(":0.5")


def test_the_fake_model_takes_none() -> None:
    with pytest.raises(ConfigError, match="lora: the fake engine"):
        load_config(None, {"KVFERRY_LORA": "a.gguf", "KVFERRY_MODEL": "fake://"})


def test_a_relative_path_is_the_callers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_config(None, {"KVFERRY_LORA": "a.gguf:0.5"})
    assert settings.replica.lora == f"{tmp_path}/a.gguf:0.5"
