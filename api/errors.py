"""Every failure as an OpenAI-shaped error, mapped once, here.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from actors.errors import AgentMoved, EngineFault, InvalidRequest, Overloaded, TurnTimeout
from cluster.errors import (
    AgentBusy,
    LastNode,
    MigrationFailed,
    NoReplica,
    UnknownAgent,
    UnknownNode,
)
from cluster.remote import ReplicaLost
from storage.errors import StorageError

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An HTTP error as the client sees it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(status, message, type, param, code, retry_after)
        self.status = status
        self.retry_after = retry_after
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


def api_error(error: Exception) -> ApiError:
    """The one table of what a failure means over HTTP."""
    text = str(error)
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, error.message, param=error.param, code=error.code)
        case Overloaded():
            return ApiError(
                429, text, type="rate_limit_error", code="overloaded",
                retry_after=error.retry_after,
            )  # fmt: skip
        case UnknownAgent():
            return ApiError(404, text, param="agent", code="agent_not_found")
        case UnknownNode():
            return ApiError(404, text, param="target", code="node_not_found")
        case LastNode():
            return ApiError(409, text, param="node", code="last_node")
        case AgentBusy():
            return ApiError(409, text, param="agent", code="agent_busy", retry_after=1)
        case NoReplica():
            return _unavailable(text, error.retry_after)
        case TurnTimeout():
            return ApiError(504, text, type="server_error", code="timeout")
        case MigrationFailed():
            return ApiError(502, text, type="server_error", code="migration_failed")
        case AgentMoved() | EngineFault() | ReplicaLost() | StorageError():
            return _unavailable(text, 2.0)
    logger.error("unexpected failure", exc_info=error)
    return ApiError(500, "internal error", type="server_error", code="internal_error")


def _unavailable(message: str, retry_after: float) -> ApiError:
    return ApiError(503, message, type="server_error", code="unavailable", retry_after=retry_after)


def install(app: FastAPI) -> None:
    """Make every error of the app OpenAI-shaped."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(_validation(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return respond(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(Exception)
    async def other(request: Request, error: Exception) -> JSONResponse:
        return respond(api_error(error))


def respond(error: ApiError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    return JSONResponse(error.body, error.status, headers)


def _validation(errors: Sequence[dict[str, Any]], body: Any) -> ApiError:
    """Pydantic's first complaint; names the field as the client wrote it. A field that may be of
    several kinds has one for each: the one that goes deepest is about the kind that was meant."""
    first, path = errors[0], _path(errors[0], body)
    for other in errors[1:]:
        deeper = _path(other, body)
        if len(deeper) > len(path) and deeper[: len(path)] == path:
            first, path = other, deeper
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}")
    if first["type"] == "mismatch":  # of fields that are each valid
        param = first["ctx"]["param"]
        return ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value")
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported", param=param, code="unsupported_parameter")
    return ApiError(400, f"{param or 'body'}: {first['msg']}", param=param, code="invalid_value")


def _path(error: dict[str, Any], body: Any) -> list[str]:
    """To the field that a complaint of pydantic's is about."""
    path: list[str] = []
    for step in error["loc"][1:]:  # the first is where it came from; some name a union's branch
        if not isinstance(body, dict) and not (isinstance(body, list) and isinstance(step, int)):
            continue
        lacks = error["type"] == "missing" and step is error["loc"][-1]
        if isinstance(body, dict) and step not in body and not lacks:
            continue
        path.append(str(step))
        body = body.get(step) if isinstance(body, dict) else body[step]
    return path
