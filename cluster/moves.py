"""Migrations, counted for the router's report: by reason, and how long they froze."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from cluster.migration import Migration

Reason = Literal["operator", "placement", "drain"]
BUCKETS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Moves:
    def __init__(self) -> None:
        self.total = 0
        self._by_reason: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        self._freeze_s = 0.0

    def done(self, reason: Reason, migration: Migration) -> None:
        self.total += 1
        self._by_reason[reason] += 1
        self._freeze_s += migration.freeze_s
        self._buckets[sum(migration.freeze_s > bound for bound in BUCKETS_S)] += 1

    def failed(self, reason: Reason) -> None:
        self._failed[reason] += 1

    def to_json(self) -> dict[str, Any]:
        """`freeze_buckets`: (bound in seconds, migrations up to it), the last one without bound."""
        bounds, up_to, buckets = [*map(str, BUCKETS_S), "+Inf"], 0, []
        for bound, count in zip(bounds, self._buckets, strict=True):
            up_to += count
            buckets.append((bound, up_to))
        return {
            "by_reason": dict(self._by_reason),
            "failed": dict(self._failed),
            "freeze_s": self._freeze_s,
            "freeze_buckets": buckets,
        }
