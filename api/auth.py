"""Who asks: API key -> tenant, request headers and body -> agent."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Mapping

from starlette.requests import Request

from actors.turn import Affinity
from api.errors import ApiError
from storage.card import AgentId

DEFAULT_TENANT = "default"
# What clients send already, in order of precedence; header names are case-insensitive.
SESSION_HEADERS = (
    "x-session-id",
    "session-id",
    "x-claude-code-session-id",
    "x-dynamo-session-id",
    "x-aibrix-session-key",
    "x-sgl-routing-key",
)
AGENT_HEADER = "x-agent-id"
AFFINITY_HEADER = "x-kvferry-affinity"
_ID = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:@+=-]{0,126}[A-Za-z0-9_:@+=-])?")


def tenant_of(request: Request, api_keys: Mapping[str, str]) -> str:
    """The tenant of the bearer token (or x-api-key). Raises ApiError 401."""
    if not api_keys:
        return DEFAULT_TENANT
    header = request.headers.get("authorization", "")
    given = header[7:] if header.lower().startswith("bearer ") else ""
    given = (given or request.headers.get("x-api-key", "")).strip()
    for key, tenant in api_keys.items():
        if hmac.compare_digest(key.encode(), given.encode()):
            return tenant
    raise ApiError(401, "missing or unknown API key", code="invalid_api_key")


def agent_of(request: Request, tenant: str, session_in_body: str | None) -> tuple[AgentId, bool]:
    """(agent, persist): named by the session id; without one, an agent of its own that is not kept.

    Raises ApiError 400 for an id that is malformed.
    """
    name = checked_id(request.headers.get(AGENT_HEADER), AGENT_HEADER) or ""
    for header in SESSION_HEADERS:
        session = checked_id(request.headers.get(header), header)
        if session:
            return AgentId(tenant, session, name), True
    if session_in_body is not None:
        session = checked_id(session_in_body, "session_id")
        if session:
            return AgentId(tenant, session, name), True
    return AgentId(tenant, f"one-off-{secrets.token_hex(12)}"), False


def affinity_of(request: Request) -> Affinity:
    """soft unless the request says hard. Raises ApiError 400."""
    value = request.headers.get(AFFINITY_HEADER, "soft").strip().lower()
    if value == "soft":
        return "soft"
    if value == "hard":
        return "hard"
    raise ApiError(400, f"{AFFINITY_HEADER} is soft or hard", param=AFFINITY_HEADER)


def checked_id(value: str | None, param: str) -> str | None:
    """The id itself, None when it was not given. Raises ApiError 400."""
    if value is None:
        return None
    if not _ID.fullmatch(value):
        raise ApiError(
            400,
            f"{param} must be 1 to 128 letters, digits or . _ : @ + = -, and begin with a letter "
            "or digit",
            param=param,
            code="invalid_session_id",
        )
    return value


def agent_by_id(tenant: str, agent_id: str) -> AgentId:
    """The agent of a path: `session`, or `session/name`. Raises ApiError 400."""
    session, slash, name = agent_id.partition("/")
    checked = checked_id(session, "agent")
    assert checked is not None
    return AgentId(tenant, checked, (checked_id(name, "agent") or "") if slash else "")
