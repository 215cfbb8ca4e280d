"""Hosts without a shared store: the head keeps cards and claims, every host's disk keeps blocks."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clusters import START, Reply, assistant, recital, until, user
from tests.hosts import Hosts, cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
FAKE = "fake://?step_delay=0.01&token_delay=0.005"  # so slow that rows are always brought


@contextmanager
def home(folder: Path, replicas: int) -> Iterator[Hosts]:
    store = f"cluster://{folder}"
    settings = {"model": FAKE, "codec": "f16", "hysteresis_s": 60, "local": ""}
    with cluster(["a", "b"], store=store, replicas=replicas, **settings) as running:
        yield running


def lose(hosts: Hosts, node: str, folder: Path) -> None:
    """The host and its disk."""
    hosts[node].kill()
    shutil.rmtree(folder / node)


def blocks(disk: Path) -> list[str]:
    return sorted(path.name for path in disk.rglob("*.full.*"))


def wait_durable(hosts: Hosts, session: str, one: Reply) -> int:
    """Until all of its last turn is stored: its rows."""
    rows = one.usage.prompt + one.usage.completion - 1

    def durable() -> bool:
        record = hosts.agent(session)
        return record is not None and record["durable_tokens"] == rows

    until(durable, "all of the turn on the disks")
    return rows


def test_a_home_cluster_survives_the_death_of_a_host(tmp_path: Path) -> None:
    question = recital("Cat")
    with home(tmp_path, 2) as hosts:
        one = hosts.chat(question, "survivor", max_tokens=24)
        rows = wait_durable(hosts, "survivor", one)
        other = hosts.other(one.node)
        until(lambda: blocks(tmp_path / "a") == blocks(tmp_path / "b"), "two copies", START)
        lose(hosts, one.node, tmp_path)
        messages = [*question, assistant(one.text), user("And now?")]
        two = hosts.chat(messages, "survivor", max_tokens=16)
        assert two.node == other
        assert two.cached == rows
        # What the same conversation says where nothing happened.
        again = hosts.chat(question, "twin", max_tokens=24)
        quiet = hosts.chat(messages, "twin", max_tokens=16)
        assert (again.text, quiet.text) == (one.text, two.text)

        def short() -> int | None:
            found: int | None = hosts.get("/v1/cluster").json()["copies"]["short_blocks"]
            return found

        until(short, "word of blocks that lost a copy")


@pytest.mark.soak
def test_with_one_copy_the_agent_is_cold_and_says_so(tmp_path: Path) -> None:
    question = recital("Lamp")
    with home(tmp_path, 1) as hosts:
        one = hosts.chat(question, "single", max_tokens=24)
        wait_durable(hosts, "single", one)
        lose(hosts, one.node, tmp_path)
        messages = [*question, assistant(one.text), user("And now?")]
        two = hosts.chat(messages, "single", max_tokens=16)
        assert two.cached == 0
        assert two.cache == "cold"
        faults = hosts.nodes()[two.node]["faults"]  # gone, or silent, as far as is known
        assert faults.get("missing", 0) + faults.get("store_unavailable", 0) > 0
