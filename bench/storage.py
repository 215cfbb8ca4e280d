"""kvferry bench storage: how fast memory is stored and restored, and how small it is.

    rates      this machine's copy and page-cache rates, checksums, every codec; on one core
    restore    4,096 tokens from the node's disk into the engine, against the sum of its steps
    turn end   bytes written by turns of some lengths
    size       stored bytes against float16, also for a model with sliding windows
    crowd      what 100 and 10,000 agents in one store change

Correctness is checked in the same run: rows that are missing or wrong end it. Exit code 1 then.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from actors.models import open_engine, served_name
from bench.crowd import Crowd, crowds
from bench.rates import CodecRates, MachineRates, codec_rates, machine_rates
from bench.restore import RestoreFailed, RestoreFigures, TurnEnd, restore, turn_ends
from cluster.config import ClusterConfig

_TURNS = [8, 30, 120, 300]
_CROWDS = [100, 10_000]
console = Console(highlight=False, soft_wrap=True)


def run(config: ClusterConfig, tokens: int, runs: int, agents: bool) -> int:
    """Measure and print; the exit code. Raises ModelUnavailable."""
    # Float16 cells give back the rows they took: what is stored and restored can be checked.
    replica = replace(config.replica, kv_type="f16", slots=1)
    replica = replace(replica, n_ctx=max(replica.n_ctx, tokens + 512))
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as name:
        folder = Path(name)
        engine = open_engine(replica)
        spec, key = engine.key.spec, engine.key
        _say("rates")
        machine = machine_rates(folder)
        codecs = codec_rates(spec)
        try:
            _say("turn ends")
            ends = turn_ends(engine, folder / "ends", replica.codec, _TURNS)
            _say(f"restore of {tokens} tokens")
            engine = open_engine(replica)  # a bench closes its engine
            figures = restore(engine, folder / "restore", replica.codec, tokens, runs, machine)
        except RestoreFailed as error:
            print(f"kvferry: {error}", file=sys.stderr)
            return 1
        _say(f"{_CROWDS[-1]} agents" if agents else "")
        crowd = crowds(folder / "crowd", key, _CROWDS if agents else _CROWDS[:1])
    _print(machine, codecs, figures, ends, crowd, replica.codec, served_name(replica.model))
    return 0


def _print(
    machine: MachineRates,
    codecs: dict[str, CodecRates],
    figures: RestoreFigures,
    ends: list[TurnEnd],
    crowd: list[Crowd],
    codec: str,
    model: str,
) -> None:
    for table in (
        _machine_table(machine),
        _codec_table(codecs),
        _restore_table(figures, codec),
        _ends_table(ends),
        _crowd_table(crowd),
    ):
        console.print(table)
    report = {
        "model": model,
        "machine": asdict(machine),
        "codecs": {name: asdict(rates) for name, rates in codecs.items()},
        "restore": asdict(figures) | {"over_floor": round(figures.over_floor, 3)},
        "turn_ends": [asdict(end) for end in ends],
        "crowd": [asdict(c) for c in crowd],
    }
    print(json.dumps({"storage": report}))


def _machine_table(machine: MachineRates) -> Table:
    rates = {"memcpy": machine.memcpy, "page cache": machine.page_cache} | machine.checksums
    table = Table(*(Column(name, justify="right") for name in rates), title="one core")
    table.add_row(*(_rate(rate) for rate in rates.values()))
    return table


def _codec_table(codecs: dict[str, CodecRates]) -> Table:
    table = _table("codec", "encode", "decode", "of f16", "rel. error")
    for name, rates in codecs.items():
        table.add_row(
            name, _rate(rates.encode), _rate(rates.decode), f"{rates.ratio:.3f}",
            f"{rates.error:.4f}",
        )  # fmt: skip
    return table


def _restore_table(figures: RestoreFigures, codec: str) -> Table:
    table = _table(f"{figures.n_rows} tokens, {codec}", "")
    table.add_row("restore, median", _ms(median(figures.seconds)))
    for step, seconds in figures.floor.items():
        table.add_row(f"  {step} alone", _ms(seconds))
    table.add_row("restore / sum of its steps", f"{figures.over_floor:.2f}")
    blocks = figures.peak_bytes / figures.block_f16_bytes
    table.add_row("peak extra memory", f"{blocks:.1f} blocks of f16")
    ratio = figures.stored_bytes / figures.f16_bytes
    table.add_row("stored", f"{figures.stored_bytes / 1e6:.1f} MB, {ratio:.3f} of f16")
    return table


def _ends_table(ends: list[TurnEnd]) -> Table:
    table = _table("turn of", "seals a block", "written", "allowed")
    for end in ends:
        table.add_row(
            f"{end.new_rows} tokens", "yes" if end.sealed else "no",
            f"{end.written / 1e3:.0f} KB", f"{end.allowed / 1e3:.0f} KB",
        )  # fmt: skip
    return table


def _crowd_table(crowd: list[Crowd]) -> Table:
    table = _table(
        "agents in the store", "claim", "commit", "look", "evict", "replica start", "list"
    )
    for c in crowd:
        table.add_row(
            str(c.agents), _ms(c.open), _ms(c.commit), _ms(c.look), f"{1e6 * c.evict:.1f} µs",
            _ms(c.replica), f"{c.start:.2f} s",
        )  # fmt: skip
    return table


def _table(*columns: str) -> Table:
    first, *rest = columns
    return Table(first, *(Column(name, justify="right") for name in rest))


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _say(line: str) -> Any:
    if line:
        print(line, file=sys.stderr, flush=True)
