"""kvferry bench migrate: agents that move while they speak.

For every context length and run a fresh agent is asked to speak, and is moved to another node in
the middle of its reply: how long it was frozen, the largest gap that its client saw, how long the
whole took. On a cluster of its own, or on one that runs (`url`), whose links may be limited to
`mbit`. The last line is JSON.
"""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from bench.client import Endpoint, EndpointError, Message, Reply
from bench.texts import context
from bench.ttft import BenchFailed, running_cluster
from cluster.config import ClusterConfig
from cluster.console import console
from cluster.local import divided

_REPLY_TOKENS = 160
_BEFORE = 10  # deltas, until the agent is moved
_STAY_S = 1e6
_FREEZE_S, _GAP_S = 0.1, 0.25
_OVER, _FIXED_S = 1.3, 0.15  # of the link's own time, and besides
_GROWTH_S = 0.02  # by which a freeze may differ between contexts, for noise


@dataclass(frozen=True)
class Moved:
    """One migration; seconds. `floor_s`: of its bytes over the link; 0: no limit."""

    context: int  # tokens of the prompt
    freeze_s: float
    gap_s: float
    total_s: float
    rounds: int
    rows: int
    n_bytes: int
    floor_s: float


def run(
    settings: ClusterConfig,
    lengths: list[int],
    runs: int,
    url: str | None,
    api_key: str,
    mbit: float | None,
) -> int:
    """Measure and print; 1 when a target is missed. Raises ConfigError, ModelUnavailable."""
    try:
        with _endpoint(settings, url, api_key) as endpoint:
            chars = _chars_per_token(endpoint)
            moves = [
                _move(endpoint, length, chars, mbit) for length in lengths for _ in range(runs)
            ]
    except (BenchFailed, EndpointError) as error:
        print(f"kvferry bench: {error}", file=sys.stderr)
        return 1
    held = _targets(moves, runs, mbit)
    _print(moves, runs)
    for target, holds in held.items():
        console.print(f"{'holds' if holds else 'MISSED'}: {target}")
    report = {"moves": [asdict(move) for move in moves], "targets": held, "mbit": mbit}
    print(json.dumps({"migrate": report}), flush=True)
    return 0 if all(held.values()) else 1


@contextmanager
def _endpoint(settings: ClusterConfig, url: str | None, api_key: str) -> Iterator[Endpoint]:
    if url is not None:
        with Endpoint(url, api_key) as endpoint:
            yield endpoint
        return
    settings = divided(replace(settings, http=replace(settings.http, api_keys={})))
    settings = replace(settings, placement=replace(settings.placement, hysteresis_s=_STAY_S))
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as directory:
        store = Path(directory)
        settings = replace(settings, replica=replace(settings.replica, store=f"file://{store}"))
        with running_cluster(settings, store) as cluster:
            yield cluster.endpoint


def _chars_per_token(endpoint: Endpoint) -> float:
    """Of the texts that contexts are made of, by the model's own count."""
    text = context(1, 400)
    asked: list[Message] = [{"role": "user", "content": text}]
    return len(text) / endpoint.chat(asked, session=None, max_tokens=1).prompt_tokens


def _move(endpoint: Endpoint, length: int, chars: float, mbit: float | None) -> Moved:
    session, text = f"bench-{secrets.token_hex(6)}", context(secrets.randbits(31), length)
    while len(text) < length * chars:
        text += " " + context(secrets.randbits(31), length)
    messages: list[Message] = [{"role": "user", "content": text[: int(length * chars)]}]
    done: dict[str, Any] = {}
    moving: list[threading.Thread] = []

    def move(source: str) -> None:
        try:
            done.update(_migrate(endpoint, session, source))
        except (BenchFailed, EndpointError) as error:
            done["error"] = str(error)

    def on_delta(reply: Reply) -> None:
        if len(reply.deltas) == _BEFORE:
            moving.append(threading.Thread(target=move, args=(reply.node,), daemon=True))
            moving[0].start()

    reply = endpoint.chat(
        messages, session=session, max_tokens=_REPLY_TOKENS, on_delta=on_delta, ignore_eos=True
    )
    over = bool(moving) and not moving[0].is_alive()
    if moving:
        moving[0].join(60.0)
    if "error" in done or not done:
        raise BenchFailed(done.get("error", f"agent {session} was not moved"))
    if not over:
        raise BenchFailed(f"at {length}: the reply was over before the migration")
    floor_s = 8e-6 * done["bytes"] / mbit if mbit else 0.0
    gap_s = reply.longest_pause[1]
    return Moved(
        reply.prompt_tokens, done["freeze_s"], gap_s, done["total_s"], done["rounds"],
        done["rows"], done["bytes"], floor_s,
    )  # fmt: skip


def _migrate(endpoint: Endpoint, session: str, source: str) -> dict[str, Any]:
    nodes = endpoint.request("GET", "/v1/cluster")["nodes"]
    others = [n["id"] for n in nodes if n["replica"] == "ready" and n["id"] != source]
    if not others:
        raise BenchFailed("a migration needs two nodes that are ready")
    path = f"/v1/agents/{session}/migrate"
    done: dict[str, Any] = endpoint.request("POST", path, {"target": others[0]})
    return done


def _by_length(moves: list[Moved], runs: int) -> list[list[Moved]]:
    return [moves[at : at + runs] for at in range(0, len(moves), runs)]


def _targets(moves: list[Moved], runs: int, mbit: float | None) -> dict[str, bool]:
    """The worst of all runs stands for the p99."""
    typical = [median(m.freeze_s for m in of_length) for of_length in _by_length(moves, runs)]
    held = {
        f"freeze p99 <= {1000 * _FREEZE_S:.0f} ms": max(m.freeze_s for m in moves) <= _FREEZE_S,
        "the freeze does not grow with the context": typical[-1] <= typical[0] + _GROWTH_S,
        f"largest gap <= {1000 * _GAP_S:.0f} ms": max(m.gap_s for m in moves) <= _GAP_S,
    }
    if mbit:
        limit = f"total <= {_OVER} x bytes / {mbit:g} Mbit/s + {1000 * _FIXED_S:.0f} ms"
        held[limit] = all(m.total_s <= _OVER * m.floor_s + _FIXED_S for m in moves)
    return held


def _print(moves: list[Moved], runs: int) -> None:
    names = ("context", "freeze p50", "worst", "gap p50", "worst", "total p50", "rows", "MB")
    table = Table("rounds", *names, title="ms, agents that move while they speak")
    for of_length in _by_length(moves, runs):
        freeze, gap, total = (
            [1000 * getattr(m, name) for m in of_length]
            for name in ("freeze_s", "gap_s", "total_s")
        )
        table.add_row(
            str(max(m.rounds for m in of_length)),
            str(of_length[0].context),
            *(f"{x:.0f}" for x in (median(freeze), max(freeze), median(gap), max(gap))),
            f"{median(total):.0f}",
            f"{median(m.rows for m in of_length):.0f}",
            f"{median(m.n_bytes for m in of_length) / 1e6:.1f}",
        )
    console.print(table)
