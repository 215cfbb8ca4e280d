"""The operator's view: the cluster, liveness, readiness, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from api.auth import tenant_of
from api.context import Context
from api.errors import api_error
from cluster.remote import ReplicaLost, call

_TIMEOUT_S = 10.0


def router(context: Context) -> APIRouter:
    """The endpoints, on a context."""
    routes = APIRouter()

    @routes.get("/v1/cluster")
    async def cluster(request: Request) -> Any:
        tenant_of(request, context.config.http.api_keys)
        return await _report()

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
        return Response(context.metrics.render(await _report()), media_type=CONTENT_TYPE_LATEST)

    async def _report() -> Any:
        try:
            return await call(context.router.cluster.remote(), _TIMEOUT_S)
        except Exception as error:
            raise api_error(error) from error

    return routes
