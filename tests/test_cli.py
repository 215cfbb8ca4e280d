"""The command line refuses with one line and an exit code, before anything is started.

2 is what the caller can mend, 1 is a server that does not answer. Ray cannot be imported here: a
refusal that came too late would end in a traceback.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from cluster.cli import app

ROOT = Path(__file__).resolve().parent.parent
_MAIN = """
import sys
sys.modules["ray"] = None
from cluster.cli import main
main()
"""


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but the test's, no Ray, no proxy, and files only below tmp_path."""
    for name in list(os.environ):
        if name.startswith("KVFERRY_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)


def failing(arguments: list[str], code: int) -> str:
    """The only line a failing command writes."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("kvferry: ")
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    return result.stderr


def subprocess_failing(arguments: list[str], code: int) -> str:
    """The same, as a user's shell would see it."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _MAIN, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("kvferry: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


# ---- up


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("missing.gguf", "cannot read it"),
        ("text.gguf", "not a GGUF file"),
        ("pkg://not_installed_for_test/m.gguf", "is not installed"),
        ("hf://owner", "write hf://owner/repo/file"),
        ("ftp://host/m.gguf", "unknown scheme"),
    ],
)
def test_up_refuses_a_model(model: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    assert reason in failing(["up", "--model", model], 2)
    assert not (tmp_path / ".kvferry").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--codec", "q5"], "known codecs are q4, k8v4, q8, f16"),
        (["--store", "gs://bucket/kv"], "gs:// is not supported"),
        (["--store", "memory://"], "would not share it"),
        (["--store", "file"], "NotADirectoryError"),
        (["--store", "file/below"], "NotADirectoryError"),
        (["--nodes", "0"], "nodes = 0"),
        (["--port", "65536"], "port = 65536"),
        (["--host", "192.0.2.1"], "cannot listen on"),
        (["--config", "missing.toml"], "missing.toml"),
    ],
)
def test_up_refuses_a_flag(flags: list[str], reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert reason in failing(["up", "--model", "fake://", *flags], 2)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_up_refuses_a_store_where_no_folder_can_be_made() -> None:
    assert "/proc/kvferry" in failing(["up", "--model", "fake://", "--store", "/proc/kvferry"], 2)


def test_up_refuses_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = failing(["up", "--model", "fake://", "--port", port], 2)
    assert f"cannot listen on 127.0.0.1:{port}" in message


@pytest.mark.parametrize(("name", "value"), [("SLOTZ", "2"), ("SLOTS", "two")])
def test_up_refuses_the_environment(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"KVFERRY_{name}", value)
    message = failing(["up", "--model", "fake://"], 2)
    assert "environment" in message
    assert name.lower() in message


def test_up_refuses_a_signing_key_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_SIGNING_KEY_FILE", "missing.key")
    assert "signing key" in failing(["up", "--model", "fake://"], 2)


def test_bench_refuses_contexts_that_are_no_numbers() -> None:
    for bench in ("ttft", "residency", "migrate"):
        assert "--contexts" in failing(["bench", bench, "--contexts", "1k,2k"], 2)


def test_bench_migrate_refuses_what_it_would_ignore() -> None:
    assert "--url" in failing(["bench", "migrate", "--mbit", "100"], 2)
    assert "--url" in failing(["bench", "migrate", "--model", "fake://", "--url", "http://h"], 2)


def test_a_refusal_as_a_shell_sees_it() -> None:
    assert "missing.gguf" in subprocess_failing(["up", "--model", "missing.gguf"], 2)


# ---- clients


class _Handler(BaseHTTPRequestHandler):
    """Answers by path, as a server with a mind of its own."""

    answers: ClassVar = {
        "/error/v1/agents": (404, json.dumps({"error": {"message": "no such agent"}})),
        "/broken/v1/agents": (500, "<html>oops</html>"),
        "/other/v1/agents": (200, "<html>welcome</html>"),
        "/empty/v1/agents": (200, json.dumps({"data": []})),
    }

    def do_GET(self) -> None:
        status, text = self.answers[self.path]
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


@pytest.fixture
def nobody() -> Iterator[str]:
    """A port that is bound, so that nobody else takes it, and not listened on."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.mark.parametrize("command", [["status"], ["agents"], ["migrate", "agent", "node-1"]])
def test_no_server_answers(command: list[str], nobody: str) -> None:
    assert nobody in failing([*command, "--url", nobody], 1)


def test_no_server_as_a_shell_sees_it(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_URL", nobody)
    assert nobody in subprocess_failing(["status"], 1)


@pytest.mark.parametrize(
    ("given", "target"),
    [(["b"], "b"), (["--to", "b"], "b"), (["b", "--to", "b"], "b"), ([], None)],
)
def test_migrate_names_its_target_by_position_or_option_or_not_at_all(
    given: list[str], target: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    done = {
        "id": "s", "source": "a", "target": "b", "epoch": 2, "freeze_s": 0.01, "total_s": 0.5,
        "rows": 900, "bytes": 7000, "rounds": 2,
    }  # fmt: skip

    def request(method: str, url: str, path: str, key: str, body: object) -> object:
        asked.append((method, path, body))
        return done

    monkeypatch.setattr("cluster.cli._request", request)
    shown = CliRunner().invoke(app, ["migrate", "s", *given])
    assert shown.exit_code == 0, shown.output
    assert asked == [("POST", "/v1/agents/s/migrate", {"target": target})]


def test_migrate_refuses_two_targets() -> None:
    assert "Name one node" in failing(["migrate", "s", "b", "--to", "c"], 2)


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://[", "http://host:port"])
def test_a_url_that_is_none(url: str) -> None:
    assert url in failing(["agents", "--url", url], 1)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("error", "404: no such agent"),
        ("broken", "500: <html>oops"),
        ("other", "not as kvferry does"),
    ],
)
def test_an_error_of_the_server_is_one_line(path: str, reason: str, server: str) -> None:
    assert reason in failing(["agents", "--url", f"{server}/{path}"], 1)


def test_agents_of_a_server_that_answers(server: str) -> None:
    result = CliRunner().invoke(app, ["agents", "--url", f"{server}/empty"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert "epoch" in result.stdout
