"""Agents over HTTP: list, look at, delete, migrate."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from api.auth import agent_by_id, tenant_of
from api.context import Context
from api.errors import api_error
from cluster.remote import call

_TIMEOUT_S = 60.0


class MigrateRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    target: str | None = Field(
        min_length=1, max_length=256,
        description="a node id of /v1/cluster; null: the cheapest of the others",
    )  # fmt: skip


def router(context: Context) -> APIRouter:
    """The endpoints, on a context."""
    routes = APIRouter(prefix="/v1/agents")

    async def ask(pending: Any) -> Any:
        try:
            return await call(pending, _TIMEOUT_S)
        except Exception as error:
            raise api_error(error) from error

    @routes.get("")
    async def agents(request: Request) -> dict[str, Any]:
        tenant = tenant_of(request, context.config.http.api_keys)
        return {"object": "list", "data": await ask(context.router.agents.remote(tenant))}

    @routes.post("/{agent_id:path}/migrate")
    async def migrate(request: Request, agent_id: str, body: MigrateRequest) -> dict[str, Any]:
        agent = agent_by_id(tenant_of(request, context.config.http.api_keys), agent_id)
        done = await ask(context.router.migrate.remote(agent, body.target))
        return {
            "id": str(agent),
            "source": done.source,
            "target": done.target,
            "epoch": done.epoch,
            "freeze_s": round(done.freeze_s, 4),
            "total_s": round(done.total_s, 4),
            "rounds": done.rounds,
            "rows": done.rows,
            "loaded_rows": done.loaded,
            "bytes": done.n_bytes,
            "peer_bytes": done.peer_bytes,
        }

    @routes.get("/{agent_id:path}")
    async def agent(request: Request, agent_id: str) -> Any:
        agent = agent_by_id(tenant_of(request, context.config.http.api_keys), agent_id)
        return await ask(context.router.agent.remote(agent))

    @routes.delete("/{agent_id:path}")
    async def delete(request: Request, agent_id: str) -> dict[str, Any]:
        agent = agent_by_id(tenant_of(request, context.config.http.api_keys), agent_id)
        await ask(context.router.delete.remote(agent))
        return {"id": str(agent), "deleted": True}

    return routes
