"""SIGKILL while an answer is streamed: of the replica, its raylet, the router.

The client's one HTTP stream says what the undisturbed run says, and the agent's next turn is served
from its memory.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import InBackground, Stream, Up, assistant, kill, recital, until, up, user

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
NEXT = user("And now?")


@pytest.fixture(scope="module")
def cluster(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with up(tmp_path_factory.mktemp("failover") / "store", codec="f16", n_ctx=2048) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(cluster: Up) -> Stream:
    """The greedy run of `recital`, 300 tokens."""
    with cluster.stream(recital(count=60), "undisturbed", max_tokens=300) as stream:
        stream.rest()
    assert stream.usage is not None
    assert stream.usage.completion == 300
    return stream


@pytest.fixture
def healthy(cluster: Up) -> Iterator[Up]:
    """The cluster with both replicas, which every test leaves behind."""
    cluster.wait_ready(2)
    yield cluster
    cluster.wait_ready(2)
    assert sorted(cluster.nodes()) == ["node-1", "node-2"]


def failovers(cluster: Up) -> float:
    return cluster.metric("kvferry_failovers_total")


def running(cluster: Up) -> str | None:
    """The node that runs a turn now."""
    return next((name for name, node in cluster.nodes().items() if node["running"]), None)


def check_next_turn(cluster: Up, session: str, stream: Stream, n_tokens: int) -> str:
    """The turn after the disturbed one, which had a reply of `n_tokens`, finds all its rows but
    that of the last token, which was never fed; returns the node it ran on."""
    assert stream.usage is not None
    assert stream.usage.completion == n_tokens
    following = [*recital(count=60), assistant(stream.text), NEXT]
    reply = cluster.chat(following, session, max_tokens=2)
    assert reply.cached == reply.usage.cached == stream.usage.prompt + n_tokens - 1
    assert reply.cache != "cold"
    return reply.node


@pytest.mark.model
def test_the_replica_is_killed_while_it_speaks(healthy: Up, undisturbed: Stream) -> None:
    before = failovers(healthy)
    with healthy.stream(recital(count=60), "replica", max_tokens=100) as stream:
        stream.take(30)
        kill(healthy.nodes()[stream.node]["pid"])
        text = stream.rest()
    assert failovers(healthy) == before + 1
    assert undisturbed.text.startswith(text)
    assert stream.reason == "length"
    assert stream.usage is not None
    assert undisturbed.usage is not None
    assert stream.usage.prompt == undisturbed.usage.prompt
    check_next_turn(healthy, "replica", stream, 100)


@pytest.mark.model
def test_both_replicas_are_killed_one_after_the_other(healthy: Up, undisturbed: Stream) -> None:
    before = failovers(healthy)
    question = recital(count=60)
    with healthy.stream(question, "both", max_tokens=150) as stream:
        stream.take(10)
        kill(healthy.nodes()[stream.node]["pid"])
        until(lambda: failovers(healthy) > before, "the loss to be noticed")
        second = until(lambda: running(healthy), "the turn to go on elsewhere")
        kill(healthy.nodes()[second]["pid"])
        text = stream.rest()
    assert failovers(healthy) == before + 2
    assert undisturbed.text.startswith(text)
    check_next_turn(healthy, "both", stream, 150)


@pytest.mark.model
def test_the_replica_is_killed_while_it_prefills(healthy: Up, undisturbed: Stream) -> None:
    before = failovers(healthy)
    pids = {name: node["pid"] for name, node in healthy.nodes().items()}
    with healthy.stream(recital(count=60), "prefill", max_tokens=40) as stream:
        kill(pids[stream.node])
        text = stream.rest()
    assert failovers(healthy) == before + 1
    assert undisturbed.text.startswith(text)
    check_next_turn(healthy, "prefill", stream, 40)


@pytest.mark.model
def test_the_raylet_is_killed_and_its_node_comes_back(healthy: Up, undisturbed: Stream) -> None:
    before = failovers(healthy)
    with healthy.stream(recital(count=60), "raylet", max_tokens=300) as stream:
        stream.take(10)
        node = healthy.nodes()[stream.node]
        kill(node["raylet_pid"])
        text = stream.rest()
    assert failovers(healthy) > before, "the reply ended before the replica did"
    assert text == undisturbed.text
    assert undisturbed.usage is not None
    assert stream.usage.completion == undisturbed.usage.completion
    assert check_next_turn(healthy, "raylet", stream, 300) != stream.node

    def revived() -> bool:
        nodes = healthy.nodes()
        assert set(nodes) <= {"node-1", "node-2"}, "the old and the new one at the same time"
        now = nodes.get(stream.node, {"raylet_pid": None})
        return now["raylet_pid"] not in (None, node["raylet_pid"])

    until(revived, f"{stream.node} to come back")
    healthy.wait_ready(2)
    moved = healthy.migrate("raylet", stream.node)
    assert moved.status_code == 200, moved.text
    again = healthy.chat([*recital(count=60), assistant(text), NEXT], "raylet", max_tokens=2)
    assert again.node == stream.node
    assert again.cached == again.usage.prompt - 1


@pytest.mark.model
def test_the_router_is_killed_while_a_replica_speaks(healthy: Up, undisturbed: Stream) -> None:
    with healthy.stream(recital(count=60), "router", max_tokens=100) as stream:
        stream.take(10)
        kill(healthy.actor("PlacementRouter").pid)
        text = stream.rest()
    assert undisturbed.text.startswith(text)
    assert check_next_turn(healthy, "router", stream, 100) == stream.node


@pytest.mark.model
def test_the_router_is_killed_between_two_turns(healthy: Up) -> None:
    one = healthy.chat(recital(), "between", max_tokens=10)
    kill(healthy.actor("PlacementRouter").pid)
    two = healthy.chat([*recital(), assistant(one.text), NEXT], "between", max_tokens=2)
    assert two.cached == one.usage.prompt + one.usage.completion - 1
    assert two.node == one.node
    record = healthy.agent("between")
    assert record is not None
    assert record["epoch"] == 1


# ---- one node, no model


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    store = tmp_path_factory.mktemp("single") / "store"
    with up(store, nodes=1, codec="f16", model="fake://?step_delay=0.03") as running:
        yield running


def long_question(cluster: Up, **body: object) -> tuple[str, str]:
    """A question whose reply has 60 tokens or more, and that reply; the engine is deterministic."""
    for i in range(100):
        question = f"Question {i}."
        reply = cluster.chat([user(question)], max_tokens=100, **body)
        if reply.usage.completion >= 60:
            return question, reply.text
    raise AssertionError("no question has a long reply")


def test_the_only_replica_is_killed_and_comes_back(single: Up) -> None:
    sampled = {"temperature": 1.0, "seed": 11}
    question, whole = long_question(single, **sampled)
    with single.stream([user(question)], "alone", max_tokens=100, **sampled) as stream:
        stream.take(20)
        kill(single.nodes()["node-1"]["pid"])
        assert stream.rest() == whole
    assert stream.usage is not None
    assert stream.usage.completion == len(whole)
    following = [user(question), assistant(whole), NEXT]
    assert single.chat(following, "alone", max_tokens=2).cached > len(question) + len(whole)


def test_a_reply_in_one_piece_survives_too(single: Up) -> None:
    question, whole = long_question(single)
    call = InBackground(lambda: single.chat([user(question)], "whole", max_tokens=100))
    until(lambda: single.nodes()["node-1"]["running"], "the turn to run")
    kill(single.nodes()["node-1"]["pid"])
    assert call.result().text == whole
    single.wait_ready(1)
