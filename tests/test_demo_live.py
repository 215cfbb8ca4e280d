"""kvferry demo migrate and demo failover against a real cluster, as a user starts them."""

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.stage import Speaker, Stage
from tests.clusters import Up, up
from tests.test_demo import KVFERRY, ROOT, environment

FAKE = "fake://?step_delay=0.03&token_delay=0.002"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*KVFERRY, "demo", *arguments],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last line, after a run in which all held, printed as text and nothing else."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Every check held." in done.stdout
    assert "\x1b" not in done.stdout, "a pipe gets plain text"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"shown", "failures"}
    assert found["failures"] == []
    return found


# ---- the picture


def picture(stage: Stage, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    stage.console = console
    console.print(stage)
    return console.file.getvalue()  # type: ignore[attr-defined]


def stage() -> Stage:
    speakers = [Speaker("keeper", "s1", []), Speaker("clerk", "s2", [])]
    shown = Stage(Console(file=io.StringIO(), width=100), "a demo", speakers)
    shown.nodes = [{"id": "node-1", "replica": "not ready"}, {"id": "node-2", "replica": "ready"}]
    return shown


def test_a_speaker_is_shown_on_its_node_and_with_its_words() -> None:
    shown = stage()
    keeper = shown.speakers[0]
    keeper.node, keeper.state, keeper.tokens, keeper.text = "node-2", "speaks", 77, "Once upon"
    keeper.kept, keeper.shipped = 70, 5000
    text = picture(shown)
    first, second = text.index("node-1"), text.index("node-2")
    assert first < text.index("not ready") < second < text.index("● ready")
    assert "▶ keeper 77 tokens speaks" in text
    assert "keeper on node-2 · speaks · kept 70 tokens · shipped 5 KB" in text
    assert "Once upon" in text
    assert "clerk on … · waits" in text


def test_the_sentence_goes_on_behind_the_mark() -> None:
    shown = stage()
    keeper = shown.speakers[0]
    keeper.text = "Once upon"
    keeper.mark("node-1 died")
    keeper.text += " a time"
    assert "Once upon ⟦node-1 died⟧  a time" in picture(shown)


def test_of_a_long_speech_the_end_is_shown() -> None:
    shown = stage()
    shown.speakers[0].text = "first " + "word " * 300 + "last"
    text = picture(shown)
    assert "last" in text
    assert "first" not in text


def test_events_are_printed_where_there_is_no_terminal() -> None:
    shown = stage()
    shown.event("[node-1] is killed")
    assert "[node-1] is killed" in shown.console.file.getvalue()  # type: ignore[attr-defined]


# ---- the demos


@pytest.mark.parametrize("which", ["migrate", "failover"])
def test_without_a_cluster_it_says_so(which: str) -> None:
    done = demo(which, "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "nothing answers at http://127.0.0.1:1" in done.stderr
    assert "make serve" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with up(tmp_path_factory.mktemp("live") / "store", codec="f16", model=FAKE) as running:
        yield running


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_agents_move_while_they_speak(cluster: Up) -> None:
    done = demo("migrate", "--url", cluster.url, "--tokens", "100", "--json")
    shown = report(done)["shown"]
    assert len(shown) == 3
    for one in shown:
        assert one["source"] != one["target"]
        assert one["kept"] > 300
        assert one["again"] <= 256
        assert one["shipped_bytes"] > 0
        assert one["reply_tokens"] == 96
        assert 0 < one["frozen_s"] < 5
    assert "moves from" in done.stdout
    assert cluster.agents() == set(), "the demo cleans up"


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_sentence_outlives_the_node_on_which_it_began(cluster: Up) -> None:
    before = cluster.nodes()
    done = demo("failover", "--url", cluster.url, "--tokens", "100", "--json")
    (shown,) = report(done)["shown"]
    killed = shown["source"]
    assert shown["target"] != killed
    assert shown["kept"] > 300
    assert 0 < shown["again"] <= 256 + 64
    assert shown["frozen_s"] is None
    assert f"{killed} is killed" in done.stdout
    assert f"{killed} is back" in done.stdout
    assert cluster.nodes()[killed]["raylet_pid"] != before[killed]["raylet_pid"]
    assert cluster.agents() == set(), "the demo cleans up"
    cluster.wait_ready(2)


@pytest.mark.cluster
@pytest.mark.timeout(200)
def test_one_node_is_not_enough(tmp_path: Path) -> None:
    with up(tmp_path / "store", nodes=1, model=FAKE) as running:
        done = demo("failover", "--url", running.url)
    assert done.returncode == 1
    assert "two device nodes" in done.stderr
