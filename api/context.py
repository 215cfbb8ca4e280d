"""What every endpoint needs: the router, the turn runner, the configuration, the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from actors.models import served_name
from api.metrics import Metrics
from api.turns import Turns
from cluster.config import ClusterConfig


@dataclass
class Context:
    config: ClusterConfig
    router: Any  # handle of cluster.router.PlacementRouter
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))
    turns: Turns = field(init=False)
    model: str = field(init=False)

    def __post_init__(self) -> None:
        self.turns = Turns(self.router, self.config.http, self.metrics)
        self.model = served_name(self.config.replica.model)
