"""Prometheus metrics: the ingress's own, and what the replicas report at the time of a scrape."""

from __future__ import annotations

from collections.abc import Iterator
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
        up = GaugeMetricFamily("kvferry_replica_ready", "1 if it takes turns.", labels=["node"])
        size = GaugeMetricFamily("kvferry_kv_bytes", "KV bytes held.", labels=["node", "tier"])
        queued = GaugeMetricFamily("kvferry_turns_waiting", "Queued turns.", labels=["node"])
        running = GaugeMetricFamily("kvferry_turns_running", "Turns in steps.", labels=["node"])
        faults = CounterMetricFamily(
            "kvferry_memory_faults",
            "Stored memory that was refused or lost, and prefilled instead.",
            labels=["node", "reason"],
        )
        lag = GaugeMetricFamily(
            "kvferry_lagging_bytes", "On a node's disk, not in the shared store.", labels=["node"]
        )
        written = CounterMetricFamily(
            "kvferry_local_written_bytes", "Written to a node's disk.", labels=["node"]
        )
        drafted = CounterMetricFamily(
            "kvferry_draft_tokens", "Tokens drafted, and verified in a step.", labels=["node"]
        )
        accepted = CounterMetricFamily(
            "kvferry_draft_tokens_accepted", "Of those, the right ones.", labels=["node"]
        )
        fetched = GaugeMetricFamily(
            "kvferry_model_fetched_bytes", "Of a model that a node lacks.", labels=["node"]
        )
        wanted = GaugeMetricFamily("kvferry_model_bytes", "Of all of it.", labels=["node"])
        for node in report["nodes"]:
            if node.get("fetching"):
                fetched.add_metric([node["id"]], node["fetching"]["done"])
                wanted.add_metric([node["id"]], node["fetching"]["total"])
            if node["pid"] is None:
                continue
            name = node["id"]
            up.add_metric([name], float(node["replica"] == "ready"))
            for tier, value in node["bytes"].items():
                size.add_metric([name, tier], value)
            if node["local"]:
                lag.add_metric([name], node["local"]["lagging_bytes"])
                written.add_metric([name], node["local"]["written_bytes"])
            queued.add_metric([name], node["waiting"])
            running.add_metric([name], node["running"])
            drafted.add_metric([name], node["served"].get("draft_tokens", 0))
            accepted.add_metric([name], node["served"].get("draft_tokens_accepted", 0))
            for reason, count in node["faults"].items():
                faults.add_metric([name, reason], count)
        yield from (up, size, lag, written, queued, running, drafted, accepted, faults)
        yield from (fetched, wanted)


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
        "kvferry_migration_freeze_seconds", "From the freeze of an agent to its release."
    )
    freeze.add_metric([], moves["freeze_buckets"], moves["freeze_s"])
    yield from (moved, failed, freeze)
