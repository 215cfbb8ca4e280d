"""What the demos show while they run: the nodes, the agents on them, and what each one says.

On a terminal a picture that changes; anywhere else one line per event. Knows no HTTP but what
`watch` asks: where the agents are and which nodes are ready.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from bench.client import Endpoint, EndpointError, Message
from cluster.console import size

_WATCH_S = 0.4
_SHOWN = 8  # events
_LINES = 3  # of what an agent says
_COLOURS = ("cyan", "magenta", "yellow", "green")


@dataclass
class Speaker:
    """An agent on the stage. `marks`: where in its text something happened to it."""

    name: str
    session: str
    messages: list[Message]
    node: str = ""
    state: str = "waits"
    text: str = ""
    marks: list[tuple[int, str]] = field(default_factory=list)
    tokens: int = 0  # of its memory
    kept: int = 0  # tokens that were not prefilled again
    shipped: int = 0  # bytes

    def mark(self, what: str) -> None:
        self.marks.append((len(self.text), what))


class Stage:
    """`begin` is the moment from which events are timed."""

    def __init__(self, console: Console, title: str, speakers: Sequence[Speaker]) -> None:
        self.console, self.title, self.speakers = console, title, speakers
        self.nodes: list[dict[str, Any]] = []
        self.events: list[str] = []
        self.begin = time.monotonic()
        self._live = console.is_terminal

    def event(self, line: str) -> None:
        """Something happened: shown with its time, or printed where nobody sees the picture."""
        shown = f"{time.monotonic() - self.begin:6.1f} s  {line}"
        self.events.append(shown)
        if not self._live:
            self.console.print(shown, markup=False)

    @contextmanager
    def shown(self, endpoint: Endpoint) -> Iterator[None]:
        """The picture, while the body runs. It stays when it is over."""
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(endpoint, over), daemon=True)
        watcher.start()
        try:
            if self._live:
                with Live(self, console=self.console, refresh_per_second=8):
                    yield
            else:
                yield
        finally:
            over.set()
            watcher.join(10.0)

    def _watch(self, endpoint: Endpoint, over: threading.Event) -> None:
        """With a connection of its own: the picture is not to wait for the answers."""
        with endpoint.again() as mine:
            while not over.is_set():
                try:
                    self.look(mine)
                except EndpointError as error:  # the next look may do better
                    self.nodes = [{"id": str(error), "replica": "no answer"}]
                over.wait(_WATCH_S)

    def look(self, endpoint: Endpoint) -> None:
        """Ask once. Raises EndpointError."""
        nodes = endpoint.request("GET", "/v1/cluster")["nodes"]
        found = {entry["id"]: entry for entry in endpoint.request("GET", "/v1/agents")["data"]}
        self.nodes = [node for node in nodes if node["replica"] != "none"]
        for speaker in self.speakers:
            entry = found.get(speaker.session)
            if entry is not None and entry["node"]:
                speaker.node, speaker.tokens = entry["node"], entry["tokens"]

    # ---- the picture

    def __rich__(self) -> RenderableType:
        heading = Text(self.title, style="bold")
        nodes = Columns([self._node(node) for node in self.nodes], equal=True)
        said = [self._said(number, speaker) for number, speaker in enumerate(self.speakers)]
        events = Text("\n".join(self.events[-_SHOWN:]), style="dim")
        return Group(heading, nodes, *said, events)

    def _node(self, node: dict[str, Any]) -> Panel:
        ready = node["replica"] == "ready"
        here = Table.grid(padding=(0, 1))
        for number, speaker in enumerate(self.speakers):
            if speaker.node == node["id"]:
                mark = "▶" if speaker.state == "speaks" else "·"
                name = Text(f"{mark} {speaker.name}", style=_COLOURS[number % len(_COLOURS)])
                here.add_row(name, f"{speaker.tokens} tokens", speaker.state)
        state = "[green]● ready[/]" if ready else f"[red]● {node['replica']}[/]"
        border = "green" if ready else "red"
        return Panel(here, title=f"{node['id']}  {state}", width=44, border_style=border)

    def _said(self, number: int, speaker: Speaker) -> Panel:
        width = max(20, self.console.width - 6)
        text, at = Text(), 0
        for begin, what in speaker.marks:
            text.append(speaker.text[at:begin])
            text.append(f" ⟦{what}⟧ ", style="bold reverse")
            at = begin
        text.append(speaker.text[at:])
        text = Text(" ").join(text.split("\n"))
        text = text[-min(len(text), width * _LINES) :] if len(text) else Text(" ")
        parts = [f"[bold]{speaker.name}[/] on {speaker.node or '…'}", speaker.state]
        parts += [f"kept {speaker.kept} tokens"] if speaker.kept else []
        parts += [f"shipped {size(speaker.shipped)}"] if speaker.shipped else []
        colour = _COLOURS[number % len(_COLOURS)]
        return Panel(text, title=" · ".join(parts), title_align="left", border_style=colour)
