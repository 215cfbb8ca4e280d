"""kvferry bench place: the router's decisions, in this process, without actors and without a model.

    speed      placements/s: a registry of agents, replicas that report twice a second
    right      ship or prefill, over contexts and links: the chosen one's real cost over the better
    routers    a trace against simpler routers, on simulated devices (see simulator)

The last line is JSON.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from actors.rates import KnownRates, Rates
from actors.report import AgentReport
from bench.simulator import (
    BASELINES,
    NOISE,
    REPORT_S,
    Device,
    Figures,
    at_load,
    baseline,
    placed,
)
from bench.turns import BLOCK, Turn, mooncake, synthetic
from cluster.dispatch import Ask, Dispatch
from cluster.placement import Candidate, LinkCost, Location, PlacementConfig, link_cost, place
from storage.card import AgentId
from storage.links import PROBE_BYTES, Line, LinkRate, peer_link

_PER_S = 5000  # placements
_NEW = 20  # one replica of so many
_LOADS = (0.4, 0.5)
_CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
_BITS = {"100 Mbit/s": 1e8, "1 Gbit/s": 1e9, "2.5 Gbit/s": 2.5e9, "10 Gbit/s": 1e10}
_FIXED_S = 0.01  # of an agent's rows over a link of the simulator
_READ_S = 0.003  # of one read
# A laptop's cores with a model of 135M parameters, and a workstation with one of 8B.
_SMALL = (KnownRates(404.0, 0.009, 40_000.0, 2.0, 1.2e-7), 6480)
_LARGE = (KnownRates(8000.0, 0.02, 200_000.0, 2.0, 2e-9), 36_864)
console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Case:
    """Expected seconds; `mean` and `worst` of the choices made under noise, over the better."""

    device: str
    link: str
    context: int
    ship_s: float
    prefill_s: float
    shipped: float  # share of the choices
    mean: float
    worst: float


def run(replicas: int, agents: int, seconds: float, trace: Path | None) -> int:
    """Measure and print; 1 when the rate is missed. Raises ConfigError."""
    turns = mooncake(trace) if trace is not None else synthetic(4000, 1)
    per_s, p99_s = throughput(replicas, agents, seconds)
    console.print(
        f"{per_s:.0f} placements/s on one core, p99 {1e6 * p99_s:.0f} us: {replicas} replicas, "
        f"{agents} agents"
    )
    fast = per_s >= _PER_S
    console.print(f"{'holds' if fast else 'MISSED'}: placements/s >= {_PER_S}")
    cases = right()
    _print_right(cases)
    tables = {load: routers(turns, load) for load in _LOADS}
    for load, figures in tables.items():
        _print_routers(figures, load, trace.name if trace else "synthetic sessions", len(turns))
    report: dict[str, Any] = {
        "placements_per_s": round(per_s),
        "p99_us": round(1e6 * p99_s),
        "replicas": replicas,
        "agents": agents,
        "mean_choice": round(max(case.mean for case in cases), 3),
        "worst_choice": round(max(case.worst for case in cases), 3),
        "choices": [asdict(case) for case in cases],
        "routers": {
            str(load): {name: _figures_json(x) for name, x in figures.items()}
            for load, figures in tables.items()
        },
    }
    print(json.dumps({"place": report}), flush=True)
    return 0 if fast else 1


# ---- speed


def throughput(n_replicas: int, n_agents: int, seconds: float) -> tuple[float, float]:
    """(placements per second of processor time, p99 of one in seconds): decide, note, end, as the
    router does it. Reports are included; a few replicas have not measured everything yet."""
    draw = random.Random(7)
    dispatch = Dispatch(PlacementConfig())
    fleet = [_candidate(draw, n, n_replicas) for n in range(n_replicas)]
    nodes = {candidate.node: candidate for candidate in fleet}
    agents = [AgentId("default", f"s{n}") for n in range(n_agents)]
    for candidate in fleet:
        dispatch.reported(candidate)
    for n, agent in enumerate(agents):
        rows = draw.randint(0, 16_000)
        told = AgentReport(agent, 1, 1, 1, rows, rows, n % 3 > 0, 0, 0, 0.0, max(0, rows - n % 99))
        dispatch.registry.reported(fleet[n % n_replicas].node, [told])
    asks = [
        Ask(draw.choice(agents), draw.randint(100, 80_000), 128, str(n), f"p{n % 50}")
        for n in range(20_000)
    ]
    spent, began, n, due = [], time.process_time(), 0, 0.0
    while (now := time.process_time() - began) < seconds:
        while due <= now:  # the reports of all, spread evenly
            report = fleet[int(due / REPORT_S * n_replicas) % n_replicas]
            dispatch.reported(replace(report, queue_s=draw.random()))
            due += REPORT_S / n_replicas
        ask = asks[n % len(asks)]
        start = time.thread_time()
        choice = dispatch.decide(ask, nodes)
        dispatch.began(ask, choice, 1e12)
        dispatch.ended(ask.agent, ask.turn_id, ask.n_chars)
        spent.append(time.thread_time() - start)
        n += 1
    return n / seconds, sorted(spent)[int(0.99 * len(spent))]


def _candidate(draw: random.Random, number: int, n_replicas: int) -> Candidate:
    new = number % _NEW == 0  # it has restored nothing yet
    rates = Rates(
        draw.uniform(200, 8000), draw.uniform(0.01, 0.05),
        None if new else draw.uniform(1e4, 2e5), 2.0, 2e-9,
    )  # fmt: skip
    links = {"store": LinkCost(0.01, draw.uniform(1e-5, 1e-3)), "disk": LinkCost(0.001, 1e-5)}
    for other in draw.sample(range(n_replicas), min(8, n_replicas)):
        links[peer_link(f"node-{other:04}")] = LinkCost(0.01, draw.uniform(1e-5, 1e-3))
    prefixes = {f"p{draw.randint(0, 50)}": 256 * draw.randint(1, 8) for _ in range(8)}
    return Candidate(f"node-{number:04}", draw.random(), rates, 0.5, 0, links, prefixes)


# ---- right


def right(seed: int = 3, tries: int = 40) -> list[Case]:
    """Of an agent that nobody owns: ship its rows, or prefill them, with rates and links that were
    measured with noise at other contexts."""
    draw, cases = random.Random(seed), []
    for device, (rates, row_bytes) in {"small": _SMALL, "large": _LARGE}.items():
        for name, bits in _BITS.items():
            true = LinkRate(_READ_S, bits / 8)
            link = link_cost(true, row_bytes)
            for context in _CONTEXTS:
                ship = link.fixed_s + max(
                    context * link.token_s, context / rates.restore_tokens_per_s
                )
                prefill = rates.prefill_s(0, context)
                chosen = [_choice(draw, rates, true, row_bytes, context) for _ in range(tries)]
                costs = [(ship if ships else prefill) / min(ship, prefill) for ships in chosen]
                share, mean = sum(chosen) / tries, sum(costs) / tries
                found = Case(device, name, context, ship, prefill, share, mean, max(costs))
                cases.append(found)
    return cases


def _choice(
    draw: random.Random, rates: KnownRates, link: LinkRate, row_bytes: int, context: int
) -> bool:
    """Whether it ships, after some turns of other agents were measured: prefills at any depth,
    reads of blocks and tails."""

    def noisy(seconds: float) -> float:
        return seconds * draw.lognormvariate(0.0, NOISE)

    measured, line = Rates(), Line(PROBE_BYTES / 16, flat=False)
    for _ in range(60):
        tokens, depth = draw.choice((256, 512)), draw.randint(0, 32_768)
        took = rates.prefill_s(depth, depth + tokens)
        measured.prefill(tokens, noisy(took), depth + tokens / 2)
        size = row_bytes * draw.choice((256, 256, draw.randint(16, 255)))
        line.measure(size, noisy(link.fixed_s + size / link.bytes_per_s))
        rows = draw.randint(256, 16_384)
        measured.restore(rows, noisy(rows / rates.restore_tokens_per_s))
    measured.decode(rates.decode_step_s)
    fit = line.fit()
    assert fit is not None
    seen = link_cost(LinkRate(fit[0], 1.0 / max(fit[1], 1e-12)), row_bytes)
    one = Candidate("a", 0.0, measured, 0.0, 0, {"store": seen})
    return place(0, 0, Location(None, context), [one], PlacementConfig()).action == "load"


def _print_right(cases: Sequence[Case]) -> None:
    table = Table("device", "link", Column("ships from, tokens", justify="right"),
                  Column("mean choice / better", justify="right"),
                  Column("worst", justify="right"),
                  title="ship or prefill")  # fmt: skip
    for device, link in dict.fromkeys((case.device, case.link) for case in cases):
        of_link = [case for case in cases if (case.device, case.link) == (device, link)]
        ships = [case.context for case in of_link if case.shipped > 0.5]
        mean, worst = (max(getattr(x, name) for x in of_link) for name in ("mean", "worst"))
        first = str(min(ships)) if ships else "never"
        table.add_row(device, link, first, f"{mean:.2f}", f"{worst:.2f}")
    console.print(table)


# ---- routers


def devices() -> list[Device]:
    """Four fast ones with 10 Gbit/s to the store, four of less than half their speed with one."""
    rates, row_bytes = _LARGE
    slower = KnownRates(3000.0, 0.04, 100_000.0, 2.0, 5e-9)
    fast = Device(rates, LinkCost(_FIXED_S, 8 * row_bytes / 1e10), 600_000, row_bytes)
    slow = Device(slower, LinkCost(_FIXED_S, 8 * row_bytes / 1e9), 300_000, row_bytes)
    return [fast] * 4 + [slow] * 4


def routers(turns: Sequence[Turn], load: float) -> dict[str, Figures]:
    """The same turns and noise for all of them; `load`: of devices whose caches were perfect."""
    machines = devices()
    timed = at_load(turns, machines, load)
    figures = {name: baseline(timed, machines, policy, 1) for name, policy in BASELINES.items()}
    return figures | {"kvferry": placed(timed, machines, 1)}


def _print_routers(figures: dict[str, Figures], load: float, source: str, n: int) -> None:
    titles = ("TTFT mean, s", "p99, s", "prefilled, Mtok", "shipped, GB", "moves")
    table = Table("router", *(Column(title, justify="right") for title in titles),
                  title=f"{source}: {n} turns, load {load:g}, blocks of {BLOCK}")  # fmt: skip
    for name, x in figures.items():
        table.add_row(
            name, f"{x.mean:.2f}", f"{x.percentile(0.99):.2f}", f"{x.prefilled / 1e6:.2f}",
            f"{x.shipped_bytes / 1e9:.1f}", str(x.moves),
        )  # fmt: skip
    console.print(table)


def _figures_json(figures: Figures) -> dict[str, float]:
    return {
        "ttft_mean_s": round(figures.mean, 4),
        "ttft_p99_s": round(figures.percentile(0.99), 4),
        "prefilled_tokens": figures.prefilled,
        "shipped_bytes": figures.shipped_bytes,
        "moves": figures.moves,
    }
