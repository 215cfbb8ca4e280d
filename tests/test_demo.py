"""The demo against a real cluster, as a user starts both; and the parts of bench that are pure."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.kill import KillRefused, check_node
from bench.texts import TRADES, context

ROOT = Path(__file__).parent.parent
KVFERRY = [sys.executable, "-c", "from cluster.cli import main; main()"]
START_TIMEOUT_S = 60.0


def test_contexts_differ_from_the_first_sentence_on_and_can_be_repeated() -> None:
    texts = [context(seed, 500) for seed in range(3 * len(TRADES))]
    assert len({text.partition(".")[0] for text in texts}) == len(texts)
    assert context(7, 500) == context(7, 500)


@pytest.mark.parametrize("n_tokens", [64, 500, 4000])
def test_a_context_has_about_as_many_tokens_as_asked_for(n_tokens: int) -> None:
    n_words = len(context(1, n_tokens).split())
    assert 0.8 * n_tokens < n_words * 1.13 < 1.3 * n_tokens


def node(**changes: Any) -> dict[str, Any]:
    parent = {"id": "node-1", "address": "127.0.0.1", "raylet_pid": os.getppid()}
    return parent | {"pid": os.getpid()} | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "is no raylet"),
        ({"address": "203.0.113.7"}, "is not on this machine"),
        ({"pid": None}, "has no replica"),
        ({"raylet_pid": 2**22 + 1}, "there is no process"),
    ],
)
def test_only_a_node_of_this_machine_is_killed(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(KillRefused, match=reason):
        check_node(node(**changes))


@pytest.fixture
def endpoint(smollm2_gguf: Path, tmp_path: Path) -> Iterator[str]:
    """`kvferry up` with room for two of the demo's four agents."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--model", smollm2_gguf, "--slots", "1", "--port", port, "--store", tmp_path / "store"]
    with (tmp_path / "log").open("w+") as log:
        up = subprocess.Popen(
            [*KVFERRY, "up", *map(str, flags)], cwd=ROOT, stdout=log, stderr=log, env=environment()
        )
        try:
            await_line(tmp_path / "log", "Ctrl-C stops it", up)
            yield f"http://127.0.0.1:{port}"
        finally:
            up.send_signal(signal.SIGINT)
            try:
                up.wait(30)
            except subprocess.TimeoutExpired:
                up.kill()
                raise


def environment() -> dict[str, str]:
    """Without what this process may have told Ray, and without settings of the developer's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "KVFERRY_"))}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}


def await_line(path: Path, line: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while line not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.2)


@pytest.mark.cluster
@pytest.mark.model
@pytest.mark.timeout(240)
def test_demo_shows_two_rounds_a_migration_and_the_loss_of_a_node(endpoint: str) -> None:
    done = subprocess.run(
        [*KVFERRY, "demo", "--url", endpoint, "--tokens", "200"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 agents" in done.stdout.splitlines()[0]
    assert "2 slots in all" in done.stdout.splitlines()[0]
    assert "\x1b" not in done.stdout, "a pipe gets plain text"

    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in done.stdout.splitlines()
        if line.startswith("│")
    ]
    titles = [row[0] for row in rows]
    assert titles == [
        *["round 1"] * 4, *["round 2"] * 4, "after migration", "node killed", "after the loss",
    ]  # fmt: skip
    assert {row[1] for row in rows} == {trade.name for trade in TRADES}
    for _, _, _, state, cached, prefilled, _, _ in rows[:4]:
        assert (state, cached) == ("cold", "0")
        assert int(prefilled) > 150
    for _, _, _, state, cached, prefilled, _, cold in rows[4:]:
        assert state in ("hot", "warm", "remote")
        assert int(cached) > 150
        assert int(prefilled) < 64
        assert re.fullmatch(r"[\d.]+ m?s", cold)
    assert re.search(r"longest pause was [\d.]+ s; \d+ tokens came in all", done.stdout)
    assert "the answer is whole" in done.stdout
    assert httpx.get(f"{endpoint}/v1/agents").json()["data"] == [], "the demo cleans up"
