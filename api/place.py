"""Placement explained: POST /v1/place tries a decision, GET /v1/place/log tells the latest ones."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from actors.report import prefix_digest
from api.auth import affinity_of, agent_by_id, agent_of, tenant_of
from api.context import Context
from api.errors import api_error
from api.fields import countable
from api.request import ChatCompletionRequest
from api.turns import length, reply_tokens
from cluster.decisions import LOG_SIZE
from cluster.dispatch import Ask
from cluster.remote import call

_TIMEOUT_S = 10.0
_MAX_CHARS = 1 << 30


class PlaceRequest(BaseModel):
    """A turn in numbers: an agent's id, the characters of all its messages, the reply's length.
    `system`: the text of the system message among them, by which a prefix is known."""

    model_config = ConfigDict(extra="forbid")

    agent: str | None = Field(None, max_length=257, description="as GET /v1/agents lists it")
    n_chars: int = Field(0, ge=0, le=_MAX_CHARS)
    reply_tokens: int | None = Field(None, ge=1)
    system: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _countable(cls, body: Any) -> Any:
        return countable(body)


def router(context: Context) -> APIRouter:
    """The endpoints, on a context."""
    routes = APIRouter(prefix="/v1/place")

    async def ask(pending: Any) -> Any:
        try:
            return await call(pending, _TIMEOUT_S)
        except Exception as error:
            raise api_error(error) from error

    @routes.post("")
    async def place(
        request: Request,
        body: Annotated[ChatCompletionRequest | PlaceRequest, Body(union_mode="left_to_right")],
    ) -> Any:
        """Where a turn would run and why. Runs nothing, moves nothing."""
        tenant = tenant_of(request, context.config.http.api_keys)
        return await ask(context.router.explain.remote(_ask(request, tenant, body)))

    @routes.get("/log")
    async def log(
        request: Request, limit: Annotated[int, Query(ge=1, le=LOG_SIZE)] = 50
    ) -> dict[str, Any]:
        """The tenant's latest decisions, the newest first, with what came of them."""
        tenant = tenant_of(request, context.config.http.api_keys)
        data = await ask(context.router.decisions.remote(tenant, limit))
        return {"object": "list", "data": data}

    return routes


def _ask(request: Request, tenant: str, body: ChatCompletionRequest | PlaceRequest) -> Ask:
    affinity = affinity_of(request)
    if isinstance(body, PlaceRequest):
        if body.agent is not None:
            agent, persist = agent_by_id(tenant, body.agent), True
        else:
            agent, persist = agent_of(request, tenant, None)
        messages = [{"role": "system", "content": body.system}] if body.system else []
        return Ask(
            agent,
            max(body.n_chars, length(messages, None)),
            reply_tokens(body.reply_tokens),
            prefix=prefix_digest(tenant, messages),
            affinity=affinity,
            persist=persist,
        )
    agent, persist = agent_of(request, tenant, body.session_id)
    tools = body.tool_use()
    messages = [message.to_turn() for message in body.messages]
    return Ask(
        agent,
        length(messages, tools),
        reply_tokens(body.max_completion_tokens or body.max_tokens),
        prefix=prefix_digest(tenant, messages, tools),
        affinity=affinity,
        persist=persist,
    )
