"""The head dies and comes back: without fault tolerance the cluster is started again and every
agent has its memory; with it (Ray's tables in Redis) replicas live on, with all that they hold."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.clusters import START, Reply, alive, assistant, recital, until, user
from tests.hosts import Hosts, _start_head, cluster
from tests.require import require

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
FAKE = "fake://?step_delay=0.02"
SETTINGS: dict[str, Any] = {"model": FAKE, "codec": "f16", "hysteresis_s": 60}
NEXT = "And now?"


@pytest.fixture
def redis() -> None:
    require("redis", shutil.which("redis-server") is not None, "redis-server is not installed")


def kill_head(hosts: Hosts) -> None:
    """Everything of Ray's on it; clients' connections to the relay stay possible."""
    head = hosts["head"]
    relay = head.started[2].pid
    victims = [p for p in head.processes() if p.pid != relay]
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    until(lambda: not any(map(alive, victims)), "the end of the head")
    for started in head.started:
        if started.pid != relay:
            started.wait(10)


def start_head(hosts: Hosts) -> None:
    (hosts["head"].disk / "out").write_text("")
    _start_head(hosts)


def gcs(hosts: Hosts) -> psutil.Process:
    return next(p for p in hosts["head"].processes() if p.name() == "gcs_server")


def follow(hosts: Hosts, noun: str, one: Reply) -> Reply:
    messages = [*recital(noun), assistant(one.text), user(NEXT)]
    return hosts.chat(messages, noun, max_tokens=16)


def test_a_cluster_that_is_started_again_has_every_memory() -> None:
    with cluster(["a", "b"], **SETTINGS) as hosts:
        nouns = ["Cat", "Lamp", "Piano", "Tree"]
        first = {noun: hosts.chat(recital(noun), noun, max_tokens=24) for noun in nouns}
        undisturbed = {
            noun: hosts.chat(
                [*recital(noun), assistant(one.text), user(NEXT)], f"not {noun}", max_tokens=16
            ).text
            for noun, one in first.items()
        }
        for noun in nouns:
            hosts.wait_stored(noun)
        assert {one.node for one in first.values()} == {"a", "b"}
        kill_head(hosts)
        for name in ("a", "b"):
            hosts[name].kill()
        start_head(hosts)
        for name in ("a", "b"):
            hosts.join(name)
        until(hosts.answers, "the ingress", START)
        hosts.wait_ready(2)
        for noun, one in first.items():
            record = hosts.agent(noun)
            assert record is not None
            assert (record["node"], record["state"]) == (None, "warm")
            two = follow(hosts, noun, one)
            assert two.cache in ("warm", "remote")
            assert two.cached == one.usage.prompt + one.usage.completion - 1
            assert two.text == undisturbed[noun]


@pytest.fixture
def tolerant(redis: None) -> Iterator[Hosts]:
    with cluster(["a", "b"], redis=True, **SETTINGS) as hosts:
        yield hosts
