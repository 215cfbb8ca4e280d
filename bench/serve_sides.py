"""The two sides of `kvferry bench serve`: a server each, and what one request of a side looks like.

kvferry gets messages and an agent's name, llama-server the very tokens that kvferry makes of them;
both answer greedily, as a stream, and end at max_tokens only. A side that is not asked sleeps.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from actors.engines.options import WAITING
from bench.client import Message
from bench.serve_figures import Answer

_TIMEOUT = httpx.Timeout(600.0, connect=10.0)
_READY_S = 180.0
_STOP_S = 60.0
_UP = "from cluster.cli import main; main()"
Request = tuple[str, dict[str, str], dict[str, Any]]  # path, headers, body
_ROOT = Path(__file__).resolve().parent.parent


class SideFailed(Exception):
    """A server did not start, refused a request, or answered something else."""


@dataclass(frozen=True)
class Settings:
    """What both servers are started with."""

    model: Path
    slots: int
    n_ctx: int  # tokens of each sequence; all have room for so many at once
    threads: int


@dataclass
class Prompt:
    """`agent` names the memory it continues. `slot`: of llama-server, which picks one at -1."""

    agent: str
    messages: list[Message]
    ids: list[int]
    slot: int = -1
    reuse: bool = False  # llama-server's own cache may be used; kvferry goes by the agent


class Side(ABC):
    """A running server, a process of its own. Raises SideFailed."""

    name: str

    def __init__(self, command: list[str], env: dict[str, str], log: Path, port: int) -> None:
        self.url, self._log = f"http://127.0.0.1:{port}", log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._http = httpx.Client(base_url=self.url, timeout=_TIMEOUT)
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def _await_ready(self) -> None:
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                if self._ready():
                    return
            except httpx.HTTPError:
                pass  # nobody listens yet
            time.sleep(0.2)
        last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
        raise SideFailed(f"{self.name} does not start: {' '.join(last)[:300]}")

    def stop(self) -> None:
        """Returns when the process has ended."""
        self._http.close()
        self._process.send_signal(signal.SIGINT)  # nothing to one that has ended
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_STOP_S)

    async def ask(self, http: httpx.AsyncClient, prompt: Prompt, max_tokens: int) -> Answer:
        path, headers, body = self._request(prompt, max_tokens)
        answer = Answer(time.perf_counter())
        pieces: list[tuple[float, bytes]] = []
        try:
            async with http.stream("POST", self.url + path, json=body, headers=headers) as response:
                if response.status_code >= 400:
                    raise SideFailed(f"{self.name}: {(await response.aread())[:300].decode()}")
                async for piece in response.aiter_raw():
                    pieces.append((time.perf_counter(), piece))
                answer.prefilled = int(response.headers.get("x-kvferry-prefilled-tokens", 0))
        except httpx.HTTPError as error:
            raise SideFailed(f"{self.name}: {error or type(error).__name__}") from error
        for at, event in _events(pieces):  # parsed when nothing is measured any more
            if self._take(answer, event):
                if not answer.first:
                    answer.first, answer.head = at, len(answer.text)
                answer.ended = at
        if answer.tokens != max_tokens:
            raise SideFailed(f"{self.name}: {answer.tokens} tokens instead of {max_tokens}")
        return answer

    def settled(self) -> float:
        """When the last work on what was asked so far was done, on time.time's clock."""
        return 0.0

    @abstractmethod
    def _ready(self) -> bool: ...

    @abstractmethod
    def _request(self, prompt: Prompt, max_tokens: int) -> Request: ...

    @abstractmethod
    def _take(self, answer: Answer, event: Any) -> bool:
        """Add an event; True if it brought text."""


class Kvferry(Side):
    """`kvferry up` with one device node, on a store of its own."""

    name = "kvferry"

    def __init__(self, settings: Settings, folder: Path) -> None:
        port, self.store = free_port(), folder / "store"
        (file := folder / "kvferry.toml").parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            f"model = {json.dumps(str(settings.model))}\nstore = {json.dumps(str(self.store))}\n"
            f"nodes = 1\nport = {port}\nslots = {settings.slots}\nn_ctx = {settings.n_ctx}\n"
            f'kv_type = "f16"\nthreads = {settings.threads}\nturn_timeout_s = 3600\n'
            "request_timeout_s = 3600\nitem_timeout_s = 600\n"
        )
        env = {k: v for k, v in os.environ.items() if not k.startswith("KVFERRY_")}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), env.get("PYTHONPATH", "")]))
        command = [sys.executable, "-c", _UP, "up", "--config", str(file)]
        super().__init__(command, env, folder / "log", port)

    def _ready(self) -> bool:
        report = self._http.get("/v1/cluster")
        nodes = report.json()["nodes"] if report.status_code == 200 else []
        return any(node["replica"] == "ready" for node in nodes)

    def settled(self) -> float:
        """When the store was last written to, some time after."""
        deadline = time.monotonic() + _STOP_S
        while (newest := self._newest()) > time.time() - 0.7:
            if time.monotonic() > deadline:
                raise SideFailed("kvferry does not stop writing")
            time.sleep(0.1)
        return newest

    def _newest(self) -> float:
        newest = 0.0
        for path in files(self.store):
            with contextlib.suppress(FileNotFoundError):  # an older card, deleted meanwhile
                newest = max(newest, path.stat().st_mtime)
        return newest

    def _request(self, prompt: Prompt, max_tokens: int) -> Request:
        body = {
            "messages": prompt.messages, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return "/v1/chat/completions", {"x-session-id": prompt.agent}, body

    def _take(self, answer: Answer, event: Any) -> bool:
        if usage := event.get("usage"):
            answer.tokens = usage["completion_tokens"]
        text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        answer.text += text
        return bool(text)


def _repacks() -> bool:
    """Whether the peer may lay weights out anew, as our own llama.cpp does, if it is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return True
    from actors.engines.llama_context import repacks

    return repacks()


class LlamaServer(Side):
    """llama.cpp's own server, with flash attention and float16 cells, as kvferry has them."""

    def __init__(
        self, binary: Path, settings: Settings, folder: Path, name: str, *options: str
    ) -> None:
        self.name, port = name, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            str(binary), "--model", str(settings.model), "--host", "127.0.0.1",
            "--port", str(port), "--parallel", str(settings.slots),
            "--ctx-size", str(settings.slots * settings.n_ctx),
            "--threads", str(settings.threads), "--threads-batch", str(settings.threads),
            "--flash-attn", "on", "--cache-type-k", "f16", "--cache-type-v", "f16",
            "--no-webui", *([] if _repacks() else ["--no-repack"]), *options,
        ]  # fmt: skip
        env = {k: v for k, v in os.environ.items() if k not in WAITING}  # replicas'
        super().__init__(command, env, folder / "log", port)

    def _ready(self) -> bool:
        return self._http.get("/health").status_code == 200

    async def slot(self, http: httpx.AsyncClient, number: int, action: str, file: str) -> None:
        """Save a slot, or restore it."""
        url = f"{self.url}/slots/{number}?action={action}"
        response = await http.post(url, json={"filename": file})
        if response.status_code != 200:
            raise SideFailed(f"{self.name}: {response.text[:300]}")

    def gap(self, ids: list[int]) -> float:
        """Between the log probabilities of the two likeliest tokens after `ids`."""
        body = {
            "prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 2, "cache_prompt": False,
            "ignore_eos": True,
        }  # fmt: skip
        answer = self._http.post("/completion", json=body)
        if answer.status_code != 200:
            raise SideFailed(f"{self.name}: {answer.text[:300]}")
        first, second = answer.json()["completion_probabilities"][0]["top_logprobs"][:2]
        return float(first["logprob"]) - float(second["logprob"])

    def _request(self, prompt: Prompt, max_tokens: int) -> Request:
        body = {
            "prompt": prompt.ids, "n_predict": max_tokens, "temperature": 0, "top_k": 1,
            "repeat_penalty": 1.0, "ignore_eos": True, "stream": True, "id_slot": prompt.slot,
            "cache_prompt": prompt.reuse,
        }  # fmt: skip
        return "/completion", {}, body

    def _take(self, answer: Answer, event: Any) -> bool:
        if event.get("stop"):
            answer.tokens = event["timings"]["predicted_n"]
            answer.prefilled = event["timings"]["prompt_n"]
        answer.ids += event.get("tokens", [])
        answer.text += event["content"]
        return bool(event["content"])


def _events(pieces: list[tuple[float, bytes]]) -> list[tuple[float, Any]]:
    """(when its last byte came, the event)."""
    events, held = [], b""
    for at, piece in pieces:
        *whole, held = (held + piece).split(b"\n\n")
        for text in whole:
            data = text.removeprefix(b"data: ")
            if data != text and data != b"[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise SideFailed(f"the stream ended with an error: {event['error']}")
                events.append((at, event))
    return events


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def client() -> httpx.AsyncClient:
    """Every request on a connection of its own, on either side."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=_TIMEOUT, limits=limits)
