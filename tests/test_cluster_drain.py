"""Draining and restarting the nodes of a real Ray cluster (fake engine) while agents talk."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.clusters import ROOT, WAIT, InBackground, Up, assistant, kill, until, up, user

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    store = tmp_path_factory.mktemp("drain") / "store"
    with up(store, model="fake://?step_delay=0.02", codec="f16", n_ctx=1024) as running:
        running.wait_ready(2)
        yield running


def kvferry(cluster: Up, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from cluster.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments, "--url", cluster.url],
        cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def talk(cluster: Up, session: str, stop: threading.Event) -> list[str]:
    """Conversations of three turns, again and again; every request must succeed."""
    replies = []
    while not stop.is_set():
        messages: list[dict[str, str]] = []
        for _ in range(3):
            messages.append(user(f"Go on, {session}."))
            replies.append(cluster.chat(messages, session, max_tokens=24).text)
            messages.append(assistant(replies[-1]))
    return replies


def test_a_drained_node_is_empty_and_comes_back(cluster: Up) -> None:
    for n in range(6):
        cluster.chat([user("Hello.")], f"d{n}", max_tokens=4)
    for n in range(3):  # some live on the node that is drained
        assert cluster.migrate(f"d{n}", "node-1").status_code == 200
    done = kvferry(cluster, "drain", "node-1")
    assert done.returncode == 0, done.stderr
    assert "node-1 is drained" in done.stdout
    assert cluster.nodes()["node-1"]["replica"] == "drained"
    assert {record["node"] for n in range(6) if (record := cluster.agent(f"d{n}"))} == {"node-2"}
    kill(cluster.actor("PlacementRouter").pid)
    until(lambda: cluster.get("/v1/cluster").status_code == 200, "the next router")
    cluster.wait_ready(1)
    refused = kvferry(cluster, "drain", "node-2")
    assert refused.returncode == 1
    assert "no other node" in refused.stderr
    assert cluster.nodes()["node-1"]["replica"] == "drained"  # the next router knows of it
    assert kvferry(cluster, "undrain", "node-1").returncode == 0
    cluster.wait_ready(2)


def drain_state(cluster: Up, node: str) -> str:
    return str(cluster.get(f"/v1/cluster/nodes/{node}/drain").json()["state"])


def test_streams_go_on_elsewhere_while_their_node_is_drained(cluster: Up) -> None:
    """Token for token as undisturbed: they speak when they are moved, and no client notices."""
    sessions = [f"streams{n}" for n in range(3)]
    questions = {session: [user(f"Tell me about {session}.")] for session in sessions}
    wanted = {s: cluster.chat(questions[s], max_tokens=200).text for s in sessions}
    assert len(set(wanted.values())) == len(sessions)
    for session in sessions:
        cluster.chat([user("Hello.")], session, max_tokens=4)
        assert cluster.migrate(session, "node-1").status_code == 200  # it stays for a minute
    before = cluster.metric("kvferry_migrations_total", reason="drain")
    with contextlib.ExitStack() as stack:
        streams = {
            s: stack.enter_context(cluster.stream(questions[s], s, max_tokens=200))
            for s in sessions
        }
        for stream in streams.values():
            stream.take(3)
            assert stream.node == "node-1"
        asked = httpx.post(f"{cluster.url}/v1/cluster/nodes/node-1/drain", timeout=WAIT)
        assert asked.status_code == 202, asked.text
        until(
            lambda: cluster.metric("kvferry_migrations_total", reason="drain") > before,
            "an agent to leave",
        )
        assert cluster.nodes()["node-2"]["running"] > 0  # in the middle of its reply
        assert {s: stream.rest() for s, stream in streams.items()} == wanted
        assert {stream.reason for stream in streams.values()} == {"length"}
    until(lambda: drain_state(cluster, "node-1") == "drained", "the node to be empty")
    assert kvferry(cluster, "undrain", "node-1").returncode == 0
    cluster.wait_ready(2)


def test_a_rolling_restart_fails_no_request(cluster: Up) -> None:
    before = {name: node["pid"] for name, node in cluster.nodes().items()}
    stop = threading.Event()
    talks = [InBackground(lambda n=n: talk(cluster, f"r{n}", stop)) for n in range(4)]  # type: ignore[misc]
    until(lambda: len(cluster.agents()) >= 4, "agents")
    done = kvferry(cluster, "restart", "--all")
    stop.set()
    assert done.returncode == 0, done.stderr + done.stdout
    after = {name: node["pid"] for name, node in cluster.nodes().items()}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)
    for conversation in talks:
        replies = conversation.result()
        assert all(reply == replies[n % 3] for n, reply in enumerate(replies))


def test_the_store_outlives_it(cluster: Up) -> None:
    """What was said before all this is still remembered."""
    first = cluster.chat([user("Remember this.")], "kept", max_tokens=8)
    assert kvferry(cluster, "restart", first.node).returncode == 0
    history = [user("Remember this."), assistant(first.text), user("Well?")]
    second = cluster.chat(history, "kept", max_tokens=4)
    assert second.cached > 0
