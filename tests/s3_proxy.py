"""An S3 endpoint that misbehaves on demand: a proxy in front of moto, on the same host.

    python -m tests.s3_proxy ADDRESS PORT CONTROL

Requests can be held at the door by method and path, then let through, refused, or carried out with
the answer lost; a share of all can be refused. Told over a Unix socket, a JSON object per line.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["pass", "refuse", "lose"]
_REFUSED = b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nretry-after: 1\r\n\r\n"


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

    def hold(self, method: str, path: str) -> None:
        """The next requests of this method whose path matches stay at the door."""
        self._ask(do="hold", method=method, path=path)

    def held(self, timeout: float = 30.0) -> str:
        """Wait until one is held; its path."""
        path = self._ask(do="held", timeout=timeout)
        assert path is not None, f"nothing was held within {timeout:g} s"
        return str(path)

    def release(self, verdict: Verdict = "pass") -> None:
        """What is held goes on, and nothing more is held."""
        self._ask(do="release", verdict=verdict)

    def refuse(self, share: float, seed: int = 0) -> None:
        """So many of all requests are answered 503; 0: none."""
        self._ask(do="refuse", share=share, seed=seed)


@dataclass
class _Proxy:
    moto: tuple[str, int]
    rule: tuple[str, re.Pattern[str]] | None = None
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
        verdict = await self._judged(method, path)
        if verdict == "refuse":
            writer.write(_REFUSED)
            return
        answer = await self._forward(head, body, method)
        if verdict == "lose":
            writer.transport.abort()
            raise ConnectionResetError
        writer.write(answer)
        await writer.drain()

    async def _judged(self, method: str, path: str) -> Verdict:
        if self.rule and method == self.rule[0] and self.rule[1].search(path):
            opened = self.opened
            self.held.put_nowait(path)
            await opened.wait()
            return self.verdict
        return "refuse" if self.random.random() < self.share else "pass"

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
                self.rule = command["method"], re.compile(command["path"])
                self.held, self.opened = asyncio.Queue(), asyncio.Event()
            case "held":
                try:
                    answer = await asyncio.wait_for(self.held.get(), command["timeout"])
                except TimeoutError:
                    answer = None
            case "release":
                self.rule, self.verdict = None, command["verdict"]
                self.opened.set()
            case "refuse":
                self.share, self.random = command["share"], random.Random(command["seed"])
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
        writer.close()


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
