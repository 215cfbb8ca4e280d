"""kvferry bench serve: kvferry's speed, side by side with llama-server where one is given.

    one       prefill and decode of one request
    together  4 and 8 agents at once
    crowd     16 agents over 4 slots that come back for 3 more rounds
    overhead  a step's time outside llama_decode, with 8 agents in the replica's own loop

Both sides run as processes and are asked over HTTP: the same GGUF, threads, float16 cells, flash
attention, room for as many tokens, prompts and numbers of tokens. One works while the other sleeps;
runs are interleaved, figures are medians. Greedy replies to equal prompts must be equal, or part at
a near tie: exit code 1 otherwise.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from actors.models import resolve, served_name
from bench.serve_crowd import crowd, settings
from bench.serve_figures import Agreement, Compared, meets
from bench.serve_load import QUICK, Scribe, Sizes, one, together
from bench.serve_overhead import Overhead, OverheadFailed, overheads
from bench.serve_sides import Kvferry, LlamaServer, Settings, Side, SideFailed
from cluster.config import ClusterConfig
from cluster.errors import ConfigError

PARTS = ("one", "together", "crowd", "overhead")
_OVERHEAD_AGENTS = 8
_MOST_OVERHEAD = 0.05


@dataclass
class Report:
    compared: list[Compared] = field(default_factory=list)
    agreement: dict[str, Agreement] = field(default_factory=dict)
    overhead: list[Overhead] = field(default_factory=list)

    def add(self, part: str, compared: Sequence[Compared], agreement: Agreement) -> None:
        """And say so: the whole takes long."""
        self.compared += compared
        self.agreement[part] = agreement
        for entry in compared:
            _say("  " + ", ".join(filter(None, _row(entry))))

    def to_json(self) -> dict[str, Any]:
        return {
            "compared": [entry.to_json() for entry in self.compared],
            "agreement": {name: entry.to_json() for name, entry in self.agreement.items()},
            "overhead": [
                asdict(o) | {"share": o.share, "tokens_per_s": o.tokens_per_s}
                for o in self.overhead
            ],
        }


def run(
    config: ClusterConfig,
    peer: str | None,
    parts: Sequence[str],
    runs: int | None,
    quick: bool,
    file: Path | None,
) -> int:
    """Measure and print; the exit code. Raises ConfigError, ModelUnavailable."""
    binary = _binary(peer)
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"--parts {','.join(unknown)}: known are {', '.join(PARTS)}")
    sizes = QUICK if quick else Sizes()
    sizes = sizes if runs is None else replace(sizes, runs=runs)
    replica = config.replica
    if replica.kv_type not in ("auto", "f16"):
        raise ConfigError(f"kv_type = {replica.kv_type}: this compares float16 cells")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without stopping the servers
    threads = replica.threads or os.cpu_count() or 1
    replica = replace(replica, threads=threads)
    try:
        report = _measure(replace(config, replica=replica), binary, parts, sizes)
    except (SideFailed, OverheadFailed) as error:
        print(f"kvferry bench: {error}", file=sys.stderr)
        return 1
    _print(report, served_name(replica.model), threads, quick)
    summary = {"model": served_name(replica.model), "threads": threads, "sizes": asdict(sizes)}
    text = json.dumps({"serve": summary | report.to_json()})
    if file is not None:
        file.write_text(text + "\n")
    print(text, flush=True)
    apart = [line for entry in report.agreement.values() for line in entry.apart]
    for line in apart:
        print(f"kvferry bench: greedy replies part {line}", file=sys.stderr)
    return 1 if apart else 0


def _binary(peer: str | None) -> Path | None:
    """Raises ConfigError."""
    if peer is None:
        return None
    name, _, path = peer.partition("=")
    if name != "llama-server" or not path:
        raise ConfigError(f"--peer {peer}: write llama-server=PATH")
    binary = Path(path).expanduser().absolute()
    if not os.access(binary, os.X_OK) or binary.is_dir():
        raise ConfigError(f"--peer {peer}: no program there (make llama-server builds one)")
    return binary


def _measure(
    config: ClusterConfig, binary: Path | None, parts: Sequence[str], sizes: Sizes
) -> Report:
    report, model = Report(), resolve(config.replica.model)
    threads = config.replica.threads
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        scribe = stack.enter_context(Scribe(replace(config.replica, threads=threads, slots=1)))
        if {"one", "together"} & {*parts}:
            most = max(sizes.together) if "together" in parts else 1
            n_ctx = _rounded(max(sizes.prompt, sizes.short_prompt) + sizes.reply + 64)
            wanted = Settings(model, most, n_ctx, threads)
            with _running(lambda: Kvferry(wanted, folder / "kvferry")) as ours:
                _few(report, ours, wanted, binary, folder, parts, scribe, sizes)
        if "crowd" in parts:
            _crowd(report, settings(model, threads, sizes), binary, folder / "crowd", scribe, sizes)
    if "overhead" in parts:
        _say("overhead of a step")
        report.overhead = overheads(config.replica, _OVERHEAD_AGENTS)
    return report


def _few(
    report: Report,
    ours: Kvferry,
    wanted: Settings,
    binary: Path | None,
    folder: Path,
    parts: Sequence[str],
    scribe: Scribe,
    sizes: Sizes,
) -> None:
    def peer(slots: int) -> Any:
        if binary is None:
            return _running(lambda: None)
        its = replace(wanted, slots=slots)
        place = folder / f"llama-{slots}"
        return _running(lambda: LlamaServer(binary, its, place, "llama-server", "--cache-ram", "0"))

    if "one" in parts:
        _say("one request")
        with peer(1) as other:
            compared, agreement = one(ours, other, scribe, sizes)
        report.add("one request", compared, agreement)
    for agents in sizes.together if "together" in parts else ():
        _say(f"{agents} agents at once")
        with peer(agents) as other:
            total, agreement = together(ours, other, agents, scribe, sizes)
        report.add(f"{agents} agents at once", [total], agreement)


def _crowd(
    report: Report,
    wanted: Settings,
    binary: Path | None,
    folder: Path,
    scribe: Scribe,
    sizes: Sizes,
) -> None:
    _say(f"{sizes.crowd} agents over {sizes.crowd_slots} slots")
    saves = folder / "saves"
    saves.mkdir(parents=True)
    flavours = {
        "alone": ("--cache-ram", "0"),
        "RAM cache": (),  # its default: 8 GiB
        "saved slots": ("--cache-ram", "0", "--slot-save-path", f"{saves}/"),
    }
    with ExitStack() as stack:
        ours = stack.enter_context(_running(lambda: Kvferry(wanted, folder / "kvferry")))
        peers: list[LlamaServer] = []
        for name, options in flavours.items() if binary else ():
            assert binary is not None
            peer = LlamaServer(
                binary, wanted, folder / name.replace(" ", "-"), f"llama-server, {name}", *options
            )
            stack.callback(peer.stop)
            peers.append(peer)
        compared, agreement = crowd(ours, peers, saves, scribe, sizes)
    report.add("crowd, first turns", compared, agreement)


@contextmanager
def _running(start: Any) -> Iterator[Any]:
    side: Side | None = start()
    try:
        yield side
    finally:
        if side is not None:
            side.stop()


def _rounded(n: int) -> int:
    return -(-n // 256) * 256


# ---- for people


def _print(report: Report, model: str, threads: int, quick: bool) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=140)
    note = " Sizes of --quick: no figures to quote." if quick else ""
    console.print(
        f"{model}, {threads} thread(s), medians; in brackets the ratios of single runs.{note}"
    )
    table = Table("", *(Column(c, justify="right") for c in ("kvferry", "peer", "ratio", "target")))
    for entry in report.compared:
        table.add_row(*_row(entry))
    for o in report.overhead:
        met = meets(o.share, _MOST_OVERHEAD, at_most=True)
        table.add_row(
            f"outside llama_decode, batch {o.agents}, {o.sampling}", f"{100 * o.share:.1f} %", "",
            f"{o.tokens_per_s:.1f} tok/s", f"at most {100 * _MOST_OVERHEAD:.0f} %: {_word(met)}",
        )  # fmt: skip
    console.print(table, soft_wrap=False)
    for name, a in report.agreement.items():
        if a.replies:
            console.print(
                f"{name}: {a.equal} of {a.replies} greedy replies are equal, {a.near} part at a "
                f"near tie, {len(a.apart)} elsewhere, {a.unchecked} not looked into"
            )


def _row(entry: Compared) -> list[str]:
    cells = [f"{entry.name} ({entry.unit})" + (f" / {entry.peer}" if entry.peer else "")]
    report = entry.to_json()
    for side in ("ours", "theirs"):
        values = sorted(report[side])
        cells.append(f"{values[len(values) // 2]:.1f}" if values else "")
    ratio, spread = entry.ratio, entry.spread
    if ratio is None or spread is None:
        return [*cells, "", ""]
    cells.append(f"{ratio:.2f} ({spread[0]:.2f} to {spread[1]:.2f})")
    if entry.target is None:
        return [*cells, ""]
    bound = "at most" if entry.at_most else "at least"
    return [*cells, f"{bound} {entry.target}: {_word(entry.met)}"]


def _word(met: bool | None) -> str:
    return "met" if met else "missed"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
