"""The whole cluster stops, or is killed, and starts again on the same store: agents are there, with
their memory."""

from pathlib import Path

import pytest

from tests.clusters import Up, alive, assistant, recital, up, user

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(300)]
SETTINGS = {"codec": "f16", "n_ctx": 2048}


@pytest.fixture
def store(smollm2_gguf: Path, tmp_path: Path) -> Path:
    return tmp_path / "store"


def check_listed(cluster: Up, session: str, tokens: int) -> None:
    """The agent is known before anybody has asked for a turn: nobody runs it, the store has it."""
    record = cluster.agent(session)
    assert record is not None
    assert session in cluster.agents()
    assert (record["node"], record["state"], record["tokens"]) == (None, "warm", tokens)
    assert record["bytes"]["store"] > 0


def test_agents_outlive_the_cluster(store: Path) -> None:
    question = recital()
    with up(store, **SETTINGS) as cluster:
        one = cluster.chat(question, "kept", max_tokens=24)
        cluster.chat(question, "dropped", max_tokens=2)
        cluster.wait_stored("kept")
        family = cluster.family()
        # Not stored yet, most likely: the stop has to do it.
        last = cluster.chat(recital("Tree"), "hurried", max_tokens=24)
        assert cluster.interrupt() == 0
        assert [p for p in family if alive(p)] == []
        assert "Stopped" in cluster.output.read_text()
    tokens = one.usage.prompt + one.usage.completion
    with up(store, **SETTINGS) as cluster:
        assert {"kept", "dropped", "hurried"} <= cluster.agents()
        check_listed(cluster, "kept", tokens)
        again = cluster.chat(question, "kept", max_tokens=24)
        assert again.cache in ("warm", "remote")
        assert again.cached == one.usage.prompt - 1
        assert again.text == one.text
        following = [*recital("Tree"), assistant(last.text), user("And now?")]
        assert cluster.chat(following, "hurried", max_tokens=2).cached == (
            last.usage.prompt + last.usage.completion - 1
        )
        rows = cluster.wait_stored("kept")
        cluster.kill_all()
    with up(store, nodes=1, **SETTINGS) as cluster:
        check_listed(cluster, "kept", rows["tokens"])
        following = [*question, assistant(again.text), user("And now?")]
        after = cluster.chat(following, "kept", max_tokens=4)
        assert after.cache in ("warm", "remote")
        assert after.cached == again.usage.prompt + again.usage.completion - 1
