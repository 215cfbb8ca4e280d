"""A cluster whose store is an S3 bucket: each node writes to its own disk, the bucket follows, and
an agent outlives its node with that disk."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import Up, assistant, kill, recital, until, up, user
from tests.servers import BUCKET, s3_server

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
FAKE = "fake://?step_delay=0.005"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Its URL; every process that is started meanwhile finds the endpoint."""
    with s3_server() as settings, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FSSPEC_S3_ENDPOINT_URL", settings["endpoint_url"])
        patch.setenv("AWS_ACCESS_KEY_ID", settings["key"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", settings["secret"])
        yield f"s3://{BUCKET}/agents"


def durable(cluster: Up, session: str) -> int:
    record = cluster.agent(session)
    return int(record["durable_tokens"]) if record else 0


def test_an_agent_outlives_its_nodes_and_their_disks(bucket: str, tmp_path: Path) -> None:
    local, question = tmp_path / "local", recital()
    settings = {"model": FAKE, "codec": "q4", "local": local, "hysteresis_s": 60}
    with up(bucket, **settings) as cluster:  # type: ignore[arg-type]
        one = cluster.chat(question, "kept", max_tokens=24)
        held = one.usage.prompt + one.usage.completion - 1
        until(lambda: durable(cluster, "kept") == held, "the rows in the bucket")
        assert list((local / one.node / "blocks").rglob("*.safetensors"))
        assert cluster.metric("kvferry_lagging_bytes", node=one.node) == 0
        messages = [*question, assistant(one.text), user("And now?")]
        two = cluster.chat(messages, "kept", max_tokens=24)
        assert (two.cached, two.node) == (held, one.node)
        assert int(two.headers["x-kvferry-durable-tokens"]) == held
        # Its node dies in the middle of an answer: another one has the bucket.
        messages += [assistant(two.text), user("And then?")]
        held = two.usage.prompt + two.usage.completion - 1
        until(lambda: durable(cluster, "kept") == held, "the rows in the bucket")
        with cluster.stream(messages, "kept", max_tokens=200) as stream:
            stream.take(5)
            kill(cluster.nodes()[stream.node]["pid"])
            text = stream.rest()
        assert stream.usage is not None
        assert stream.usage.completion == 200
        assert stream.usage.cached == held
        assert cluster.metric("kvferry_failovers_total") == 1
        messages += [assistant(text), user("And in the end?")]
        held = stream.usage.prompt + 199
        until(lambda: durable(cluster, "kept") == held, "the rows in the bucket")
        cluster.kill_all()
    shutil.rmtree(local)
    with up(bucket, **settings) as cluster:  # type: ignore[arg-type]
        assert "kept" in cluster.agents()
        last = cluster.chat(messages, "kept", max_tokens=2)
        assert (last.cached, last.cache != "cold") == (held, True)


@pytest.mark.soak
def test_what_the_bucket_lacks_is_brought_there_after_a_restart(
    bucket: str, tmp_path: Path
) -> None:
    """Everything dies at once, right after an answer; the nodes' disks survive."""
    local, question = tmp_path / "local", recital("Tree")
    settings = {"model": FAKE, "codec": "q4", "local": local, "nodes": 1}
    with up(bucket, **settings) as cluster:  # type: ignore[arg-type]
        one = cluster.chat(question, "hurried", max_tokens=24)
        journal = local / one.node / "agents"
        until(lambda: list(journal.rglob("*.safetensors")) or durable(cluster, "hurried"), "a card")
        cluster.kill_all()
    with up(bucket, **settings) as cluster:  # type: ignore[arg-type]
        held = one.usage.prompt + one.usage.completion - 1
        until(lambda: durable(cluster, "hurried") == held, "the rows in the bucket")
        messages = [*question, assistant(one.text), user("And now?")]
        assert cluster.chat(messages, "hurried", max_tokens=2).cached == held
