"""Where an ingress gets its turns' items from: one stream per replica that is at work for it.

The other end of actors.carrier. A turn that begins while a stream from its replica is open asks to
board it; a stream that has carried turns for long takes no more, so that each of them ends.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from actors.carrier import Key
from actors.turn import StreamItem, TurnRequest, is_last
from cluster.remote import ReplicaLost, call, stream

_BOARDING_S = 60.0  # after a stream was opened
_ATTEND_S = 3.0  # between two signs of life to the replica


class Streams:
    """For one event loop."""

    def __init__(self, item_timeout: float) -> None:
        """`item_timeout`: seconds of silence after which a replica counts as lost."""
        self._item_timeout = item_timeout
        self._open: dict[str, _Stream] = {}  # by the replica's incarnation

    async def run_turn(
        self, actor: Any, incarnation: str, request: TurnRequest, timeout: float
    ) -> AsyncGenerator[list[StreamItem], None]:
        """The turn's items as they come; `timeout` runs from list to list. Raises ReplicaLost, and
        what the replica raised. A turn whose reader stops early is cancelled."""
        key, ended = (request.id, request.attempt), False
        carrier = self._open.get(incarnation)
        try:
            if carrier is None or not await carrier.board(request, timeout):
                carrier = self._open[incarnation] = _Stream(actor, request, self._item_timeout)
                carrier.reader.add_done_callback(partial(self._forget, incarnation, carrier))
            while (items := await carrier.next(key, timeout)) is not None:
                ended = is_last(items)
                yield items
        finally:
            if carrier is not None:
                carrier.leave(key)
            if not ended:
                actor.cancel.remote(*key)

    def _forget(self, incarnation: str, carrier: _Stream, _: object) -> None:
        if self._open.get(incarnation) is carrier:
            del self._open[incarnation]


class _Stream:
    """One open stream, and the turns it brings items for."""

    def __init__(self, actor: Any, request: TurnRequest, item_timeout: float) -> None:
        self._actor, self._name = actor, secrets.token_hex(8)
        self._opened = time.monotonic()
        self._turns: dict[Key, asyncio.Queue[list[StreamItem] | Exception | None]] = {}
        self._enter(request)
        generator = actor.carry.options(num_returns="streaming").remote(self._name, request)
        self.reader = asyncio.create_task(self._read(generator, item_timeout))

    async def board(self, request: TurnRequest, timeout: float) -> bool:
        """Have the stream carry this turn, too; False if it is ending. Raises as `call`."""
        if self.reader.done() or time.monotonic() - self._opened > _BOARDING_S:
            return False
        key = self._enter(request)
        if await call(self._actor.board.remote(self._name, request), timeout):
            return True
        self.leave(key)
        return False

    async def next(self, key: Key, timeout: float) -> list[StreamItem] | None:
        """None: the turn's items have ended. Raises ReplicaLost, and what the replica raised."""
        try:
            async with asyncio.timeout(timeout):
                items = await self._turns[key].get()
        except TimeoutError as error:
            raise ReplicaLost(f"no sign of life in {timeout:g} s") from error
        if isinstance(items, Exception):
            raise items
        return items

    def leave(self, key: Key) -> None:
        """Nobody reads this turn's items any more."""
        self._turns.pop(key, None)

    def _enter(self, request: TurnRequest) -> Key:
        key = request.id, request.attempt
        self._turns[key] = asyncio.Queue()  # its turn's items bound it
        return key

    async def _read(self, generator: Any, item_timeout: float) -> None:
        end: Exception | None = None
        attended = time.monotonic()
        try:
            async for carried in stream(generator, item_timeout):
                if time.monotonic() - attended > _ATTEND_S:
                    attended = time.monotonic()
                    self._actor.attend.remote(self._name)
                for key, items in carried:
                    if key in self._turns:
                        self._turns[key].put_nowait(items)
        except Exception as error:  # all its turns are told
            end = error
        for queue in self._turns.values():
            queue.put_nowait(end)
