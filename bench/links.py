"""kvferry bench migrate --link: migrations, and the choice to ship or to prefill, over real links.

Runs on hosts of their own (see sites), whose links are limited to one rate after the other. Before
a migration, and before the choices of a link, the devices start anew with empty disks, so all that
moves comes over the link. A context is prefilled once, which is what prefilling costs; every agent
that begins with it later has its rows shipped. What placement chooses for an agent that nobody runs
is then held against both. What a migration may take depends on the link, and on what bringing the
context back from its node's own disk takes, measured once, beside an agent that speaks.
"""

from __future__ import annotations

import json
import queue
import secrets
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

from rich.table import Column, Table

from bench.client import Endpoint, EndpointError, Message, Reply
from bench.migrate import (
    Enough,
    Moved,
    migrate,
    move,
    print_moves,
    print_targets,
    restore_rate,
    targets,
)
from bench.sites import (
    HostSite,
    chars_per_token,
    filling,
    host_site,
    parse_links,
    progress,
    show,
    wait_stored,
)
from bench.ttft import BenchFailed
from cluster.config import ClusterConfig
from cluster.console import console

_CHOICE = 1.15  # of the better one's cost
_WARM_TOKENS = 512
_STORY = 4000  # tokens, at most
_QUESTION = "What is this about?"


@dataclass(frozen=True)
class Case:
    """One context over one link; seconds to the first token, measured, and as placement reckoned.
    `chosen`: what it would do with an agent that nobody runs, stored in the shared store."""

    link: str
    context: int
    ship_s: float
    prefill_s: float
    expected_ship_s: float
    expected_prefill_s: float
    chosen: str
    chosen_s: float

    @property
    def over(self) -> float:
        """The chosen one's cost over the better one's."""
        return self.chosen_s / min(self.ship_s, self.prefill_s)


def run(settings: ClusterConfig, lengths: Sequence[int], runs: int, link: str) -> int:
    """Measure and print; 1 when a target is missed. Raises ConfigError, ModelUnavailable."""
    links = parse_links(link)
    settings = replace(settings, replica=replace(settings.replica, pool_bytes=0))
    moves: dict[str, list[Moved]] = {}
    cases: list[Case] = []
    try:
        with host_site(settings, disks=True) as site:
            bench = _Bench(site)
            bench.prefill(lengths)
            bench.restore(lengths)
            for name, mbit in links.items():
                progress(f"{name}: starting the replicas again, so that they measure this link")
                bench.change(mbit)
                cases += [bench.choice(name, length) for length in lengths]
                moves[name] = [
                    bench.move(name, length, mbit) for length in lengths for _ in range(runs)
                ]
    except (BenchFailed, EndpointError) as error:
        print(f"kvferry bench: {error}", file=sys.stderr)
        return 1
    held = {name: targets(of_link, links[name]) for name, of_link in moves.items()}
    held["placement"] = {f"chosen <= {_CHOICE} x the better": all(c.over <= _CHOICE for c in cases)}
    _print(moves, cases, held)
    report = {
        "model": settings.replica.model,
        "links": links,
        "moves": {name: [asdict(m) for m in of_link] for name, of_link in moves.items()},
        "choices": [asdict(case) | {"over": round(case.over, 3)} for case in cases],
        "crossover": {name: crossover(_of(cases, name)) for name in links},
        "targets": held,
    }
    print(json.dumps({"migrate": report}), flush=True)
    return 0 if all(all(of_link.values()) for of_link in held.values()) else 1


class _Bench:
    def __init__(self, site: HostSite) -> None:
        self._site, self._endpoint = site, site.endpoint
        self._texts: dict[int, str] = {}
        self._kept: dict[int, tuple[str, list[Message]]] = {}  # agents that are stored, by context
        self._prefill_s: dict[int, float] = {}
        self._restore_rate = 0.0  # tokens/s

    def prefill(self, lengths: Sequence[int]) -> None:
        """An agent with each context, cold, after something to warm up."""
        self._warm()
        chars = chars_per_token(self._endpoint)
        for length in lengths:
            progress(f"{length} tokens: prefill")
            session, messages = _name(), _asked(text := filling(length, chars))
            reply = self._endpoint.chat(messages, session=session, max_tokens=4)
            if reply.cached_tokens:
                raise BenchFailed(f"at {length}: {reply.cached_tokens} tokens were cached already")
            wait_stored(self._endpoint, session)
            self._texts[length], self._prefill_s[length] = text, reply.ttft_s
            self._kept[length] = session, [*messages, _said(reply)]

    def restore(self, lengths: Sequence[int]) -> None:
        """How fast contexts come back from their node's disk, once the replicas have started anew,
        while an agent speaks on the other node, as one does that moves: all share this machine's
        cores. Of several the fastest counts."""
        progress("restore from the nodes' own disks")
        self._site.restart()
        self._warm()
        for length in lengths:
            session, messages = self._kept[length]
            asked = [*messages, *_asked(_QUESTION)]
            home = self._endpoint.request("GET", f"/v1/agents/{session}")["node"]
            with _speaking(self._endpoint, home):
                reply = self._endpoint.chat(asked, session=session, max_tokens=4)
            wait_stored(self._endpoint, session)
            rate = restore_rate(self._endpoint, reply.node)
            if rate is None or reply.cached_tokens < length // 2:
                raise BenchFailed(f"at {length}: the context did not come back from a disk")
            self._restore_rate = max(self._restore_rate, rate)
            self._kept[length] = session, [*asked, _said(reply)]

    def change(self, mbit: float) -> None:
        """All links get this rate, and the replicas measure it. Nobody runs an agent then."""
        self._site.limit(mbit)
        self._site.restart(empty=True)
        self._warm()

    def _warm(self) -> None:
        """Rates of both devices: prefill, decode."""
        for node in self._endpoint.request("GET", "/v1/cluster")["nodes"]:
            if node["replica"] == "ready":
                asked = _asked(filling(_WARM_TOKENS, 4.0))
                self._endpoint.chat(asked, session=None, max_tokens=4)

    def choice(self, link: str, length: int) -> Case:
        """Held against a fresh agent whose rows are shipped, and against the prefill before."""
        progress(f"{link}, {length} tokens: ship or prefill")
        session, messages = self._kept[length]
        asked = [*messages, {"role": "user", "content": _QUESTION}]
        n_chars = sum(len(message["content"]) for message in asked)
        body = {"agent": session, "n_chars": n_chars, "reply_tokens": 4}
        placed = self._endpoint.request("POST", "/v1/place", body)
        estimate = next(e for e in placed["estimates"] if e["node"] == placed["node"])
        ship = self._endpoint.chat(_asked(self._texts[length]), session=None, max_tokens=4)
        if not ship.cached_tokens:
            raise BenchFailed(f"at {length}: nothing was shipped")
        prefill_s, action = self._prefill_s[length], str(placed["action"])
        chosen_s = {"load": ship.ttft_s, "prefill": prefill_s}.get(action)
        if chosen_s is None:  # some of both
            chosen = self._endpoint.chat(asked, session=session, max_tokens=4)
            chosen_s = chosen.ttft_s
        return Case(
            link, length, ship.ttft_s, prefill_s, estimate["bring_s"], estimate["prefill_s"],
            action, chosen_s,
        )  # fmt: skip

    def move(self, link: str, length: int, mbit: float) -> Moved:
        progress(f"{link}, {length} tokens: a migration")
        self._site.restart(empty=True)
        return move(self._endpoint, length, self._texts[length], mbit, self._restore_rate)


@contextmanager
def _speaking(endpoint: Endpoint, home: str) -> Iterator[None]:
    """Meanwhile an agent speaks on another node than `home`. Raises BenchFailed, EndpointError."""
    session, nodes, over = _name(), queue.SimpleQueue[str](), threading.Event()

    def on_delta(reply: Reply) -> None:
        if len(reply.deltas) == 1:
            nodes.put(reply.node)
        if over.is_set():
            raise Enough

    def speak() -> None:
        with suppress(Enough):
            endpoint.chat(
                _asked(_QUESTION), session=session, max_tokens=_STORY, on_delta=on_delta,
                ignore_eos=True,
            )  # fmt: skip

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        if nodes.get(timeout=60.0) == home:
            migrate(endpoint, session, home)
        yield
    except queue.Empty:
        raise BenchFailed("an agent that was to speak meanwhile does not") from None
    finally:
        over.set()
        speaker.join(60.0)


def _name() -> str:
    return f"bench-{secrets.token_hex(6)}"


def _asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _said(reply: Reply) -> Message:
    return {"role": "assistant", "content": reply.text}


def _of(cases: Sequence[Case], link: str) -> list[Case]:
    return sorted((case for case in cases if case.link == link), key=lambda case: case.context)


def crossover(cases: Sequence[Case]) -> int | None:
    """Tokens from which on shipping is faster, between the measured contexts; 0: at the shortest
    already; None: nowhere."""
    if cases[0].ship_s < cases[0].prefill_s:
        return 0
    for a, b in pairwise(cases):
        before, after = a.prefill_s - a.ship_s, b.prefill_s - b.ship_s
        if before <= 0 < after:
            return round(a.context + (b.context - a.context) * -before / (after - before))
    return None


def _where(cases: Sequence[Case]) -> str:
    tokens = crossover(cases)
    if tokens is None:
        return f"nowhere up to {cases[-1].context} tokens"
    return f"from {tokens} tokens on" if tokens else f"at {cases[0].context} tokens already"


def _print(
    moves: Mapping[str, Sequence[Moved]], cases: Sequence[Case], held: Mapping[str, Any]
) -> None:
    for name, of_link in moves.items():
        print_moves(of_link, f"{name}: ms, agents that move while they speak")
        print_targets(held[name])
    names = ("ship, s", "expected", "prefill, s", "expected")
    columns = [Column(name, justify="right") for name in ("context", *names)]
    table = Table("link", *columns, "chosen", Column("of the better", justify="right"))
    for case in cases:
        seconds = (case.ship_s, case.expected_ship_s, case.prefill_s, case.expected_prefill_s)
        table.add_row(
            case.link, str(case.context), *(f"{x:.2f}" for x in seconds), case.chosen,
            f"{case.over:.2f}",
        )  # fmt: skip
    show(table)
    print_targets(held["placement"])
    for name in moves:
        console.print(f"{name}: shipping is faster {_where(_of(cases, name))}")
    console.print(f"median of the choices over the better: {median(c.over for c in cases):.2f}")
