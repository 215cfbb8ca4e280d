"""Prometheus metrics: the ingress's own, and what the replicas report at the time of a scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from cluster.moves import Reason

_TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """One per ingress process; a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "kvferry_requests", "Turns asked for, by HTTP status.", ["status"],
            registry=self.registry,
        )  # fmt: skip
        self.cache = Counter(
            "kvferry_turns", "Turns begun, by where the agent's memory was.", ["cache"],
            registry=self.registry,
        )  # fmt: skip
        self.tokens = Counter(
            "kvferry_tokens", "Tokens of answered turns.", ["kind"], registry=self.registry
        )
        self.first_token = Histogram(
            "kvferry_time_to_first_token_seconds", "From request to first token.",
            buckets=_TTFT_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.failovers = Counter(
            "kvferry_failovers", "Attempts of a turn that were lost and taken over.",
            registry=self.registry,
        )  # fmt: skip

    def render(self, cluster: dict[str, Any]) -> bytes:
        """The exposition text; `cluster` is the router's report."""
        registry = CollectorRegistry()
        registry.register(_Cluster(cluster))
        return generate_latest(self.registry) + generate_latest(registry)


def _copies(copies: dict[str, Any] | None) -> Iterator[Metric]:
    if copies is not None and copies["short_blocks"] is not None:
        yield GaugeMetricFamily(
            "kvferry_short_blocks",
            f"Blocks on fewer than {copies['replicas']} disks.",
            copies["short_blocks"],
        )


class _Cluster:
    """The router's report as metrics."""

    def __init__(self, cluster: dict[str, Any]) -> None:
        self._cluster = cluster

    def collect(self) -> Iterator[Metric]:
        report = self._cluster
        yield GaugeMetricFamily("kvferry_agents", "Agents known.", report["agents"])
        yield from _moves(report["moves"])
        yield from _copies(report.get("copies"))
        yield CounterMetricFamily(
            "kvferry_replica_losses", "Replicas that died or left.", report["replica_losses"]
        )
        for family in _PER_NODE:
            yield family.collect(report["nodes"])


@dataclass(frozen=True)
class _PerNode:
    """A figure of every node: what `value` finds in the router's report of it, by `label` where
    that is a second label of the metric; None: the node has none."""

    kind: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    help: str
    value: Callable[[dict[str, Any]], Any]
    label: str = ""
    loads: bool = False  # told of nodes without a replica, too

    def collect(self, nodes: Sequence[dict[str, Any]]) -> Metric:
        family = self.kind(self.name, self.help, labels=["node", *filter(None, [self.label])])
        for node in nodes:
            found = self.value(node) if self.loads or node["pid"] is not None else None
            if found is None:
                continue
            entries = found.items() if self.label else [("", found)]
            for label, value in entries:
                family.add_metric([node["id"], *filter(None, [label])], float(value))
        return family


_GAUGE, _COUNTER = GaugeMetricFamily, CounterMetricFamily
_PER_NODE = (
    _PerNode(_GAUGE, "kvferry_replica_ready", "1 if it takes turns.",
             lambda n: n["replica"] == "ready"),
    _PerNode(_GAUGE, "kvferry_kv_bytes", "KV bytes held.", lambda n: n["bytes"], "tier"),
    _PerNode(_GAUGE, "kvferry_store_answers", "0 while the shared store does not answer.",
             lambda n: n["store_answers"]),
    _PerNode(_GAUGE, "kvferry_lagging_bytes", "On a node, not in the shared store.",
             lambda n: n["lagging"]["bytes"]),
    _PerNode(_GAUGE, "kvferry_lagging_agents", "Of which the shared store lacks something.",
             lambda n: n["lagging"]["agents"]),
    _PerNode(_COUNTER, "kvferry_local_written_bytes", "Written to a node's disk.",
             lambda n: n["local"] and n["local"]["written_bytes"]),
    _PerNode(_GAUGE, "kvferry_turns_waiting", "Queued turns.", lambda n: n["waiting"]),
    _PerNode(_GAUGE, "kvferry_turns_running", "Turns in steps.", lambda n: n["running"]),
    _PerNode(_COUNTER, "kvferry_draft_tokens", "Tokens drafted, and verified in a step.",
             lambda n: n["served"].get("draft_tokens", 0)),
    _PerNode(_COUNTER, "kvferry_draft_tokens_accepted", "Of those, the right ones.",
             lambda n: n["served"].get("draft_tokens_accepted", 0)),
    _PerNode(_COUNTER, "kvferry_memory_faults",
             "Stored memory that was refused or lost, and prefilled instead.",
             lambda n: n["faults"], "reason"),
    _PerNode(_GAUGE, "kvferry_model_fetched_bytes", "Of a model that a node lacks.",
             lambda n: n.get("fetching") and n["fetching"]["done"], loads=True),
    _PerNode(_GAUGE, "kvferry_model_bytes", "Of all of it.",
             lambda n: n.get("fetching") and n["fetching"]["total"], loads=True),
)  # fmt: skip


def _moves(moves: dict[str, Any]) -> Iterator[Metric]:
    """Of cluster.moves."""
    moved = CounterMetricFamily("kvferry_migrations", "Agents moved.", labels=["reason"])
    failed = CounterMetricFamily(
        "kvferry_migrations_failed", "Agents that stayed where they were.", labels=["reason"]
    )
    for family, counts in ((moved, moves["by_reason"]), (failed, moves["failed"])):
        for reason in get_args(Reason):
            family.add_metric([reason], counts.get(reason, 0))
    freeze = HistogramMetricFamily(
        "kvferry_migration_freeze_seconds",
        "From the token at which an agent stopped to its release.",
    )
    freeze.add_metric([], moves["freeze_buckets"], moves["freeze_s"])
    yield from (moved, failed, freeze)
