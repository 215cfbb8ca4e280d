"""What a replica does about a model that its machine lacks, and what the pool makes of the time."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.config import ReplicaConfig
from actors.weights import provide, references
from cluster.config import ClusterConfig, load_config
from cluster.console import fetched
from cluster.errors import ConfigError
from cluster.local import LocalCluster
from cluster.views import node_json
from storage.digests import describe
from storage.errors import WeightsUnavailable
from storage.fetch import Progress
from storage.weights import Manifest, manifest_of
from tests.test_replica_pool import Device, Pool, pool, ready

__all__ = ["pool"]  # a fixture


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def gguf(path: Path, body: bytes = b"one") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + body)
    return path


class Head:
    """Knows manifests by setting; notes what is fetched, and where to."""

    def __init__(self, folder: Path, **paths: Path) -> None:
        self.folder, self.paths = folder, paths
        self.fetched: list[tuple[str, str, str]] = []

    def manifest(self, setting: str, node: str) -> Manifest | None:
        return manifest_of(self.paths[setting]) if setting in self.paths else None

    def fetch(self, manifest: Manifest, folder: str, node: str) -> Path:
        self.fetched.append((manifest.name, folder, node))
        return Path(shutil.copy(next(iter(self.paths.values())), self.folder / manifest.name))


def test_what_stands_for_files() -> None:
    assert references(ReplicaConfig(model="fake://")) == {}
    assert references(ReplicaConfig(model="/m.gguf")) == {"model": "/m.gguf"}
    both = ReplicaConfig(
        model="/m.gguf", speculation="draft", draft_model="/d.gguf", lora="/l.gguf:0.5"
    )
    assert references(both) == {"model": "/m.gguf", "draft_model": "/d.gguf", "lora": "/l.gguf"}


def test_a_machine_with_the_same_bytes_uses_its_own(tmp_path: Path) -> None:
    head = Head(tmp_path, model=gguf(tmp_path / "head" / "m.gguf"))
    config = ReplicaConfig(model=str(gguf(tmp_path / "node" / "other name.gguf")))
    assert provide(config, head, "n") == config
    assert head.fetched == []


@pytest.mark.parametrize("there", [None, b"two"])
def test_a_machine_without_them_fetches(tmp_path: Path, there: bytes | None) -> None:
    head = Head(tmp_path, model=gguf(tmp_path / "head" / "m.gguf"))
    own = tmp_path / "node" / "m.gguf"
    if there is not None:
        gguf(own, there)
    config = ReplicaConfig(model=str(own), model_dir="/models")
    found = provide(config, head, "n")
    assert found == replace(config, model=str(tmp_path / "m.gguf"))
    assert head.fetched == [("m.gguf", "/models", "n")]


def test_declared_equivalent_weights_are_as_good(tmp_path: Path) -> None:
    theirs = gguf(tmp_path / "head" / "m.gguf")
    own = gguf(tmp_path / "node" / "m.gguf", b"two")
    table = {describe(own).sha256: describe(theirs).sha256}
    config = ReplicaConfig(model=str(own), equivalent_digests=table)
    assert provide(config, Head(tmp_path, model=theirs), "n") == config


def test_where_the_head_has_none_a_machine_needs_its_own(tmp_path: Path) -> None:
    config = ReplicaConfig(model=str(tmp_path / "gone.gguf"))
    assert provide(config, Head(tmp_path), "n") == config


def test_an_adapter_keeps_its_scale(tmp_path: Path) -> None:
    model = gguf(tmp_path / "node" / "m.gguf")
    head = Head(tmp_path, lora=gguf(tmp_path / "head" / "l.gguf"))
    config = ReplicaConfig(model=str(model), lora="/nowhere/l.gguf:0.5")
    assert provide(config, head, "n").lora == f"{tmp_path / 'l.gguf'}:0.5"


def test_what_cannot_be_fetched_is_never_loaded(tmp_path: Path) -> None:
    from actors.replica import ModelReplica

    class Broken(Head):
        def fetch(self, manifest: Manifest, folder: str, node: str) -> Path:
            raise WeightsUnavailable("stopped at 3 of 9 bytes")

    head = Broken(tmp_path, model=gguf(tmp_path / "head" / "m.gguf"))
    config = ReplicaConfig(model=str(tmp_path / "gone.gguf"), store=str(tmp_path / "store"))
    with pytest.raises(WeightsUnavailable, match="stopped at 3 of 9"):
        ModelReplica(config, "n", head)


def test_settings_are_checked() -> None:
    assert load_config(flags={"share_model": "store"}).replica.share_model == "store"
    assert load_config(flags={"model_dir": "x"}).replica.model_dir == str(Path.cwd() / "x")
    with pytest.raises(ConfigError, match="share_model = 'yes'"):
        load_config(flags={"share_model": "yes"})


def test_nodes_of_one_machine_share_its_disk() -> None:
    assert LocalCluster(ClusterConfig()).config.replica.share_model == "off"
    asked = ClusterConfig(replica=ReplicaConfig(share_model="head"))
    assert LocalCluster(asked).config.replica.share_model == "head"


# ---- progress


def test_progress_is_one_line() -> None:
    told = {"name": "m.gguf", "done": 33_000_000, "total": 88_000_000, "rate": 12e6}
    line = fetched(told | {"source": "the head", "waiting": ""})
    assert line == "fetching m.gguf 37 % of 88 MB, 12 MB/s from the head"
    line = fetched(told | {"source": "", "waiting": "a source that answers"})
    assert line == "fetching m.gguf 37 % of 88 MB, waiting for a source that answers"


class Loading(Device):
    """A replica that is not ready before it is told so."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.loaded = asyncio.Event()

    async def info(self) -> Any:
        await self.loaded.wait()
        return self._info


@pytest.fixture
def loading(pool: Pool) -> Loading:
    pool.devices["b"] = found = Loading("b")
    return found


def told(done: int) -> Progress:
    return Progress("m.gguf", done, 1000, 5.0, "the head")


def test_a_slow_download_is_waited_for_as_long_as_it_moves(pool: Pool, loading: Loading) -> None:
    async def go() -> None:
        await pool.settle()
        for done in range(0, 1000, 100):
            pool.fetching("b", told(done))
            pool.now += 100.0
            await pool.settle()
            assert ready(pool) == ["a"]
            assert pool.killed == 0
            (shown,) = [_node(pool, "b")["fetching"]]
            assert (shown["done"], shown["total"]) == (done, 1000)
        pool.fetching("b", None)
        loading.loaded.set()
        await pool.settle()

    pool.wait(go())
    assert ready(pool) == ["a", "b"]
    assert _node(pool, "b")["fetching"] is None


def test_a_download_that_nobody_hears_of_is_started_again(pool: Pool, loading: Loading) -> None:
    async def go() -> None:
        await pool.settle()
        pool.fetching("b", told(100))
        pool.now += 119.0
        await pool.settle()
        assert pool.killed == 0
        pool.now += 2.0
        await pool.settle()
        assert "heard nothing of its download for 120 s" in pool.errors()["b"]
        assert pool.killed == 1

    pool.wait(go())


def test_a_replica_that_fetches_nothing_has_its_time_to_load(pool: Pool, loading: Loading) -> None:
    async def go() -> None:
        await pool.settle()
        pool.now += 299.0
        await pool.settle()
        assert pool.killed == 0
        pool.now += 2.0
        await pool.settle()
        assert "not loaded for 300 s" in pool.errors()["b"]

    pool.wait(go())


def test_what_a_replica_says_late_changes_nothing(pool: Pool) -> None:
    pool.wait(pool.settle())
    pool.fetching("b", told(3))
    pool.fetching("nobody", told(3))
    assert _node(pool, "b")["fetching"] is None


def _node(pool: Pool, node: str) -> dict[str, Any]:
    return node_json(node, "127.0.0.1", True, pool.replicas.get(node))
