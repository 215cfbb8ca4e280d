"""The head dies and comes back: without fault tolerance the cluster is started again and every
agent has its memory; with it (Ray's tables in Redis) replicas live on, with all that they hold."""

import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.clusters import START, Reply, alive, assistant, recital, until, user
from tests.hosts import Hosts, _start_head, cluster
from tests.require import require

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
FAKE = "fake://?step_delay=0.02"
SETTINGS: dict[str, Any] = {"model": FAKE, "codec": "f16", "hysteresis_s": 60}
NEXT = "And now?"
BOUND = 20.0  # seconds of a turn of 16 tokens, whatever has just happened


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
    for last in (False, False, True):
        # Ray would take the other hosts' raylets, in the one process table, for this host's.
        (hosts["head"].disk / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        (hosts["head"].disk / "out").write_text("")
        try:
            return _start_head(hosts, ingresses=1)
        except AssertionError:  # a busy machine does not start one in the time Ray gives it
            if last or "timed out during startup" not in hosts["head"].output:
                raise
            kill_head(hosts)


def gcs(hosts: Hosts) -> psutil.Process:
    return next(p for p in hosts["head"].processes() if p.name() == "gcs_server")


def two_turns(hosts: Hosts, noun: str) -> tuple[Reply, str]:
    """An agent's first turn; and what it says in its second one, undisturbed, under another name
    that has the same history."""
    one = hosts.chat(recital(noun), noun, max_tokens=24)
    messages = [*recital(noun), assistant(one.text), user(NEXT)]
    return one, hosts.chat(messages, f"not-{noun}", max_tokens=16).text


def follow(hosts: Hosts, noun: str, one: Reply) -> Reply:
    messages = [*recital(noun), assistant(one.text), user(NEXT)]
    return hosts.chat(messages, noun, max_tokens=16)


@pytest.mark.soak
def test_a_cluster_that_is_started_again_has_every_memory() -> None:
    with cluster(["a", "b"], **SETTINGS) as hosts:
        nouns = ["Cat", "Lamp", "Piano", "Tree"]
        first = {noun: two_turns(hosts, noun) for noun in nouns}
        for noun in nouns:
            hosts.wait_stored(noun)
        kill_head(hosts)
        for name in ("a", "b"):
            hosts[name].kill()
        start_head(hosts)
        for name in ("a", "b"):
            hosts.join(name)
        until(hosts.answers, "the ingress", START)
        hosts.wait_ready(2)
        for noun, (one, undisturbed) in first.items():
            record = hosts.agent(noun)
            assert record is not None
            assert (record["node"], record["state"]) == (None, "warm")
            two = follow(hosts, noun, one)
            assert two.cache in ("warm", "remote")
            assert two.cached == one.usage.prompt + one.usage.completion - 1
            assert two.text == undisturbed


@pytest.fixture(scope="module")
def tolerant() -> Iterator[Hosts]:
    require("redis", shutil.which("redis-server") is not None, "redis-server is not installed")
    with cluster(["a", "b"], redis=True, **SETTINGS) as hosts:
        yield hosts


def pids(hosts: Hosts) -> dict[str, int]:
    """Of the replicas."""
    return {name: node["pid"] for name, node in hosts.nodes().items()}


def test_streams_and_turns_go_on_while_the_gcs_is_gone(tolerant: Hosts) -> None:
    hosts = tolerant
    quiet = hosts.chat(recital("Lamp"), "quiet", max_tokens=400).text
    one, undisturbed = two_turns(hosts, "Cat")
    before = pids(hosts)
    server, supervisor = gcs(hosts), hosts["head"].started[0]
    command, environment = server.cmdline(), server.environ()
    supervisor.send_signal(signal.SIGSTOP)  # it would end all else on the head
    with hosts.stream(recital("Lamp"), "loud", max_tokens=400) as stream:
        stream.take(10)
        server.kill()
        until(lambda: not alive(server), "the end of the GCS")
        stream.take(20)
        began = time.monotonic()
        two = follow(hosts, "Cat", one)
        assert time.monotonic() - began < BOUND
        assert (two.text, two.cache) == (undisturbed, "hot")
        moved = hosts.migrate("Cat", hosts.other(two.node))
        assert moved.status_code == 200, moved.text
        hosts["head"].start(command, environment)
        assert stream.rest() == quiet
    again = hosts.chat(recital("Cat"), "Cat", max_tokens=24)
    assert (again.text, again.node) == (one.text, moved.json()["target"])
    assert again.cached == one.usage.prompt - 1
    assert hosts.chat(recital("Tree"), "newcomer", max_tokens=4).status == 200
    assert pids(hosts) == before


def test_replicas_outlive_the_head_with_what_they_hold(tolerant: Hosts) -> None:
    hosts = tolerant
    one, undisturbed = two_turns(hosts, "Piano")
    before = pids(hosts)
    with hosts.stream(recital("Tree"), "cut", max_tokens=400) as stream:
        stream.take(10)
        kill_head(hosts)
        with pytest.raises(httpx.TransportError):
            stream.rest()
    start_head(hosts)
    until(hosts.answers, "the ingress", START)
    hosts.wait_ready(2)
    began = time.monotonic()
    two = follow(hosts, "Piano", one)
    assert time.monotonic() - began < BOUND
    assert (two.text, two.cache) == (undisturbed, "hot")
    assert two.cached == one.usage.prompt + one.usage.completion - 1
    assert pids(hosts) == before
    assert hosts.migrate("Piano", hosts.other(two.node)).status_code == 200
    again = hosts.chat(recital("Tree"), "cut", max_tokens=60)
    assert again.text == hosts.chat(recital("Tree"), "uncut", max_tokens=60).text
