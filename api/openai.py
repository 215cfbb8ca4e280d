"""POST /v1/chat/completions and GET /v1/models, as OpenAI's SDKs expect them."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from actors.turn import TokenLogprob, TurnRequest
from api.auth import affinity_of, agent_of, tenant_of
from api.context import Context
from api.errors import ApiError, api_error
from api.request import ChatCompletionRequest
from api.tool_stream import Said
from api.turns import Done, Event, Started, Text


def router(context: Context) -> APIRouter:
    """The endpoints, on a context."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        tenant_of(request, context.config.http.api_keys)
        return {"object": "list", "data": [_model(context)]}

    @routes.get("/v1/models/{model}")
    async def model(request: Request, model: str) -> dict[str, Any]:
        tenant_of(request, context.config.http.api_keys)
        _check_model(context, model)
        return _model(context)

    @routes.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatCompletionRequest) -> Response:
        try:
            response = await _chat(context, request, body)
        except Exception as error:
            failed = api_error(error)
            context.metrics.requests.labels(failed.status).inc()
            raise failed from error
        context.metrics.requests.labels(200).inc()
        return response

    return routes


def _model(context: Context) -> dict[str, Any]:
    return {
        "id": context.model,
        "object": "model",
        "created": context.started,
        "owned_by": "kvferry",
    }


def _check_model(context: Context, model: str | None) -> None:
    if model is not None and model != context.model:
        raise ApiError(
            404,
            f"model {model!r} does not exist; this server has {context.model!r}",
            param="model",
            code="model_not_found",
        )


def _turn(context: Context, request: Request, body: ChatCompletionRequest) -> TurnRequest:
    http = context.config.http
    tenant = tenant_of(request, http.api_keys)
    _check_model(context, body.model)
    agent, persist = agent_of(request, tenant, body.session_id)
    return TurnRequest(
        id=secrets.token_hex(12),
        agent=agent,
        messages=tuple(message.to_turn() for message in body.messages),
        sampling=body.sampling(http),
        persist=persist,
        priority=-(body.priority or 0),  # vLLM's lower ones go first
        tools=body.tool_use(),
        affinity=affinity_of(request),
        streamed=bool(body.stream),
    )


async def _chat(context: Context, request: Request, body: ChatCompletionRequest) -> Response:
    turn = _turn(context, request, body)
    events = context.turns.run(turn)
    [started] = await anext(events)
    assert isinstance(started, Started)
    reply = _Reply(context, turn, started)
    headers = {
        "x-kvferry-node": started.node,
        "x-kvferry-cache": started.cache,
        "x-kvferry-cached-tokens": str(started.cached_tokens),
        "x-kvferry-prefilled-tokens": str(started.prompt_tokens - started.cached_tokens),
        "x-kvferry-durable-tokens": str(started.durable_tokens),
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return _EventStream(
            reply.stream(events, include_usage=usage),
            events,
            headers=headers | {"cache-control": "no-cache"},
        )
    return JSONResponse(await reply.whole(events), headers=headers)


class _EventStream(StreamingResponse):
    """Ends its turn when the client goes away, which may be between two events."""

    def __init__(
        self,
        content: AsyncGenerator[str, None],
        events: AsyncGenerator[list[Event], None],
        headers: dict[str, str],
    ) -> None:
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._content, self._events = content, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._content.aclose()
            await self._events.aclose()


class _Reply:
    """The JSON of one reply, whole or in chunks."""

    def __init__(self, context: Context, turn: TurnRequest, started: Started) -> None:
        self._metrics = context.metrics
        self._started = started
        self._base = {
            "id": f"chatcmpl-{turn.id}",
            "created": int(time.time()),
            "model": context.model,
        }
        self._wants_logprobs = turn.sampling.logprobs is not None
        self._completion_tokens = 0
        self._said = Said(turn.id, started.call_format)

    async def whole(self, events: AsyncIterator[list[Event]]) -> dict[str, Any]:
        reason = "stop"
        logprobs: list[TokenLogprob] = []
        async for batch in events:
            for event in batch:
                if isinstance(event, Text):
                    self._said.push(event.text)
                    logprobs += event.logprobs
                    self._completion_tokens += event.n_tokens
                elif isinstance(event, Done):
                    self._said.finish()
                    reason = self._said.reason(event.reason)
        choice = {
            "index": 0,
            "message": self._said.message(),
            "logprobs": _logprobs(logprobs) if self._wants_logprobs else None,
            "finish_reason": reason,
        }
        return self._base | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
        }

    async def stream(
        self, events: AsyncIterator[list[Event]], *, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        """Server-sent events, those of one list written at once; a failure after the first token
        ends the stream with an error."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for batch in events:
                chunks = "".join(chunk for event in batch for chunk in self._chunks(event))
                if chunks:
                    yield chunks
        except Exception as error:
            yield _sse(api_error(error).body)
            return
        usage = self._usage()
        last = self._base | {"object": "chat.completion.chunk", "choices": [], "usage": usage}
        yield (_sse(last) if include_usage else "") + "data: [DONE]\n\n"

    def _chunks(self, event: Event) -> Iterator[str]:
        if isinstance(event, Text):
            self._completion_tokens += event.n_tokens
            told = event.logprobs  # with the first of its deltas, if there is one
            deltas = self._said.push(event.text)
            if told and not deltas:
                deltas = [{"content": ""}]
            for delta in deltas:
                yield self._chunk(delta, logprobs=told)
                told = ()
        elif isinstance(event, Done):
            for delta in self._said.finish():
                yield self._chunk(delta)
            yield self._chunk({}, self._said.reason(event.reason))

    def _chunk(
        self,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> str:
        told = _logprobs(logprobs) if logprobs else None
        choice = {"index": 0, "delta": delta, "logprobs": told, "finish_reason": reason}
        return _sse(self._base | {"object": "chat.completion.chunk", "choices": [choice]})

    def _usage(self) -> dict[str, Any]:
        prompt, cached = self._started.prompt_tokens, self._started.cached_tokens
        self._metrics.tokens.labels("cached").inc(cached)
        self._metrics.tokens.labels("prefilled").inc(prompt - cached)
        self._metrics.tokens.labels("completion").inc(self._completion_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Of every completion token, those behind a stop string included."""
    content = [
        _token(token.raw, token.logprob) | {"top_logprobs": [_token(*top) for top in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token(raw: bytes, logprob: float) -> dict[str, Any]:
    """`bytes` has what `token` may lack: a token need not be whole characters."""
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
