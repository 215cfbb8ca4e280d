"""A cluster on paper: turns of a trace, on devices whose real costs are the model's with noise.

Placement sees only what replicas measure and report twice a second, as in a real cluster; simpler
routers see everything at once. Every device runs one turn after another and keeps the agents used
last in RAM; all rows are in the store, too. Pure; `bench.place` prints what comes of it.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from actors.rates import KnownRates, Rates
from actors.report import AgentReport
from bench.turns import Turn
from cluster.dispatch import Ask, Dispatch
from cluster.placement import Candidate, LinkCost, PlacementConfig
from storage.card import AgentId
from storage.links import Line

CHARS = 4  # of a token
REPORT_S = 0.5
NOISE = 0.2  # standard deviation of the logarithm of a real cost
_BATCH = 4  # turns that share a decoding step


@dataclass(frozen=True)
class Device:
    """What is true of a device; placement has to find out."""

    rates: KnownRates
    link: LinkCost
    ram_tokens: int
    row_bytes: int = 36_864  # 8 billion parameters in 4 bits: 32 layers, 8 heads of 128


@dataclass
class Figures:
    ttft: list[float] = field(default_factory=list)
    prefilled: int = 0
    shipped_bytes: int = 0
    moves: int = 0

    def percentile(self, share: float) -> float:
        ordered = sorted(self.ttft)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def mean(self) -> float:
        return sum(self.ttft) / len(self.ttft)


@dataclass
class Node:
    name: str
    device: Device
    free_at: float = 0.0
    ram: OrderedDict[int, int] = field(default_factory=OrderedDict)  # session -> tokens
    systems: dict[int, int] = field(default_factory=dict)  # system prompt -> tokens
    measured: Rates = field(default_factory=Rates)
    link: Line = field(default_factory=lambda: Line(2048.0, flat=False))

    def holds(self, turn: Turn) -> int:
        """Tokens of the prompt in RAM."""
        own = min(self.ram.get(turn.session, 0), turn.known)
        return max(own, min(self.systems.get(turn.system, 0), turn.shared))

    def keep(self, turn: Turn) -> list[int]:
        """The turn's memory stays in RAM; the sessions that had to leave for it."""
        self.ram[turn.session] = turn.tokens + turn.reply
        self.ram.move_to_end(turn.session)
        self.systems[turn.system] = turn.shared
        gone = []
        while sum(self.ram.values()) > self.device.ram_tokens and len(self.ram) > 1:
            gone.append(self.ram.popitem(last=False)[0])
        return gone


class Cluster:
    """Runs turns where it is told."""

    def __init__(self, devices: Sequence[Device], seed: int) -> None:
        self.nodes = [Node(f"node-{n:02}", device) for n, device in enumerate(devices)]
        self.by_name = {node.name: node for node in self.nodes}
        self.home: dict[int, Node] = {}
        self.stored: dict[int, int] = {}  # session -> tokens in the store
        self.figures = Figures()
        self._random = random.Random(seed)
        self._migrate_s = PlacementConfig().migrate_s

    def run(self, turn: Turn, node: Node, limit: int | None = None) -> float:
        """`limit`: rows to bring at most; None: all there are. When the turn ends."""
        device, rates = node.device, node.device.rates
        in_ram = node.holds(turn)
        stored = min(self.stored.get(turn.session, 0), turn.known)
        kept = max(in_ram, stored if limit is None else min(stored, limit))
        shipped, seconds = kept - in_ram, 0.0
        if shipped > 0:
            took = self._noisy(device.link.fixed_s + shipped * device.link.token_s)
            node.link.measure(shipped, took)
            seconds += took
        if kept:
            took = self._noisy(kept / rates.restore_tokens_per_s)
            node.measured.restore(kept, took)
            seconds = max(seconds, took) if shipped else took
        took, fresh = self._noisy(rates.prefill_s(kept, turn.tokens)), turn.tokens - kept
        node.measured.prefill(fresh, took, kept + fresh / 2)
        moved = self.home.get(turn.session, node) is not node
        ready = max(turn.at, node.free_at) + seconds + took + self._migrate_s * moved
        step = self._noisy(rates.decode_step_s)
        node.measured.decode(step)
        node.free_at = ready + turn.reply * step / _BATCH
        node.measured.turn(node.free_at - max(turn.at, 0.0))
        self._count(turn, ready, fresh, shipped * device.row_bytes, moved=moved)
        if moved:
            self.home[turn.session].ram.pop(turn.session, None)
        self.home[turn.session], self.stored[turn.session] = node, turn.tokens + turn.reply
        return node.free_at

    def _count(
        self, turn: Turn, ready: float, fresh: int, shipped_bytes: int, *, moved: bool
    ) -> None:
        figures = self.figures
        figures.ttft.append(ready - turn.at)
        figures.prefilled += fresh
        figures.shipped_bytes += shipped_bytes
        figures.moves += moved

    def _noisy(self, seconds: float) -> float:
        return seconds * self._random.lognormvariate(0.0, NOISE)


Policy = Callable[[Cluster, int, Turn], Node]


def round_robin(cluster: Cluster, number: int, turn: Turn) -> Node:
    return cluster.nodes[number % len(cluster.nodes)]


def session_hash(cluster: Cluster, number: int, turn: Turn) -> Node:
    return cluster.nodes[random.Random(turn.session).randrange(len(cluster.nodes))]


def least_loaded(cluster: Cluster, number: int, turn: Turn) -> Node:
    return min(cluster.nodes, key=lambda node: (max(node.free_at, turn.at), node.name))


def prefix_affinity(cluster: Cluster, number: int, turn: Turn) -> Node:
    """Where at least half of the prompt is in RAM, else where the least waits."""
    best = max(cluster.nodes, key=lambda node: (node.holds(turn), -node.free_at))
    return best if 2 * best.holds(turn) >= turn.tokens else least_loaded(cluster, number, turn)


BASELINES: Mapping[str, Policy] = {
    "round robin": round_robin,
    "session hash": session_hash,
    "least loaded": least_loaded,
    "prefix affinity": prefix_affinity,
}


def baseline(
    turns: Sequence[Turn], devices: Sequence[Device], policy: Policy, seed: int
) -> Figures:
    cluster = Cluster(devices, seed)
    for number, turn in enumerate(turns):
        node = policy(cluster, number, turn)
        cluster.run(turn, node)
        node.keep(turn)
    return cluster.figures


def placed(turns: Sequence[Turn], devices: Sequence[Device], seed: int) -> Figures:
    """By the router's own decisions, from reports that are up to half a second old."""
    cluster, dispatch = Cluster(devices, seed), Dispatch(PlacementConfig())
    ends: list[tuple[float, int, Turn, Node]] = []  # turns that run, by their end
    reported = float("-inf")
    for number, turn in enumerate(turns):
        while ends and ends[0][0] <= turn.at:
            _end(dispatch, *heapq.heappop(ends)[2:])
        if turn.at >= reported + REPORT_S:
            reported = turn.at
            for node in cluster.nodes:
                dispatch.reported(_report(node, turn.at))
        ask = Ask(
            _agent(turn), CHARS * turn.tokens, min(turn.reply, 128), str(number), str(turn.system)
        )
        busy = dispatch.registry.stays(ask.agent, turn.at)
        choice = dispatch.decide(ask, stays=busy)
        node = cluster.by_name[choice.node]
        dispatch.began(ask, choice, turn.at + 600.0)
        end = cluster.run(turn, node, choice.placement.restore_tokens)
        for session in node.keep(turn):
            _left(dispatch, cluster, session)
        heapq.heappush(ends, (end, number, turn, node))
        dispatch.registry.turn_ended(ask.agent, str(number))
    return cluster.figures


def _agent(turn: Turn) -> AgentId:
    return AgentId("default", f"s{turn.session}")


def _end(dispatch: Dispatch, turn: Turn, node: Node) -> None:
    """The replica reports the agent, and the ingress the turn's end."""
    rows, agent = turn.tokens + turn.reply, _agent(turn)
    record = dispatch.registry.get(agent)
    if record is not None and record.node == node.name:
        in_ram = turn.session in node.ram
        report = AgentReport(agent, 1, 1, 1, rows, rows, in_ram, 0, 0, 0.0, rows)
        dispatch.registry.reported(node.name, [report])
    dispatch.registry.spoken(agent, CHARS * rows)


def _left(dispatch: Dispatch, cluster: Cluster, session: int) -> None:
    """A session had to leave a device's RAM."""
    rows, agent = cluster.stored[session], AgentId("default", f"s{session}")
    report = AgentReport(agent, 1, 1, 1, rows, rows, False, 0, 0, 0.0, rows)
    dispatch.registry.reported(cluster.home[session].name, [report])


def _report(node: Node, now: float) -> Candidate:
    fit = node.link.fit()
    links = {"store": LinkCost(*fit)} if fit is not None else {}
    prefixes = {str(system): tokens for system, tokens in node.systems.items() if tokens}
    queue_s = max(0.0, node.free_at - now)
    return Candidate(node.name, queue_s, node.measured, 0.0, 0, links, prefixes)


def at_load(turns: Sequence[Turn], devices: Sequence[Device], load: float) -> list[Turn]:
    """The same turns, faster or slower: perfect caches would keep the devices so busy."""
    speed = sum(1.0 / _work(turns, device) for device in devices)
    span = max(turns[-1].at - turns[0].at, 1e-9)
    factor = 1.0 / (load * speed * span)
    return [replace(turn, at=(turn.at - turns[0].at) * factor) for turn in turns]


def _work(turns: Sequence[Turn], device: Device) -> float:
    """Seconds that one device would need for all turns, with all that was seen before in RAM."""
    rates = device.rates
    return sum(
        rates.prefill_s(max(t.known, t.shared), t.tokens) + t.reply * rates.decode_step_s / _BATCH
        for t in turns
    )
