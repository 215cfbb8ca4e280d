"""The figures of `kvferry bench ttft`: two tables for people, one line of JSON for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from actors.models import served_name
from cluster.config import ClusterConfig

_TITLES = {
    "cold": "cold",
    "hot": "hot",
    "warm": "warm",
    "migrated": "after migration",
    "restarted": "after restart",
}


@dataclass(frozen=True)
class Figures:
    """One context length; `seconds` by state, one entry per run."""

    length: int
    prompt_tokens: float
    seconds: dict[str, list[float]]
    raw_tokens_per_s: list[float]
    stored_bytes: float
    f16_bytes: float

    def ttft(self, state: str) -> float:
        return median(self.seconds[state])

    @property
    def raw_rate(self) -> float:
        return median(self.raw_tokens_per_s)

    @property
    def cold_rate(self) -> float:
        """Tokens/s of prefill as a client sees it."""
        return self.prompt_tokens / self.ttft("cold")

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "ttft_s": {state: round(self.ttft(state), 5) for state in self.seconds},
            "runs_s": {state: [round(s, 5) for s in v] for state, v in self.seconds.items()},
            "cold_over": {
                state: round(self.ttft("cold") / self.ttft(state), 1)
                for state in self.seconds
                if state != "cold"
            },
            "raw_prefill_tokens_per_s": [round(rate, 1) for rate in self.raw_tokens_per_s],
            "cold_prefill_tokens_per_s": round(self.cold_rate, 1),
            "cold_of_raw": round(self.cold_rate / self.raw_rate, 3),
            "stored_bytes": self.stored_bytes,
            "stored_of_f16": round(self.stored_bytes / self.f16_bytes, 4),
        }


def print_report(settings: ClusterConfig, runs: int, figures: list[Figures]) -> None:
    """On stdout; the JSON is the last line."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=120)
    replica = settings.replica
    model = served_name(replica.model)
    console.print(
        f"{model}, {settings.nodes} device nodes, {replica.threads} thread(s) each, codec "
        f"{replica.codec}. TTFT in ms, median of {runs}; in brackets how many times faster than "
        "cold."
    )
    console.print(_ttft_table(figures), soft_wrap=False)
    console.print(_cost_table(figures), soft_wrap=False)
    summary = {
        "model": model,
        "nodes": settings.nodes,
        "threads": replica.threads,
        "codec": replica.codec,
        "runs": runs,
        "contexts": {str(entry.length): entry.to_json() for entry in figures},
    }
    print(json.dumps({"ttft": summary}), flush=True)


def _ttft_table(figures: list[Figures]) -> Table:
    states = list(figures[0].seconds)
    table = Table(Column("context", no_wrap=True))
    for state in states:
        table.add_column(_TITLES[state], justify="right", no_wrap=True)
    for entry in figures:
        cells = [f"{1000 * entry.ttft('cold'):.0f}"]
        for state in states[1:]:
            ttft = entry.ttft(state)
            cells.append(f"{1000 * ttft:.0f} ({entry.ttft('cold') / ttft:.0f}x)")
        table.add_row(str(entry.length), *cells)
    return table


def _cost_table(figures: list[Figures]) -> Table:
    table = Table(Column("context", no_wrap=True))
    titles = ("raw prefill", "cold prefill", "cold / raw", "agent on disk", "disk / f16")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for entry in figures:
        table.add_row(
            str(entry.length),
            f"{entry.raw_rate:.0f} tok/s",
            f"{entry.cold_rate:.0f} tok/s",
            f"{entry.cold_rate / entry.raw_rate:.2f}",
            f"{entry.stored_bytes / 1e6:.1f} MB",
            f"{entry.stored_bytes / entry.f16_bytes:.3f}",
        )
    return table


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"
