"""POST /v1/chat/completions and GET /v1/models, as OpenAI's SDKs expect them.

A parameter this server cannot honour is refused by name, not ignored.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from actors.turn import SamplingParams, TurnRequest
from api.auth import agent_of, tenant_of
from api.context import Context
from api.errors import ApiError, api_error
from api.turns import Done, Event, Started, Text

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters


def _whole(text: str) -> str:
    """JSON can carry half a character (\\ud800); no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate is no text") from error
    return text


WholeText = Annotated[str, AfterValidator(_whole)]
StopString = Annotated[WholeText, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: WholeText


class ChatMessage(_Strict):
    """SDKs send back whole assistant messages, empty fields included."""

    role: Literal["system", "developer", "user", "assistant"]
    content: WholeText | list[TextPart]
    name: WholeText | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def to_template(self) -> dict[str, Any]:
        """As chat templates know it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class StreamOptions(_Strict):
    include_usage: bool = False


class ResponseFormat(_Strict):
    type: Literal["text"]


class ChatCompletionRequest(_Strict):
    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    session_id: str | None = None
    # Hints: they name nobody, and this version places by session only.
    user: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    # Accepted only where they ask for nothing.
    n: Literal[1] | None = 1
    presence_penalty: Literal[0] | None = 0
    frequency_penalty: Literal[0] | None = 0
    logprobs: Literal[False] | None = False
    response_format: ResponseFormat | None = None
    store: Literal[False] | None = False
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


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
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
    return TurnRequest(
        id=secrets.token_hex(12),
        agent=agent,
        messages=tuple(message.to_template() for message in body.messages),
        sampling=SamplingParams(
            max_tokens=body.max_completion_tokens or body.max_tokens,
            temperature=http.temperature if body.temperature is None else body.temperature,
            top_p=http.top_p if body.top_p is None else body.top_p,
            seed=seed,
            stop=body.stops,
        ),
        persist=persist,
    )


async def _chat(context: Context, request: Request, body: ChatCompletionRequest) -> Response:
    turn = _turn(context, request, body)
    events = context.turns.run(turn)
    started = await anext(events)
    assert isinstance(started, Started)
    reply = _Reply(context, turn.id, started)
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
    text, reason = "", "stop"
    async for event in events:
        if isinstance(event, Text):
            text += event.text
            reply.completion_tokens += event.n_tokens
        elif isinstance(event, Done):
            reason = event.reason
    return JSONResponse(reply.whole(text, reason), headers=headers)


class _EventStream(StreamingResponse):
    """Ends its turn when the client goes away, which may be between two events."""

    def __init__(
        self,
        content: AsyncGenerator[str, None],
        events: AsyncGenerator[Event, None],
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

    def __init__(self, context: Context, turn_id: str, started: Started) -> None:
        self._metrics = context.metrics
        self._started = started
        self._base = {
            "id": f"chatcmpl-{turn_id}",
            "created": int(time.time()),
            "model": context.model,
        }
        self.completion_tokens = 0

    def whole(self, text: str, reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self._base | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(),
        }

    async def stream(
        self, events: AsyncIterator[Event], *, include_usage: bool
    ) -> AsyncGenerator[str, None]:
        """Server-sent events; a failure after the first token ends the stream with an error."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for event in events:
                if isinstance(event, Text):
                    self.completion_tokens += event.n_tokens
                    if event.text:
                        yield self._chunk({"content": event.text})
                elif isinstance(event, Done):
                    yield self._chunk({}, event.reason)
        except Exception as error:
            yield _sse(api_error(error).body)
            return
        usage = self._usage()
        if include_usage:
            yield _sse(
                self._base | {"object": "chat.completion.chunk", "choices": [], "usage": usage}
            )
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _sse(self._base | {"object": "chat.completion.chunk", "choices": [choice]})

    def _usage(self) -> dict[str, Any]:
        prompt, cached = self._started.prompt_tokens, self._started.cached_tokens
        self._metrics.tokens.labels("cached").inc(cached)
        self._metrics.tokens.labels("prefilled").inc(prompt - cached)
        self._metrics.tokens.labels("completion").inc(self.completion_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.completion_tokens,
            "total_tokens": prompt + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
