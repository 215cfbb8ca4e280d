"""kvferry demo migrate | failover: agents that speak on a running cluster, watched as they do.

    migrate     each of three agents is moved to another node while it speaks
    failover    the node on which an agent speaks is killed; its sentence goes on elsewhere

Both drive the endpoint over HTTP; the kill needs the node on this machine. Exit code 0: it was
shown, and every check held; 1 otherwise, with a line for each check that did not.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.client import Endpoint, EndpointError, Reply
from bench.demo import CheckFailed
from bench.kill import KillRefused, check_node, kill_node
from bench.play import Play
from bench.report import seconds
from bench.stage import Speaker
from cluster.console import size

_BEFORE = 20  # deltas, until something happens to the speaker
_PAUSE_S = 0.15  # after a kill: this is the one that it made
_READY_TIMEOUT_S = 90.0
_JOIN_S = 300.0
_STORED_S = 30.0


@dataclass(frozen=True)
class Shown:
    """What happened to one speaker; seconds. `kept` and `again`: tokens of its memory that came to
    its next node, and that were prefilled there."""

    agent: str
    source: str
    target: str
    kept: int
    again: int
    shipped_bytes: int
    pause_s: float
    frozen_s: float | None
    reply_tokens: int


def run_migrate(url: str, api_key: str, tokens: int, as_json: bool) -> int:
    """The exit code."""
    return _run("kvferry demo migrate", url, api_key, 3, tokens, as_json, _migrate)


def run_failover(url: str, api_key: str, tokens: int, as_json: bool) -> int:
    """The exit code."""
    return _run("kvferry demo failover", url, api_key, 2, tokens, as_json, _failover)


def _run(
    title: str, url: str, api_key: str, n: int, tokens: int, as_json: bool,
    show: Callable[[Play], list[Shown]],
) -> int:  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=120)
    shown: list[Shown] = []
    with Endpoint(url, api_key) as endpoint:
        play = Play(endpoint, console, title, n, tokens)
        try:
            play.nodes()
            with play.stage.shown(endpoint):
                shown = show(play)
        except (EndpointError, CheckFailed) as error:
            play.failures.append(str(error))
        for speaker in play.speakers:
            with suppress(EndpointError):
                endpoint.request("DELETE", f"/v1/agents/{speaker.session}")
    if shown:
        console.print(_table(shown), soft_wrap=False)
    for failure in play.failures:
        print(f"{title}: did not hold: {failure}", file=sys.stderr)
    if not play.failures:
        console.print("Every check held.")
    if as_json:
        report = {"shown": [asdict(x) for x in shown], "failures": play.failures}
        print(json.dumps(report), flush=True)
    return 1 if play.failures else 0


# ---- migrate


def _migrate(play: Play) -> list[Shown]:
    play.introduce()
    return [_moved(play, speaker) for speaker in play.speakers]


def _moved(play: Play, speaker: Speaker) -> Shown:
    """It speaks, and moves meanwhile. Raises CheckFailed."""
    done: dict[str, Any] = {}
    moving: list[threading.Thread] = []

    def move(source: str) -> None:
        try:
            target = next(node["id"] for node in play.nodes() if node["id"] != source)
            play.stage.event(f"{speaker.name} moves from {source} to {target} while it speaks")
            path = f"/v1/agents/{speaker.session}/migrate"
            with play.endpoint.again() as mine:
                done.update(mine.request("POST", path, {"target": target}))
        except (EndpointError, CheckFailed) as error:
            done["error"] = str(error)

    def on_delta(reply: Reply) -> None:
        if len(reply.deltas) == _BEFORE:
            moving.append(threading.Thread(target=move, args=(reply.node,), daemon=True))
            moving[0].start()
        if "target" in done and not speaker.marks:
            speaker.mark(f"{done['source']} → {done['target']}")
            speaker.node = done["target"]
            speaker.kept, speaker.shipped = done["rows"], done["bytes"]

    play.speak(speaker, on_delta).join(_JOIN_S)
    if not moving or "error" in done:
        raise CheckFailed(f"{speaker.name} was not moved: {done.get('error', 'it was silent')}")
    moving[0].join(60.0)
    reply, frozen = play.replies[speaker.name], done["freeze_s"]
    play.stage.event(
        f"{speaker.name} speaks on {done['target']}: frozen for {seconds(frozen)}, "
        f"{done['rows']} tokens kept, {size(done['bytes'])} shipped"
    )
    again = _turn_of(play, speaker)["outcome"]["again_tokens"]
    play.check_whole(speaker)
    return Shown(
        speaker.name, done["source"], done["target"], done["rows"], again, done["bytes"],
        reply.longest_pause[1], frozen, reply.completion_tokens,
    )  # fmt: skip


# ---- failover


def _failover(play: Play) -> list[Shown]:
    play.introduce()
    first, *others = play.speakers
    nodes = {node["id"]: node for node in play.nodes()}
    owner = nodes.get(first.node)
    if owner is None:
        raise CheckFailed(f"{first.name} is on no node that is ready")
    try:
        check_node(owner)
    except KillRefused as error:
        raise CheckFailed(f"not shown: {error}") from error
    _wait_stored(play)
    blow = _Kill(play, first, nodes)
    threads = [play.speak(first, blow.on_delta)]
    threads += [play.speak(other, lambda _: None) for other in others]
    for thread in threads:
        thread.join(_JOIN_S)
    if play.failures or not blow.node:
        raise CheckFailed(blow.refused or "the answer was over before its node was killed")
    shown = blow.shown()
    play.stage.event(
        f"{first.name} said all {shown.reply_tokens} tokens; {shown.again} prefilled again"
    )
    play.stage.event(_around(first, shown.pause_s))
    _await_return(play, blow.node, nodes)
    for speaker in play.speakers:
        play.check_whole(speaker)
    return [shown]


def _around(speaker: Speaker, pause_s: float) -> str:
    """The sentence, with the pause in it."""
    at = speaker.marks[0][0] if speaker.marks else 0
    before, after = " ".join(speaker.text[:at].split()), " ".join(speaker.text[at:].split())
    return f"  …{before[-40:]} ⟦{seconds(pause_s)}⟧ {after[:40]}…"


class _Kill:
    """Kills the node of a speaker in the middle of its sentence."""

    def __init__(self, play: Play, speaker: Speaker, nodes: dict[str, Any]) -> None:
        self._play, self._speaker, self._nodes = play, speaker, nodes
        self.node = self.refused = ""
        self._at = self._last = self._pause_s = 0.0

    def on_delta(self, reply: Reply) -> None:
        now, speaker, stage = time.monotonic(), self._speaker, self._play.stage
        if len(reply.deltas) == _BEFORE:
            self._strike(reply.node)
            now = time.monotonic()
        elif self.node and now - self._last > max(_PAUSE_S, self._pause_s):
            self._pause_s = now - self._last
            if not speaker.marks:
                speaker.mark(f"{self.node} died, {seconds(self._pause_s)}")
                stage.event(f"{speaker.name} goes on after {seconds(now - self._at)}")
        self._last = now

    def _strike(self, node: str) -> None:
        try:
            kill_node(self._nodes[node])
        except (KillRefused, KeyError) as error:
            self.refused = f"nothing was killed: {error}"
            return
        self.node, self._at = node, time.monotonic()
        self._speaker.state = "is silent"
        self._play.stage.event(f"{node} is killed while {self._speaker.name} speaks on it")

    def shown(self) -> Shown:
        """With what the router's log says of the turn. Raises CheckFailed, EndpointError."""
        play, speaker = self._play, self._speaker
        reply, turn = play.replies[speaker.name], _turn_of(play, speaker)
        if not turn["outcome"]["failovers"]:
            raise CheckFailed("the router knows of no failover")
        again = turn["outcome"]["again_tokens"]
        memory = reply.prompt_tokens + max(_BEFORE, reply.longest_pause[0])
        speaker.kept, speaker.node = max(0, memory - again), turn["node"]
        return Shown(
            speaker.name, self.node, turn["node"], speaker.kept, again, 0,
            reply.longest_pause[1], None, reply.completion_tokens,
        )  # fmt: skip


def _wait_stored(play: Play) -> None:
    """What the first speaker has read is to outlive its node. Raises CheckFailed."""
    path, deadline = f"/v1/agents/{play.speakers[0].session}", time.monotonic() + _STORED_S
    while time.monotonic() < deadline:
        if play.endpoint.request("GET", path)["durable_tokens"]:
            return
        time.sleep(0.1)
    raise CheckFailed(f"nothing of it was stored in {_STORED_S:g} s")


def _await_return(play: Play, node: str, nodes: dict[str, Any]) -> None:
    """`kvferry up` starts a node again that died."""
    began = time.monotonic()
    while time.monotonic() < began + _READY_TIMEOUT_S:
        play.stage.look(play.endpoint)
        now = next((entry for entry in play.stage.nodes if entry["id"] == node), None)
        if now and now["replica"] == "ready" and now["pid"] != nodes[node]["pid"]:
            play.stage.event(f"{node} is back")
            return
        time.sleep(0.5)
    play.failures.append(f"{node} did not come back in {_READY_TIMEOUT_S:g} s")


# ---- both


def _turn_of(play: Play, speaker: Speaker) -> dict[str, Any]:
    """The router's last decision on a speaker, once its outcome is known. Raises CheckFailed."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        log = play.endpoint.request("GET", "/v1/place/log?limit=50")["data"]
        entry: dict[str, Any] = next((e for e in log if e["agent"] == speaker.session), {})
        if entry.get("outcome"):
            return entry
        time.sleep(0.05)
    raise CheckFailed(f"the router does not know what came of {speaker.name}'s turn")


def _table(shown: list[Shown]) -> Table:
    moved = any(x.frozen_s is not None for x in shown)
    table = Table(title="what happened")
    table.add_column("agent", no_wrap=True)
    table.add_column("spoke on", no_wrap=True)
    names = ["kept", "prefilled again", *(["shipped", "frozen"] if moved else [])]
    for name in (*names, "longest pause", "said"):
        table.add_column(name, justify="right", no_wrap=True)
    for x in shown:
        shipping = [] if x.frozen_s is None else [size(x.shipped_bytes), seconds(x.frozen_s)]
        table.add_row(
            x.agent, f"{x.source} → {x.target}", f"{x.kept} tokens", str(x.again), *shipping,
            seconds(x.pause_s), f"{x.reply_tokens} tokens",
        )  # fmt: skip
    return table
