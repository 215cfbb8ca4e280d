"""The head's side without Ray: what it says of its models, and which bytes it hands out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from actors.config import ReplicaConfig
from cluster import weights
from cluster.weights import Answer, HeadSource, NodeWeights, WeightsServer, share
from storage.digests import PIECE, describe
from storage.errors import StoreUnavailable
from storage.fetch import Progress
from storage.files import Files
from storage.weights import SourceFailed, manifest_of
from tests.clusters import until


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + random.Random(1).randbytes(PIECE + 1000))
    return path


class Remote:
    """handle.method.remote(...), and ray.get and ray.wait of what it returns."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        return type("Method", (), {"remote": staticmethod(lambda *args: (method, args))})


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.ray, "get", lambda call, timeout: call[0](*call[1]))
    monkeypatch.setattr(weights.ray, "wait", lambda calls, timeout: (calls, []))
    monkeypatch.setattr(weights, "_POLL_S", 0.01)


def ready(server: WeightsServer, setting: str = "model") -> Answer:
    def answer() -> Answer | None:
        found = server.manifest(setting)
        return found if found.manifest or found.error else None

    return until(answer, f"the {setting}'s manifest", 20)


def test_the_head_says_what_its_models_are(model: Path) -> None:
    server = WeightsServer(ReplicaConfig(model=str(model)))
    assert ready(server) == Answer(manifest_of(model))
    assert server.manifest("lora") == Answer()


def test_a_head_without_the_model_says_why(tmp_path: Path) -> None:
    server = WeightsServer(ReplicaConfig(model=str(tmp_path / "gone.gguf")))
    assert "cannot read it" in ready(server).error


def test_only_the_bytes_of_its_models_are_handed_out(model: Path) -> None:
    server = WeightsServer(ReplicaConfig(model=str(model)))
    ready(server)
    raw, digest = model.read_bytes(), describe(model).sha256
    assert server.read(digest, 10, 1000) == raw[10:1000]
    assert len(server.read(digest, 0, 10 * PIECE)) == PIECE  # never more at a time
    with pytest.raises(FileNotFoundError):
        server.read("../../etc/passwd", 0, 10)


def test_with_store_the_model_is_published_once_the_store_is_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [StoreUnavailable("s3://x", "no route")] * 2

    def publish(*args: Any) -> int:
        if failures:
            raise failures.pop()
        return real(*args)

    real = weights.publish
    monkeypatch.setattr(weights, "publish", publish)
    monkeypatch.setattr(weights, "_FIRST_PAUSE_S", 0.01)
    store = f"file://{tmp_path}/store"
    WeightsServer(ReplicaConfig(model=str(model), store=store, share_model="store"))
    files, digest = Files(store), describe(model).sha256
    until(lambda: len(files.names(files.path("models", digest))) == 2, "both pieces", 20)


def test_with_head_nothing_is_published(model: Path, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    server = WeightsServer(ReplicaConfig(model=str(model), store=store, share_model="head"))
    ready(server)
    assert not (tmp_path / "store").exists()


class Router:
    def __init__(self) -> None:
        self.told: list[Progress | None] = []

    def fetching(self, node: str, progress: Progress | None) -> str:
        self.told.append(progress)
        return "a reference"


def test_a_node_fetches_through_the_actor(model: Path, tmp_path: Path) -> None:
    server, router = WeightsServer(ReplicaConfig(model=str(model))), Router()
    tell = type("Now", (), {"fetching": type("M", (), {"remote": router.fetching})})
    node = NodeWeights(Remote(server), tell, f"file://{tmp_path}/store")
    manifest = node.manifest("model", "n")
    assert manifest == manifest_of(model)
    path = node.fetch(manifest, str(tmp_path / "models"), "n")
    assert path == tmp_path / "models" / manifest.digest / "m.gguf"
    assert path.read_bytes() == model.read_bytes()
    told = [p for p in router.told if p is not None]
    assert all(p.waiting or p.total == model.stat().st_size for p in told)
    assert told[-1].source == "the head"
    assert router.told[-1] is None  # over: the model loads


def test_a_head_that_does_not_answer_is_a_source_that_failed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(call: Any, timeout: float) -> Any:
        raise GetTimeoutError("too late")

    monkeypatch.setattr(weights.ray, "get", late)
    server = Remote(WeightsServer(ReplicaConfig(model=str(model))))
    with pytest.raises(SourceFailed, match="too late"):
        HeadSource(server).read(describe(model), 0, 10)


@pytest.mark.parametrize("silent", [0, 2, 10**6])
def test_a_head_that_is_slow_is_waited_for_but_not_for_ever(
    model: Path, monkeypatch: pytest.MonkeyPatch, silent: int
) -> None:
    server, asked = WeightsServer(ReplicaConfig(model=str(model))), []
    ready(server)

    def get(call: Any, timeout: float) -> Any:
        asked.append(call)
        if len(asked) <= silent:
            raise GetTimeoutError("too late")
        return call[0](*call[1])

    monkeypatch.setattr(weights.ray, "get", get)
    monkeypatch.setattr(weights, "_SILENT_S", 1.0)
    router = Router()
    tell = type("Now", (), {"fetching": type("M", (), {"remote": router.fetching})})
    found = NodeWeights(Remote(server), tell, "").manifest("model", "n")
    assert found == (manifest_of(model) if silent < 10 else None)
    assert not router.told or router.told[-1] is None


@pytest.mark.parametrize("config", [{"model": "fake://"}, {"share_model": "off"}])
def test_where_nothing_is_shared_no_actor_is_started(config: dict[str, str]) -> None:
    assert share(ReplicaConfig(**config)) is None
