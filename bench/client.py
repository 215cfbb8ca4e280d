"""A client of the running endpoint that watches the clock: one streamed turn, and what it cost.

Speaks HTTP only, as any OpenAI client would. TTFT runs from the POST to the first non-empty delta.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

Message = dict[str, str]
_TIMEOUT = httpx.Timeout(300.0, connect=10.0)


class EndpointError(Exception):
    """The endpoint cannot be reached, refused a request, or ended a stream with an error."""


@dataclass
class Reply:
    """One turn as the client saw it. `reason` is empty for a stream that broke off."""

    node: str
    cache: str
    cached_tokens: int
    prefilled_tokens: int
    ttft_s: float = 0.0
    text: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)  # of non-empty deltas, since the POST
    deltas: list[str] = field(default_factory=list)

    @property
    def longest_pause(self) -> tuple[int, float]:
        """(number of deltas before it, seconds); (0, 0.0) with fewer than two deltas."""
        gaps = [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]
        if not gaps:
            return 0, 0.0
        longest = max(range(len(gaps)), key=gaps.__getitem__)
        return longest + 1, gaps[longest]


class Endpoint:
    """Use as a context manager. All methods raise EndpointError."""

    def __init__(self, url: str, api_key: str = "") -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=_TIMEOUT)

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def again(self) -> Endpoint:
        """The same endpoint, with connections of its own: for another thread."""
        copy = Endpoint(self.url)
        copy._http.headers.update(self._http.headers)
        return copy

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer."""
        try:
            answer = self._http.request(method, path, json=body)
            if answer.status_code >= 400:
                raise EndpointError(_refusal(answer))
            return answer.json()
        except httpx.ConnectError as error:
            raise EndpointError(
                f"nothing answers at {self.url} ({error}): is it running? make serve starts it"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise EndpointError(f"{self.url}{path}: {error or type(error).__name__}") from error

    def chat(
        self,
        messages: list[Message],
        *,
        session: str | None,
        max_tokens: int,
        on_delta: Callable[[Reply], None] | None = None,
        **more: Any,
    ) -> Reply:
        """A greedy streamed turn; on_delta is called after every non-empty delta. `more`: further
        fields of the request."""
        headers = {"x-session-id": session} if session else {}
        body = {
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        path, began = "/v1/chat/completions", time.perf_counter()
        try:
            with self._http.stream("POST", path, json=body, headers=headers) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    raise EndpointError(_refusal(answer))
                reply = _reply_of(answer)
                for event in _events(answer):
                    if _take(reply, event, time.perf_counter() - began) and on_delta:
                        on_delta(reply)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise EndpointError(f"{self.url}: {error or type(error).__name__}") from error
        return reply


def _reply_of(answer: httpx.Response) -> Reply:
    headers = answer.headers
    return Reply(
        node=headers.get("x-kvferry-node", ""),
        cache=headers.get("x-kvferry-cache", ""),
        cached_tokens=int(headers.get("x-kvferry-cached-tokens", 0)),
        prefilled_tokens=int(headers.get("x-kvferry-prefilled-tokens", 0)),
    )


def _events(answer: httpx.Response) -> Iterator[Any]:
    for line in answer.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise EndpointError(f"the stream ended with an error: {event['error']['message']}")
            yield event


def _take(reply: Reply, event: Any, now: float) -> bool:
    """Add a chunk to the reply; True if it brought text."""
    if usage := event.get("usage"):
        reply.prompt_tokens = usage["prompt_tokens"]
        reply.completion_tokens = usage["completion_tokens"]
    for choice in event["choices"]:
        reply.reason = choice["finish_reason"] or reply.reason
        if text := choice["delta"].get("content"):
            reply.ttft_s = reply.ttft_s or now
            reply.text += text
            reply.deltas.append(text)
            reply.arrivals.append(now)
            return True
    return False


def _refusal(answer: httpx.Response) -> str:
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    return f"{answer.request.url}: {answer.status_code}: {message}"
