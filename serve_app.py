"""The Ray Serve application: `serve run serve_app:app`, or `kvferry up` on one machine.

Configured by KVFERRY_CONFIG (a TOML file) and KVFERRY_<SETTING>; see docs/configuration.md.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import FastAPI
from ray import serve

from cluster.config import ClusterConfig, load_config


def build_app(config: ClusterConfig) -> Any:
    """The ingress on the head node: it carries HTTP; the replicas are actors of their own."""

    def asgi() -> FastAPI:
        from api.app import create_app  # built where the ingress runs

        return create_app(config)

    deployment: Any = serve.deployment(
        serve.ingress(asgi)(),
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=1024,
        max_queued_requests=1024,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}},
    )
    return deployment.bind()


def __getattr__(name: str) -> Any:
    """`app` is built when it is asked for, so that importing this module configures nothing."""
    if name == "app":
        return build_app(load_config(environment=os.environ))
    raise AttributeError(name)
