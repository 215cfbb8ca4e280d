"""An S3 endpoint that misbehaves on demand: a proxy in front of moto, on the same host.

    python -m tests.s3_proxy ADDRESS PORT CONTROL

Requests can be held at the door by method, path and host, then let through, refused, or carried out
with the answer lost; a share of all can be refused; what is stored can be looked at behind the
agents' backs. Told over a Unix socket, a JSON object per line.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
import socket
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from tests.servers import BUCKET

Verdict = Literal["pass", "refuse", "lose"]
_REFUSED = b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nretry-after: 1\r\n\r\n"


@dataclass(frozen=True)
class Rule:
    """Which requests stay at the door: those of a method and a path that match (what is listed,
    too: `?list-type=2&...prefix=agents/...`). `host`: only from this address."""

    method: str
    path: str
    host: str = ""

    def matches(self, method: str, path: str, host: str) -> bool:
        there = self.host in ("", host) and re.fullmatch(self.method, method) is not None
        return there and re.search(self.path, path) is not None


class Faults:
    """The test's side."""

    def __init__(self, control: Path) -> None:
        self._control = control

    def _ask(self, **command: Any) -> Any:
        with socket.socket(socket.AF_UNIX) as there:
            there.settimeout(60)
            there.connect(str(self._control))
            there.sendall(json.dumps(command).encode() + b"\n")
            return json.loads(there.makefile().readline())

    def hold(self, rule: Rule) -> None:
        """The next requests that match stay at the door."""
        self._ask(do="hold", rule=asdict(rule))

    def held(self, timeout: float = 30.0) -> str:
        """Wait until one is held; its path."""
        path = self._ask(do="held", timeout=timeout)
        assert path is not None, f"nothing was held within {timeout:g} s"
        return str(path)

    def release(self, verdict: Verdict = "pass", then: Rule | None = None) -> None:
        """What is held goes on, and nothing more is held but what `then` says."""
        self._ask(do="release", verdict=verdict, then=asdict(then) if then else None)

    def refuse(self, share: float, seed: int = 0) -> None:
        """So many of all requests are answered 503; 0: none."""
        self._ask(do="refuse", share=share, seed=seed)

    def refused(self) -> int:
        """Requests that were answered 503 since the start."""
        return int(self._ask(do="refused"))

    def objects(self, pattern: str) -> dict[str, bytes]:
        """What the bucket holds under paths that match."""
        found = self._ask(do="objects", pattern=pattern)
        return {path: base64.b64decode(raw) for path, raw in found.items()}


@dataclass
class _Proxy:
    moto: tuple[str, int]
    rule: Rule | None = None
    n_refused: int = 0
    held: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    verdict: Verdict = "pass"
    share: float = 0.0
    random: random.Random = field(default_factory=random.Random)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _answer(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if re.search(rb"(?i)\r\nexpect: *100-continue", head):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(_length(head))
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ", 2)
        verdict = await self._judged(method, path, writer.get_extra_info("peername")[0])
        if verdict == "refuse":
            self.n_refused += 1
            writer.write(_REFUSED)
            return
        answer = await self._forward(head, body, method)
        if verdict == "lose":
            writer.transport.abort()
            raise ConnectionResetError
        writer.write(answer)
        await writer.drain()

    async def _judged(self, method: str, path: str, host: str) -> Verdict:
        if self.rule and self.rule.matches(method, unquote(path), host):
            opened = self.opened
            self.held.put_nowait(path)
            await opened.wait()
            return self.verdict
        return "refuse" if self.random.random() < self.share else "pass"

    def _hold(self, rule: dict[str, Any] | None) -> None:
        self.rule = Rule(**rule) if rule else None
        self.held, self.opened = asyncio.Queue(), asyncio.Event()

    async def _forward(self, head: bytes, body: bytes, method: str) -> bytes:
        reader, writer = await asyncio.open_connection(*self.moto)
        try:
            first, rest = head.split(b"\r\n", 1)
            writer.write(first + b"\r\nconnection: close\r\n" + _without_connection(rest) + body)
            await writer.drain()
            answer = await reader.readuntil(b"\r\n\r\n")
            if method != "HEAD":
                answer += await reader.read(-1)
            return answer.replace(b"Connection: close\r\n", b"", 1)
        finally:
            writer.close()

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        command = json.loads(await reader.readline())
        answer: Any = True
        match command.pop("do"):
            case "hold":
                self._hold(command["rule"])
            case "held":
                try:
                    answer = await asyncio.wait_for(self.held.get(), command["timeout"])
                except TimeoutError:
                    answer = None
            case "release":
                opened, self.verdict = self.opened, command["verdict"]
                self._hold(command["then"])
                opened.set()
            case "refuse":
                self.share, self.random = command["share"], random.Random(command["seed"])
            case "refused":
                answer = self.n_refused
            case "objects":
                answer = _objects(command["pattern"])
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
        writer.close()


def _objects(pattern: str) -> dict[str, str]:
    """Of moto, which runs in this process."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    keys = dict(s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys.items())
    matching = {name: key for name, key in keys.items() if re.search(pattern, name)}
    return {name: base64.b64encode(key.value).decode() for name, key in matching.items()}


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else 0


def _without_connection(headers: bytes) -> bytes:
    return re.sub(rb"(?im)^(connection|expect):.*\r\n", b"", headers)


async def _main(address: str, port: int, control: str) -> None:
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = _Proxy(moto.get_host_and_port())
    server = await asyncio.start_server(proxy.serve, address, port, limit=1 << 20)
    await asyncio.start_unix_server(proxy.control, control)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
