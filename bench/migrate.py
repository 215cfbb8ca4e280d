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
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median
from typing import Any

from rich.table import Column, Table

from bench.client import Endpoint, EndpointError, Message, Reply
from bench.sites import chars_per_token, filling, local_site, node_of, show
from bench.ttft import BenchFailed
from cluster.config import ClusterConfig
from cluster.console import console

_REPLY_TOKENS = 400  # at most
_BEFORE, _AFTER = 10, 30  # deltas, until the agent is moved, and since it was
_FREEZE_S, _GAP_S = 0.1, 0.25
_OVER, _FIXED_S = 1.3, 0.15  # of the link's own time, and besides
_GROWTH_S = 0.02  # by which a freeze may differ between contexts, for noise


@dataclass(frozen=True)
class Moved:
    """One migration; seconds. `floor_s`: of its bytes over the link; 0: no limit. `restore_s`: of
    its rows into the engine, from RAM at the rate that the target measured (0: none yet), or from a
    disk (see links)."""

    context: int  # tokens of the prompt, about
    freeze_s: float
    gap_s: float
    total_s: float
    rounds: int
    rows: int
    n_bytes: int
    floor_s: float
    restore_s: float = 0.0

    @property
    def limit_s(self) -> float:
        """What it may take in all."""
        return _OVER * max(self.floor_s, self.restore_s) + _FIXED_S


class Enough(Exception):
    """The rest of a reply is of no interest."""


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
            chars = chars_per_token(endpoint)
            moves = [
                move(endpoint, length, filling(length, chars), mbit)
                for length in lengths
                for _ in range(runs)
            ]
    except (BenchFailed, EndpointError) as error:
        print(f"kvferry bench: {error}", file=sys.stderr)
        return 1
    held = targets(moves, mbit)
    print_moves(moves)
    print_targets(held)
    report = {"moves": [asdict(move) for move in moves], "targets": held, "mbit": mbit}
    print(json.dumps({"migrate": report}), flush=True)
    return 0 if all(held.values()) else 1


@contextmanager
def _endpoint(settings: ClusterConfig, url: str | None, api_key: str) -> Iterator[Endpoint]:
    if url is not None:
        with Endpoint(url, api_key) as endpoint:
            yield endpoint
        return
    with local_site(settings) as site:
        yield site.endpoint


def move(
    endpoint: Endpoint, length: int, text: str, mbit: float | None, restore: float | None = None
) -> Moved:
    """A fresh agent speaks after `text`, of about `length` tokens, and moves. `restore`: tokens/s
    that a restore is reckoned with; None: the target's own rate. Raises BenchFailed,
    EndpointError."""
    session = f"bench-{secrets.token_hex(6)}"
    messages: list[Message] = [{"role": "user", "content": text}]
    done: dict[str, Any] = {}
    moving: list[threading.Thread] = []
    replies: list[Reply] = []  # the one
    since: list[int] = []  # deltas that came from the new node

    def move(source: str) -> None:
        try:
            done.update(migrate(endpoint, session, source))
        except (BenchFailed, EndpointError) as error:
            done["error"] = str(error)

    def on_delta(reply: Reply) -> None:
        replies[:] = [reply]
        if len(reply.deltas) == _BEFORE:
            moving.append(threading.Thread(target=move, args=(reply.node,), daemon=True))
            moving[0].start()
        if moving and not moving[0].is_alive():
            since.append(len(reply.deltas))
            if len(since) > _AFTER:
                raise Enough

    with suppress(Enough):
        endpoint.chat(
            messages, session=session, max_tokens=_REPLY_TOKENS, on_delta=on_delta, ignore_eos=True
        )
    over = bool(since)
    if moving:
        moving[0].join(60.0)
    if "error" in done or not done:
        raise BenchFailed(done.get("error", f"agent {session} was not moved"))
    if not over:
        raise BenchFailed(f"at {length}: the reply was over before the migration")
    floor_s = 8e-6 * done["bytes"] / mbit if mbit else 0.0
    rate = restore or restore_rate(endpoint, done["target"])
    restore_s = done["rows"] / rate if rate else 0.0
    gap_s = replies[-1].longest_pause[1]
    return Moved(
        length, done["freeze_s"], gap_s, done["total_s"], done["rounds"],
        done["rows"], done["bytes"], floor_s, restore_s,
    )  # fmt: skip


def migrate(endpoint: Endpoint, session: str, source: str) -> dict[str, Any]:
    """To another node. Raises BenchFailed, EndpointError."""
    nodes = endpoint.request("GET", "/v1/cluster")["nodes"]
    others = [n["id"] for n in nodes if n["replica"] == "ready" and n["id"] != source]
    if not others:
        raise BenchFailed("a migration needs two nodes that are ready")
    path = f"/v1/agents/{session}/migrate"
    done: dict[str, Any] = endpoint.request("POST", path, {"target": others[0]})
    return done


def restore_rate(endpoint: Endpoint, node: str) -> float | None:
    """Tokens per second, into the node's engine; None: not measured yet."""
    rate: float | None = node_of(endpoint, node)["rates"].get("restore_tokens_per_s")
    return rate


def _by_length(moves: Sequence[Moved]) -> list[list[Moved]]:
    return [list(group) for _, group in groupby(moves, lambda move: move.context)]


def targets(moves: Sequence[Moved], mbit: float | None) -> dict[str, bool]:
    """The worst of all runs stands for the p99. `mbit`: the link's limit; 0: none, and the total
    is held against the restore alone; None: nothing is known of it."""
    typical = [median(m.freeze_s for m in of_length) for of_length in _by_length(moves)]
    held = {
        f"freeze p99 <= {1000 * _FREEZE_S:.0f} ms": max(m.freeze_s for m in moves) <= _FREEZE_S,
        "the freeze does not grow with the context": typical[-1] <= typical[0] + _GROWTH_S,
        f"largest gap <= {1000 * _GAP_S:.0f} ms": max(m.gap_s for m in moves) <= _GAP_S,
    }
    if mbit is not None:
        link = f"max(bytes / {mbit:g} Mbit/s, restore)" if mbit else "restore"
        limit = f"total <= {_OVER} x {link} + {1000 * _FIXED_S:.0f} ms"
        held[limit] = all(m.total_s <= m.limit_s for m in moves)
    return held


def print_targets(held: Mapping[str, bool]) -> None:
    for target, holds in held.items():
        console.print(f"{'holds' if holds else 'MISSED'}: {target}")


def print_moves(moves: Sequence[Moved], title: str = "") -> None:
    names = ("context", "freeze p50", "worst", "gap p50", "worst", "total p50", "limit", "rows")
    title = title or "ms, agents that move while they speak"
    table = Table("rounds", *(Column(x, justify="right") for x in (*names, "MB")), title=title)
    for of_length in _by_length(moves):
        freeze, gap, total = (
            [1000 * getattr(m, name) for m in of_length]
            for name in ("freeze_s", "gap_s", "total_s")
        )
        table.add_row(
            str(max(m.rounds for m in of_length)),
            str(of_length[0].context),
            *(f"{x:.0f}" for x in (median(freeze), max(freeze), median(gap), max(gap))),
            f"{median(total):.0f}",
            f"{1000 * median(m.limit_s for m in of_length):.0f}",
            f"{median(m.rows for m in of_length):.0f}",
            f"{median(m.n_bytes for m in of_length) / 1e6:.1f}",
        )
    show(table)
