"""The operator's view: the cluster, liveness, readiness, metrics; draining and pressure of a node.

A drain goes on behind the answer; GET says how far it is."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict

from api.auth import tenant_of
from api.context import Context
from api.errors import api_error
from cluster.remote import ReplicaLost, call

_TIMEOUT_S = 10.0


class Pressure(BaseModel):
    """How a node is doing: `critical` empties it, `none` takes it back into use."""

    model_config = ConfigDict(extra="forbid")

    level: Literal["none", "warn", "critical"]


def router(context: Context) -> APIRouter:
    """The endpoints, on a context."""
    routes = APIRouter()
    _add_nodes(routes, context)
    _add_health(routes, context)
    return routes


def _add_nodes(routes: APIRouter, context: Context) -> None:
    @routes.get("/v1/cluster")
    async def cluster(request: Request) -> Any:
        tenant_of(request, context.config.http.api_keys)
        return await _report(context)

    @routes.post("/v1/cluster/nodes/{node}/drain", status_code=202)
    async def drain(request: Request, node: str) -> Any:
        tenant_of(request, context.config.http.api_keys)
        return await _ask(context.router.drain.remote(node))

    @routes.get("/v1/cluster/nodes/{node}/drain")
    async def progress(request: Request, node: str) -> Any:
        tenant_of(request, context.config.http.api_keys)
        return await _ask(context.router.drain_progress.remote(node))

    @routes.delete("/v1/cluster/nodes/{node}/drain")
    async def undrain(request: Request, node: str) -> Any:
        tenant_of(request, context.config.http.api_keys)
        return await _ask(context.router.undrain.remote(node))

    @routes.post("/v1/cluster/nodes/{node}/pressure")
    async def pressure(request: Request, node: str, body: Pressure) -> Any:
        tenant_of(request, context.config.http.api_keys)
        return await _ask(context.router.pressed.remote(node, body.level))


def _add_health(routes: APIRouter, context: Context) -> None:
    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/readyz")
    async def readyz() -> JSONResponse:
        try:
            state = await call(context.router.ready.remote(), _TIMEOUT_S)
        except ReplicaLost as error:
            state = {"ready": False, "replicas": 0, "errors": {"router": str(error)}}
        return JSONResponse(state, 200 if state["ready"] else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(
            context.metrics.render(await _report(context)), media_type=CONTENT_TYPE_LATEST
        )


async def _report(context: Context) -> Any:
    return await _ask(context.router.cluster.remote())


async def _ask(pending: Any) -> Any:
    try:
        return await call(pending, _TIMEOUT_S)
    except Exception as error:
        raise api_error(error) from error
