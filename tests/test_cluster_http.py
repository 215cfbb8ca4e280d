"""The HTTP surface of a real cluster on the real model: agents are remembered, moved, forgotten."""

import time
from pathlib import Path

import httpx
import pytest

from tests.clusters import (
    WAIT,
    InBackground,
    Up,
    assistant,
    recital,
    shared_cluster,
    until,
    user,
)

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(300)]
MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Up:
    return shared_cluster(request.config, tmp_path_factory)


def test_the_views_of_a_cluster(cluster: Up) -> None:
    models = cluster.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [MODEL]
    assert cluster.get(f"/v1/models/{MODEL}").json()["object"] == "model"
    assert cluster.get("/healthz").json() == {"status": "ok"}
    ready = cluster.get("/readyz")
    assert (ready.status_code, ready.json()["replicas"]) == (200, 2)
    report = cluster.get("/v1/cluster").json()
    assert report["codec"] == "f16"
    nodes = {node["id"]: node for node in report["nodes"]}
    assert set(nodes) == {"head", "node-1", "node-2"}
    assert nodes["head"]["replica"] == "none"
    family = {process.pid for process in cluster.family()}
    for name in ("node-1", "node-2"):
        node = nodes[name]
        assert node["replica"] == "ready"
        assert {node["pid"], node["raylet_pid"]} <= family
        assert node["address"]
        assert node["engine"] == "llama.cpp"
        assert node["device"]
        assert node["bytes"]["engine"] > 0


def test_the_metrics_are_prometheus_text_and_count(cluster: Up) -> None:
    before = {
        kind: cluster.metric("kvferry_tokens_total", kind=kind)
        for kind in ("cached", "prefilled", "completion")
    }
    served = cluster.metric("kvferry_requests_total", status="200")
    reply = cluster.chat([user("Good evening.")], "metrics", max_tokens=4)
    counted = {
        kind: cluster.metric("kvferry_tokens_total", kind=kind) - count
        for kind, count in before.items()
    }
    usage = reply.usage
    assert counted == {
        "cached": usage.cached,
        "prefilled": usage.prompt - usage.cached,
        "completion": usage.completion,
    }
    assert cluster.metric("kvferry_requests_total", status="200") == served + 1
    assert cluster.metric("kvferry_replica_ready") == 2
    assert cluster.metric("kvferry_kv_bytes", tier="engine") > 0


def test_a_reply_and_its_headers(cluster: Up) -> None:
    headers = {"x-request-id": "mine-17"}
    reply = cluster.chat([user("Say hello.")], "headers", headers, max_tokens=8)
    assert reply.headers["x-request-id"] == "mine-17"
    assert reply.node in cluster.nodes()
    assert reply.cache == "cold"
    assert reply.cached == reply.usage.cached == 0
    assert reply.prefilled == reply.usage.prompt
    assert reply.usage.completion == 8
    assert reply.reason == "length"
    assert reply.body["object"] == "chat.completion"
    assert reply.body["model"] == MODEL
    assert cluster.chat([user("Say hello.")], max_tokens=1).headers["x-request-id"]


def test_a_stream_says_what_a_whole_reply_says(cluster: Up) -> None:
    question = [user("Name three colours.")]
    whole = cluster.chat(question, max_tokens=30)
    with cluster.stream(question, max_tokens=30) as stream:
        assert stream.rest() == whole.text
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert stream.reason == whole.reason
    assert stream.usage == whole.usage
    assert len(stream.pieces) > 10


def test_a_seed_makes_a_sampled_reply_repeatable(cluster: Up) -> None:
    question = [user("Tell me a story.")]
    texts = [
        cluster.chat(question, temperature=1.5, seed=seed, max_tokens=12).text
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_a_stop_string_ends_the_reply_and_is_not_in_it(cluster: Up) -> None:
    question = recital()
    whole = cluster.chat(question, "stopped", max_tokens=40).text
    assert "room 2." in whole
    reply = cluster.chat(question, "stopped", stop=["room 2."], max_tokens=40)
    assert reply.text == whole.partition("room 2.")[0]
    assert reply.reason == "stop"


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_the_second_turn_prefills_only_the_new_message(cluster: Up, temperature: float) -> None:
    session, first = f"second-{temperature}", [user("Who wrote Hamlet?")]
    one = cluster.chat(first, session, max_tokens=9, temperature=temperature, seed=5)
    assert one.usage.completion == 9
    second = [*first, assistant(one.text), user("And now?")]
    two = cluster.chat(second, session, max_tokens=9, temperature=temperature, seed=6)
    # The seam in tokens, from prompts without a memory: "x" is one token.
    retold = cluster.chat([*first, assistant("x"), user("And now?")], max_tokens=1).usage.prompt
    seam = retold - one.usage.prompt - 1
    assert two.usage.prompt == one.usage.prompt + one.usage.completion + seam
    # The last token of a reply that was cut by its length was never fed.
    assert two.usage.cached == one.usage.prompt + one.usage.completion - 1
    assert two.prefilled == seam + 1
    assert two.cache == "hot"
    assert two.node == one.node


def test_a_side_request_costs_the_conversation_nothing(cluster: Up) -> None:
    first = recital()
    one = cluster.chat(first, "side", max_tokens=10)
    title = [user(f"Find a title of three words for this conversation: {first[0]['content'][:80]}")]
    side = cluster.chat(title, "side", max_tokens=10)
    assert side.cached < 30  # the template's own system prompt
    two = cluster.chat([*first, assistant(one.text), user("And now?")], "side", max_tokens=4)
    assert two.cached == one.usage.prompt + one.usage.completion - 1
    record = cluster.agent("side")
    assert record is not None
    assert record["branches"] == 2


def test_without_a_session_no_agent_is_left(cluster: Up) -> None:
    before = cluster.agents()
    for _ in range(2):
        assert cluster.chat(recital("Tree", 10), max_tokens=4).status == 200
    with cluster.stream([user("Hello.")], max_tokens=4) as stream:
        stream.rest()
    assert cluster.agents() == before


def test_agents_of_one_session_are_told_apart(cluster: Up) -> None:
    question = recital("Tree", 10)
    for name in ("critic", "author"):
        assert cluster.chat(question, "team", {"x-agent-id": name}, max_tokens=2).status == 200
    again = cluster.chat(question, "team", {"x-agent-id": "critic"}, max_tokens=2)
    assert again.cached == again.usage.prompt - 1
    assert {"team/critic", "team/author"} <= cluster.agents()
    assert cluster.get("/v1/agents/team/critic").json()["id"] == "team/critic"


def test_two_turns_of_one_agent_at_the_same_time_queue(cluster: Up) -> None:
    question = recital("Piano", 20)
    calls = [InBackground(lambda: cluster.chat(question, "twice", max_tokens=24)) for _ in range(2)]
    first, second = sorted((call.result() for call in calls), key=lambda reply: reply.cached)
    assert first.cached < 64  # what all prompts begin with
    assert second.cached == second.usage.prompt - 1
    assert first.text == second.text
    assert first.usage.completion == second.usage.completion == 24
    record = cluster.agent("twice")
    assert record is not None
    assert record["branches"] == 1


def test_different_agents_run_side_by_side(cluster: Up) -> None:
    calls = [
        InBackground(lambda i=i: cluster.chat([user(f"Count to {i}.")], f"side-{i}", max_tokens=20))
        for i in range(8)
    ]
    assert all(call.result().status == 200 for call in calls)


def test_an_idle_agent_migrates_with_its_memory(cluster: Up) -> None:
    question = recital("Tree", 29)
    one = cluster.chat(question, "mover", max_tokens=24)
    before = cluster.agent("mover")
    assert before is not None
    target = cluster.other(one.node)
    moved = cluster.migrate("mover", target)
    assert moved.status_code == 200, moved.text
    assert moved.json()["source"] == one.node
    assert moved.json()["target"] == target
    assert moved.json()["epoch"] == before["epoch"] + 1
    record = cluster.agent("mover")
    assert record is not None
    assert record["node"] == target
    two = cluster.chat(question, "mover", max_tokens=24)
    assert (two.node, two.cache) == (target, "hot")  # read ahead, before the move
    assert two.cached == two.usage.prompt - 1
    assert two.text == one.text


def test_a_stream_goes_on_while_its_agent_migrates(cluster: Up) -> None:
    question = recital()
    undisturbed = cluster.chat(question, max_tokens=90)
    lost = cluster.metric("kvferry_failovers_total")
    with cluster.stream(question, "streaming-mover", max_tokens=90) as stream:
        stream.take(10)
        target = cluster.other(stream.node)
        moved = cluster.migrate("streaming-mover", target)
        assert moved.status_code == 200, moved.text
        assert stream.reason is None
        assert stream.rest() == undisturbed.text
    assert stream.usage == undisturbed.usage
    assert cluster.metric("kvferry_failovers_total") == lost
    following = [*question, assistant(stream.text), user("And now?")]
    after = cluster.chat(following, "streaming-mover", max_tokens=2)
    assert after.node == target
    assert after.cached == undisturbed.usage.prompt + undisturbed.usage.completion - 1


def test_migrating_where_the_agent_is_changes_nothing(cluster: Up) -> None:
    one = cluster.chat([user("Stay here.")], "stays", max_tokens=4)
    epoch = cluster.migrate("stays", one.node).json()["epoch"]
    record = cluster.agent("stays")
    assert record is not None
    assert record["epoch"] == epoch


def test_an_unknown_target_or_agent_is_refused(cluster: Up) -> None:
    node = cluster.chat([user("Hello.")], "homebody", max_tokens=2).node
    for target in ("nowhere", "head"):
        refused = cluster.migrate("homebody", target)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (404, "target")
        assert target in error["message"]
    record = cluster.agent("homebody")
    assert record is not None
    assert record["node"] == node
    refused = cluster.migrate("nobody", node)
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "agent")


def test_a_deleted_agent_starts_cold(cluster: Up) -> None:
    system = {"role": "system", "content": "Forget."}  # a beginning shared with no other agent
    question = [system, *recital("Tree", 12)]
    cluster.chat(question, "forgotten", max_tokens=4)
    path = f"{cluster.url}/v1/agents/forgotten"
    assert httpx.delete(path, timeout=WAIT).json() == {"id": "forgotten", "deleted": True}
    assert cluster.agent("forgotten") is None
    assert "forgotten" not in cluster.agents()
    assert httpx.delete(path, timeout=WAIT).status_code == 404
    again = cluster.chat(question, "forgotten", max_tokens=4)
    assert (again.cached, again.cache) == (0, "cold")


def test_an_agent_that_speaks_cannot_be_deleted(cluster: Up) -> None:
    with cluster.stream(recital(), "speaker", max_tokens=100) as stream:
        stream.take(3)
        refused = httpx.delete(f"{cluster.url}/v1/agents/speaker", timeout=WAIT)
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "agent_busy"
        stream.rest()
    assert stream.usage is not None
    assert stream.usage.completion == 100


def test_a_client_that_goes_away_ends_its_turn(cluster: Up) -> None:
    question = recital("Tree", 30)
    with cluster.stream(question, "gone", max_tokens=1500) as stream:
        stream.take(5)
    until(lambda: not any(node["running"] for node in cluster.nodes().values()), "an idle cluster")
    again = cluster.chat(question, "gone", max_tokens=5)
    assert again.cached == again.usage.prompt - 1
    assert again.text == stream.text[: len(again.text)]


@pytest.mark.parametrize(
    ("body", "headers", "status", "param"),
    [
        ({"model": "gpt-4"}, {}, 404, "model"),
        ({"messages": []}, {}, 400, "messages"),
        ({"messages": [user("word " * 3000)]}, {}, 400, "messages"),
        ({"max_tokens": 0}, {}, 400, "max_tokens"),
        ({"max_tokens": -1}, {}, 400, "max_tokens"),
        ({}, {"x-session-id": "../../etc"}, 400, "x-session-id"),
        ({}, {"x-session-id": "s" * 300}, 400, "x-session-id"),
    ],
)
def test_bad_input_is_refused_by_name(
    cluster: Up, body: dict[str, object], headers: dict[str, str], status: int, param: str
) -> None:
    asked = {"messages": [user("Hello.")]} | body
    refused = cluster.chat(headers=headers, **asked)  # type: ignore[arg-type]
    assert (refused.status, refused.error["param"]) == (status, param)
    assert refused.error["type"] == "invalid_request_error"


def test_after_bad_input_the_cluster_goes_on(cluster: Up) -> None:
    url = f"{cluster.url}/v1/chat/completions"
    for content in (b"{", b'{"messages": "x"}', b"\xff", b"[" * 100_000):
        refused = httpx.post(url, content=content, timeout=WAIT)
        assert refused.status_code == 400
        assert refused.json()["error"]["message"]
    began = time.monotonic()
    assert cluster.chat([user("Hello.")], max_tokens=2).status == 200
    assert time.monotonic() - began < WAIT / 2
