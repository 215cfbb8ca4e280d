"""One turn from request to last token: place, stream, fail over. Used by every endpoint that talks.

The client's stream is one; behind it may be several attempts on several replicas. What the log does
not accept never reaches the client.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from actors.errors import AgentMoved, EngineFault, TurnTimeout
from actors.report import prefix_digest
from actors.turn import (
    Message,
    StreamItem,
    TokenLogprob,
    Tokens,
    ToolUse,
    TurnFailed,
    TurnFinished,
    TurnMoved,
    TurnRequest,
    TurnStarted,
)
from api.metrics import Metrics
from cluster.config import HttpConfig
from cluster.decisions import Decision, Outcome
from cluster.errors import NoReplica
from cluster.failover import TurnLog
from cluster.remote import ReplicaLost, call
from cluster.streams import Streams
from storage.errors import StorageError

logger = logging.getLogger(__name__)
_PLACE_TIMEOUT_S = 45.0
_ROUTER_S, _STREAM_ROUTER_S = 30.0, 300.0  # for a lost router to come back: new turns, streams
_ROUTER_PAUSE_S = 0.5
_MAX_LOSSES = 5
_REPLY_TOKENS = 128  # what placement reckons with, at most: most replies end before max_tokens
_MAX_MOVES = 50


@dataclass(frozen=True)
class Started:
    """First event of a turn."""

    node: str
    cache: str
    prompt_tokens: int
    cached_tokens: int
    durable_tokens: int  # of the agent's memory so far, in the shared store
    call_format: str  # of actors.tools, where the text may hold calls


@dataclass(frozen=True)
class Text:
    """Text the client may see now; `n_tokens` ids stand behind it (text may be empty), with their
    log probabilities where the turn asked for them."""

    text: str
    n_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Done:
    """Last event of a turn."""

    reason: Literal["stop", "length"]
    completion_tokens: int


Event = Started | Text | Done


class Turns:
    """Runs turns against the router and the replicas it names."""

    def __init__(self, router: Any, config: HttpConfig, metrics: Metrics) -> None:
        self._router, self._config, self._metrics = router, config, metrics
        self._streams = Streams(config.item_timeout_s)

    async def run(self, request: TurnRequest) -> AsyncGenerator[list[Event], None]:
        """Started by itself, then Text as it comes, then Done; what comes together in one list.

        Raises InvalidRequest, Overloaded, NoReplica, TurnTimeout, and what made the last of
        several attempts fail.
        """
        log, clock = TurnLog(request), _Clock()
        chars: list[int] = []
        try:
            async with aclosing(self._run(log, chars)) as events:
                async for batch in events:
                    for event in batch:
                        clock.note(event)
                    yield batch
        finally:
            if request.persist:
                n_chars = chars[0] if chars else None
                outcome = clock.outcome(length(request.messages, request.tools), log)
                self._router.ended.remote(request.agent, request.id, n_chars, outcome)

    async def _run(self, log: TurnLog, chars: list[int]) -> AsyncGenerator[list[Event], None]:
        """`chars` gets the length of the conversation when the turn was answered."""
        request = log.request
        began = time.monotonic()
        deadline = began + self._config.request_timeout_s
        avoid: set[str] = set()
        n_chars, spoke = length(request.messages, request.tools), False
        while True:
            decision = await self._place(log, frozenset(avoid), deadline)
            attempt = replace(log.next_request(), restore_tokens=decision.restore_tokens)
            try:
                async for batch in self._batches(log, decision, attempt, deadline):
                    for event in batch:
                        if isinstance(event, Text):
                            n_chars += len(event.text)
                            if event.n_tokens and not spoke:
                                spoke = True
                                self._metrics.first_token.observe(time.monotonic() - began)
                        elif isinstance(event, Done):
                            chars.append(n_chars)
                    yield batch
                    if isinstance(batch[-1], Done):
                        return
                raise ReplicaLost(f"the replica on {decision.node} ended the stream early")
            except AgentMoved as moved:
                log.moves += 1
                if log.moves > _MAX_MOVES:
                    raise NoReplica("the agent keeps moving") from moved
                await asyncio.sleep(0.02 * min(log.moves - 1, 10))
            except (ReplicaLost, EngineFault, StorageError) as error:
                log.failovers += 1
                self._metrics.failovers.inc()
                logger.warning("turn %s lost %s: %s", request.id, decision.node, error)
                if log.failovers > _MAX_LOSSES:
                    raise
                avoid.add(decision.incarnation)
                await self._suspect(decision, error)

    async def _place(self, log: TurnLog, avoid: frozenset[str], deadline: float) -> Decision:
        """A router that is lost is no lost replica: it has a deadline of its own, from the first
        answer that is lost. Raises NoReplica, TurnTimeout."""
        request, lost = log.request, math.inf
        n_chars = length(request.messages, request.tools)
        while True:
            wait = min(_PLACE_TIMEOUT_S, max(0.0, deadline - time.monotonic()))
            try:
                placed: Decision = await call(
                    self._router.place.remote(
                        request.agent,
                        n_chars,
                        reply_tokens(request.sampling.max_tokens),
                        turn_id=request.id,
                        persist=request.persist,
                        avoid=avoid,
                        prefix=prefix_digest(request.agent.tenant, request.messages, request.tools),
                        affinity=request.affinity,
                    ),
                    wait,
                )
                return placed
            except ReplicaLost as error:  # the router itself: Ray restarts it
                self._check(deadline)
                patience = _STREAM_ROUTER_S if log.started is not None else _ROUTER_S
                lost = min(lost, time.monotonic())
                if time.monotonic() - lost >= patience:
                    raise NoReplica(f"the router does not answer: {error}") from error
                await asyncio.sleep(_ROUTER_PAUSE_S)

    async def _batches(
        self, log: TurnLog, decision: Decision, attempt: TurnRequest, deadline: float
    ) -> AsyncIterator[list[Event]]:
        """What the log accepts of an attempt. Raises what ended it before the turn was done."""
        async for items in self._items(decision, attempt, deadline):
            events: list[Event] = []
            ended: Exception | None = None
            for item in items:
                if isinstance(item, TurnMoved):
                    ended = AgentMoved(f"agent {log.request.agent} moved")
                elif isinstance(item, TurnFailed):
                    ended = item.error
                else:
                    events += self._events(log, item)
            if events and isinstance(events[0], Started):
                yield events[:1]
                del events[:1]
            if events:
                yield events
            if ended is not None:
                raise ended

    async def _items(
        self, decision: Decision, attempt: TurnRequest, deadline: float
    ) -> AsyncIterator[list[StreamItem]]:
        wait = min(self._config.item_timeout_s, max(0.0, deadline - time.monotonic()))
        turn = self._streams.run_turn(decision.actor, decision.incarnation, attempt, wait)
        try:
            async with aclosing(turn) as lists:
                async for items in lists:
                    yield items
                    self._check(deadline)
        except ReplicaLost:
            self._check(deadline)  # silence until the turn's own deadline is no loss
            raise

    def _check(self, deadline: float) -> None:
        if time.monotonic() >= deadline:
            raise TurnTimeout(f"the turn took longer than {self._config.request_timeout_s:g} s")

    def _events(self, log: TurnLog, item: StreamItem) -> list[Event]:
        if isinstance(item, TurnStarted):
            if not log.accept_start(item):
                return []
            self._metrics.cache.labels(item.cache).inc()
            return [
                Started(
                    item.node,
                    item.cache,
                    len(item.prompt_ids),
                    item.cached_tokens,
                    item.durable_tokens,
                    item.call_format,
                )
            ]
        if isinstance(item, Tokens) and log.accept(item):
            return [Text(item.text, len(item.ids), item.logprobs)]
        if isinstance(item, TurnFinished) and item.reason != "cancelled" and log.accept(item):
            events: list[Event] = [Text(item.text, 0)] if item.text else []
            reason: Literal["stop", "length"] = "length" if item.reason == "length" else "stop"
            return [*events, Done(reason, len(log.ids))]
        return []

    async def _suspect(self, decision: Decision, error: Exception) -> None:
        if isinstance(error, ReplicaLost):
            try:
                await call(self._router.suspect.remote(decision.incarnation), 5.0)
            except ReplicaLost as lost:
                logger.warning("the router does not answer: %s", lost)


class _Clock:
    """What a turn took, as its events tell."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._started: Started | None = None
        self._first: float | None = None
        self._done: tuple[float, int] | None = None

    def note(self, event: Event) -> None:
        passed = time.monotonic() - self._began
        if isinstance(event, Started):
            self._started = event
        elif isinstance(event, Text) and event.n_tokens and self._first is None:
            self._first = passed
        elif isinstance(event, Done):
            self._done = passed, event.completion_tokens

    def outcome(self, n_chars: int, log: TurnLog) -> Outcome | None:
        """None of a turn without an answer, or without a token."""
        if self._started is None or self._first is None or self._done is None:
            return None
        prompt, cached = self._started.prompt_tokens, self._started.cached_tokens
        total_s, n_reply = self._done
        return Outcome(
            self._first, total_s, n_chars, prompt, cached, n_reply,
            log.failovers, log.again_tokens,
        )  # fmt: skip


def reply_tokens(max_tokens: int | None) -> int:
    """What placement reckons with."""
    return min(max_tokens or _REPLY_TOKENS, _REPLY_TOKENS)


def length(messages: Iterable[Message], tools: ToolUse | None) -> int:
    """Characters of all messages and tools."""
    n_chars = 0
    for message in messages:
        n_chars += len(message["content"])
        n_chars += sum(len(call["arguments"]) for call in message.get("tool_calls", ()))
    for tool in tools.tools if tools is not None else ():
        n_chars += len(tool.name) + len(tool.description or "") + len(tool.parameters)
    return n_chars
