"""Puts the HTTP surface together. Runs inside the Ray Serve ingress, one per ingress replica.

Serve's proxy makes or echoes x-request-id before a request comes here.
"""

from __future__ import annotations

from typing import Any

import ray
from fastapi import FastAPI, HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import admin, agents, errors, openai, place
from api.context import Context
from cluster.config import ClusterConfig
from cluster.disks import NAMESPACE
from cluster.router import ROUTER_NAME, PlacementRouter

MAX_BODY = 8 << 20  # bytes; while they are parsed no stream goes on


def create_app(config: ClusterConfig) -> FastAPI:
    """The app, connected to the cluster's router, which is started if there is none."""
    return assemble(Context(config, connect_router(config)))


def assemble(context: Context) -> FastAPI:
    app = FastAPI(title="kvferry", openapi_url="/openapi.json")
    errors.install(app)
    for module in (openai, agents, admin, place):
        app.include_router(module.router(context))
    app.add_middleware(BodyLimit)
    return app


def connect_router(config: ClusterConfig) -> Any:
    """The cluster's one placement router: a detached actor on the head node."""
    actor = ray.remote(PlacementRouter)
    return actor.options(
        name=ROUTER_NAME,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        resources={"node:__internal_head__": 0.001},
        max_restarts=-1,
        max_concurrency=1000,
    ).remote(config)


class BodyLimit:
    """Refuses bodies of more than MAX_BODY bytes: those that say so before they are read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            length = Headers(scope=scope).get("content-length", "0")
            if length.isdigit() and int(length) > MAX_BODY:
                refusal = errors.ApiError(413, f"the body is larger than {MAX_BODY} bytes")
                await errors.respond(refusal)(scope, receive, send)
                return
        await self._app(scope, _counted(receive), send)


def _counted(receive: Receive) -> Receive:
    """Also of those that come in chunks of no announced sum, no more is read. Raises
    HTTPException."""
    n_bytes = 0

    async def count() -> Message:
        nonlocal n_bytes
        message = await receive()
        n_bytes += len(message.get("body", b""))
        if n_bytes > MAX_BODY:
            raise HTTPException(413, f"the body is larger than {MAX_BODY} bytes")
        return message

    return count
