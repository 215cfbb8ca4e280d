"""Builders for tests on a real Ray cluster: `kvferry up` in a process, and a client of it.

Processes are ended one by one, by id, as GET /v1/cluster or the process table names them. The
greedy replies to `recital` have no near ties on the real model (its top two logits are 0.5 apart or
more), so that a run that was disturbed must say the same as one that was not, token for token.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

WAIT = 60.0  # seconds until a test gives up on an event
START = 180.0  # until a cluster has started and loaded the real model
ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def recital(
    noun: str = "Cat", count: int = 30, order: str = "Repeat after me"
) -> list[dict[str, str]]:
    """About 11 tokens per sentence; the real model's greedy reply repeats them. Known to have no
    near ties: Cat 27, 30 and 60, Lamp 27 and 60, Piano 27, 30 and 60, Tree 27 and 30."""
    text = " ".join(f"{noun} {i} stands in room {i}." for i in range(1, count + 1))
    return [user(f"{order}, word for word: {text}")]


def until(condition: Callable[[], Any], what: str, timeout: float = WAIT) -> Any:
    """What `condition` returns once it is true; the test fails when that takes too long."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}"
        time.sleep(0.05)
    return found


def kill(pid: int) -> None:
    """SIGKILL one process and wait until it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.kill()
        until(lambda: not alive(process), f"the end of process {pid}")


def alive(process: psutil.Process) -> bool:
    """A zombie is dead: its parent has not looked yet."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Reply:
    """An answer that came in one piece."""

    status: int
    headers: httpx.Headers
    body: Any

    @property
    def text(self) -> str:
        assert self.status == 200, self.body
        content: str = self.body["choices"][0]["message"]["content"]
        return content

    @property
    def reason(self) -> str:
        reason: str = self.body["choices"][0]["finish_reason"]
        return reason

    @property
    def usage(self) -> Usage:
        return usage_of(self.body["usage"])

    @property
    def node(self) -> str:
        return self.headers["x-kvferry-node"]

    @property
    def cache(self) -> str:
        return self.headers["x-kvferry-cache"]

    @property
    def cached(self) -> int:
        return int(self.headers["x-kvferry-cached-tokens"])

    @property
    def prefilled(self) -> int:
        return int(self.headers["x-kvferry-prefilled-tokens"])

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.body["error"]
        assert set(self.body) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        return error


@dataclass(frozen=True)
class Usage:
    prompt: int
    completion: int
    cached: int


def usage_of(usage: dict[str, Any]) -> Usage:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)


@dataclass
class Stream:
    """One streamed answer, read as it comes. `rest` checks the protocol up to its last event."""

    response: httpx.Response
    pieces: list[str] = field(default_factory=list)
    reason: str | None = None
    usage: Usage | None = None
    _lines: Iterator[str] = field(init=False)

    def __post_init__(self) -> None:
        self._lines = self.response.iter_lines()

    @property
    def node(self) -> str:
        return self.response.headers["x-kvferry-node"]

    @property
    def cached(self) -> int:
        return int(self.response.headers["x-kvferry-cached-tokens"])

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def take(self, n: int) -> None:
        """Until the reply has n more pieces."""
        wanted = len(self.pieces) + n
        while len(self.pieces) < wanted:
            assert self._next(), "the stream ended"

    def rest(self) -> str:
        """The whole text, once the stream has ended as it must."""
        while self._next():
            pass
        assert self.reason is not None
        assert self.usage is not None
        return self.text

    def _next(self) -> bool:
        """Read one event; False after the last."""
        line = next(line for line in self._lines if line)
        assert line.startswith("data: "), line
        if line == "data: [DONE]":
            assert not any(self._lines)
            return False
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event, event
        assert event["object"] == "chat.completion.chunk"
        if event.get("usage"):
            self.usage = usage_of(event["usage"])
        for choice in event["choices"]:
            assert self.reason is None, f"{event} after the finish reason"
            self.reason = choice["finish_reason"]
            if text := choice["delta"].get("content"):
                self.pieces.append(text)
        return True


@dataclass
class Endpoint:
    """A running cluster as its clients see it."""

    url: str

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=WAIT)

    def chat(
        self,
        messages: list[dict[str, str]],
        session: str | None = None,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> Reply:
        """One turn; greedy unless `body` says otherwise."""
        answer = httpx.post(
            f"{self.url}/v1/chat/completions",
            json={"messages": messages, "temperature": 0} | body,
            headers=_session(session) | (headers or {}),
            timeout=WAIT,
        )
        return Reply(answer.status_code, answer.headers, answer.json())

    @contextlib.contextmanager
    def stream(
        self, messages: list[dict[str, str]], session: str | None = None, **body: Any
    ) -> Iterator[Stream]:
        options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        with httpx.stream(
            "POST",
            f"{self.url}/v1/chat/completions",
            json={"messages": messages} | options | body,
            headers=_session(session),
            timeout=WAIT,
        ) as response:
            assert response.status_code == 200, response.read()
            yield Stream(response)

    def migrate(self, session: str, target: str) -> httpx.Response:
        path = f"{self.url}/v1/agents/{session}/migrate"
        return httpx.post(path, json={"target": target}, timeout=WAIT)

    def agent(self, session: str) -> dict[str, Any] | None:
        """None for an unknown one."""
        answer = self.get(f"/v1/agents/{session}")
        if answer.status_code == 404:
            assert answer.json()["error"]["code"] == "agent_not_found"
            return None
        assert answer.status_code == 200, answer.text
        record: dict[str, Any] = answer.json()
        return record

    def agents(self) -> set[str]:
        return {agent["id"] for agent in self.get("/v1/agents").json()["data"]}

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The device nodes, by id."""
        answer = self.get("/v1/cluster")
        assert answer.status_code == 200, answer.text
        nodes = answer.json()["nodes"]
        return {node["id"]: node for node in nodes if node["replica"] != "none"}

    def other(self, node: str) -> str:
        """Another device node."""
        return next(name for name in self.nodes() if name != node)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def wait_ready(self, nodes: int) -> None:
        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                found = self.nodes()
                return sum(node["replica"] == "ready" for node in found.values()) >= nodes
            return False

        until(ready, f"{nodes} ready replicas", START)

    def wait_stored(self, session: str, generation: int = 1) -> dict[str, Any]:
        """The agent's record once its epoch has `generation` commits that name stored rows."""

        def stored() -> dict[str, Any] | None:
            record = self.agent(session)
            done = record and record["generation"] >= generation and record["bytes"]["store"]
            return record if done else None

        record: dict[str, Any] = until(stored, f"the rows of {session} in the store")
        return record


def _session(session: str | None) -> dict[str, str]:
    return {"x-session-id": session} if session else {}


@dataclass
class Up(Endpoint):
    """`kvferry up` in a process, and all that it started."""

    process: subprocess.Popen[bytes]
    store: Path
    output: Path
    ray_tmp: Path

    def family(self) -> list[psutil.Process]:
        """The process and its descendants: raylets, replicas, the router, the ingress."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def actor(self, name: str) -> psutil.Process:
        """The process of an actor's class. Ray names it in the process table."""
        return next(p for p in self.family() if command(p).startswith(f"ray::{name}"))

    def logged(self) -> str:
        """What the actors wrote to stderr, all of them."""
        files = sorted(self.ray_tmp.glob("ray/session_2*/logs/worker-*.err"))
        return "".join(path.read_text(errors="replace") for path in files)

    def interrupt(self) -> int:
        """Ctrl-C, which reaches every process of the group; returns the exit code."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(WAIT)

    def kill_all(self) -> None:
        """SIGKILL everything: nobody stores anything any more."""
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(WAIT)


def command(process: psutil.Process) -> str:
    """Its program, as the process table names it; nothing once it is gone."""
    try:
        return "".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:
        return ""


@contextlib.contextmanager
def up(store: Path, nodes: int = 2, **settings: Any) -> Iterator[Up]:
    """A running `kvferry up`; it fails when a process of it outlives it."""
    port = free_port()
    # Not pytest's tmp_path: the path of a Unix socket has at most 107 characters.
    ray_tmp = Path(tempfile.mkdtemp(prefix="kvf"))
    flags = {"store": store, "nodes": nodes, "port": port}
    environment = {name: v for name, v in os.environ.items() if not name.startswith("KVFERRY_")}
    settings = {"rebalance": 0} | settings | flags  # agents stay where a test has put them
    environment |= {f"KVFERRY_{name}".upper(): str(v) for name, v in settings.items()}
    environment |= {"RAY_TMPDIR": str(ray_tmp), "PYTHONPATH": str(ROOT)}
    with (ray_tmp / "up.out").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from cluster.cli import main; main()", "up"],
            cwd=ray_tmp,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    running = Up(f"http://127.0.0.1:{port}", process, store, ray_tmp / "up.out", ray_tmp)
    family: list[psutil.Process] = []
    try:
        until(
            lambda: process.poll() is not None or b"is served at" in running.output.read_bytes(),
            "kvferry up",
            START,
        )
        assert process.poll() is None, running.output.read_text()
        yield running
        family = running.family() if process.poll() is None else []
        if family:
            running.interrupt()
        left = [p for p in family if alive(p)]
        assert not left, f"{left} outlived it"
    finally:
        _end(running, family)
        shutil.rmtree(ray_tmp, ignore_errors=True)


def _end(running: Up, family: list[psutil.Process]) -> None:
    """Whatever happened, nothing is left: by id, each process this test has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*family, *running.family()]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    running.process.wait(WAIT)


class InBackground(threading.Thread):
    """A call of a client that another call overlaps with."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call, self._result, self._error = call, None, None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(WAIT)
        assert not self.is_alive(), "the call did not return"
        if self._error is not None:
            raise self._error
        return self._result


_shared: Up | None = None


def shared_cluster(config: pytest.Config, factory: pytest.TempPathFactory) -> Up:
    """One cluster of two nodes on the real model, codec f16, for all modules that only talk to it.
    It is started when the first of them asks and stopped after the last test."""
    global _shared
    if _shared is None:
        stack = contextlib.ExitStack()
        store = factory.mktemp("shared") / "store"
        # Agents stay where they are put: measured speeds differ between two replicas by chance.
        settings = {"codec": "f16", "n_ctx": 2048, "hysteresis_s": 60}
        _shared = stack.enter_context(up(store, **settings))
        config.add_cleanup(stack.close)
    return _shared
