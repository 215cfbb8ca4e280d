"""Nodes without the model, on hosts of their own: they fetch it from the head or the store,
verified, and go on where they were after a kill."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from storage.digests import describe
from tests.clusters import START, alive, assistant, recital, until, user
from tests.hosts import Host, Hosts, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(400)]
SETTINGS: dict[str, Any] = {"codec": "f16", "n_ctx": 2048, "threads": 1, "hysteresis_s": 60}


@pytest.fixture
def model(smollm2_gguf: Path, tmp_path: Path) -> Path:
    """In a directory that nodes may be kept from."""
    folder = tmp_path / "models"
    folder.mkdir()
    return Path(shutil.copy(smollm2_gguf, folder / "SmolLM2-135M-Instruct.gguf"))


@pytest.fixture
def hosts(model: Path) -> Iterator[Hosts]:
    with cluster(["a"], spares=["b"], model=model, **SETTINGS) as running:
        yield running


def fetched(hosts: Hosts, node: str) -> int:
    """Bytes of the model that a node says it has; 0 while it does not fetch."""
    rejoin(hosts, node)
    told = hosts.nodes().get(node, {}).get("fetching")
    return told["done"] if told else 0


def rejoin(hosts: Hosts, node: str) -> None:
    """On a busy machine a raylet may not start in the time Ray gives it."""
    if hosts[node].started[-1].poll() is not None:
        hosts[node].kill()
        hosts.join(node)


def fetcher(host: Host) -> psutil.Process:
    """The process that writes a part of a model."""
    return next(
        process
        for process in host.processes()
        if any(file.path.endswith(".part") for file in process.open_files())
    )


def is_ready(hosts: Hosts, node: str) -> bool:
    rejoin(hosts, node)
    return hosts.nodes().get(node, {}).get("replica") == "ready"


def test_a_killed_download_goes_on_and_the_node_speaks_the_same(hosts: Hosts, model: Path) -> None:
    question = recital()
    one = hosts.chat(question, "asks", max_tokens=24)
    b, size = hosts["b"], model.stat().st_size
    b.hides(model.parent)
    b.limit(100)
    hosts.join("b")
    until(lambda: fetched(hosts, "b") > size // 3, "a third of the model on b", START)
    assert 0 < hosts.metric("kvferry_model_fetched_bytes", node="b") < size
    assert hosts.metric("kvferry_model_bytes", node="b") == size
    assert not is_ready(hosts, "b")
    replica = fetcher(b)
    replica.kill()
    until(lambda: not alive(replica), "the end of the replica")
    until(lambda: is_ready(hosts, "b"), "a ready replica on b", START)
    assert size < b.received < 1.5 * size
    copy = b.disk / "cache/kvferry/models" / describe(model).sha256 / model.name
    assert copy.read_bytes() == model.read_bytes()
    assert hosts.migrate("asks", "b").status_code == 200
    again = hosts.chat(question, "asks", max_tokens=24)
    assert (again.node, again.cached) == ("b", one.usage.prompt - 1)
    assert again.text == one.text


@pytest.mark.soak
def test_another_file_at_the_same_place_is_not_served(hosts: Hosts, model: Path) -> None:
    """b has a file of that name with other bytes: it fetches the head's."""
    question = recital()
    one = hosts.chat(question, "asks", max_tokens=16)
    b = hosts["b"]
    b.hides(model.parent)
    b.prefix[2] = (
        'mount -t tmpfs none "$0" && head -c 1000000 /dev/zero > "$0/$KVF_NAME" && exec "$@"'
    )
    b.own["KVF_NAME"] = model.name
    hosts.join("b")
    until(lambda: is_ready(hosts, "b"), "a ready replica on b", START)
    assert hosts.migrate("asks", "b").status_code == 200
    messages = [*question, assistant(one.text), user("Once more.")]
    assert hosts.chat(messages, "asks", max_tokens=4).node == "b"


@pytest.mark.soak
def test_a_node_fetches_from_the_store_where_the_head_has_put_it(model: Path) -> None:
    with cluster(["a"], spares=["b"], model=model, share_model="store", **SETTINGS) as hosts:
        size, b = model.stat().st_size, hosts["b"]

        def published() -> bool:
            logs = hosts["head"].disk.glob("ray/session_2*/logs/worker-*.err")
            return any("is in the store" in log.read_text(errors="replace") for log in logs)

        until(published, "the model in the store", START)
        head_sent = hosts["head"].sent
        store_sent = hosts["store"].sent
        b.hides(model.parent)
        hosts.join("b")
        until(lambda: is_ready(hosts, "b"), "a ready replica on b", START)
        assert hosts["store"].sent - store_sent > size
        assert hosts["head"].sent - head_sent < size // 4
        assert hosts.chat(recital(), "asks", max_tokens=4).status == 200
