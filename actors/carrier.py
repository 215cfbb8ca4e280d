"""One stream for the turns that run side by side, on their way from a replica to one ingress.

A list of tokens costs the two processes more than a millisecond of the engine's cores, whatever it
holds; turns pass theirs on at the same moments (actors.outbox), so one list can carry them all.
The first turn opens a stream, those that come while it is open board it, and it ends with the last.
Ray does not say that nobody reads a stream any more: who reads it attends it, or its turns end.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from actors.errors import ActorError
from actors.turn import StreamItem, TurnRequest
from storage.errors import StorageError

logger = logging.getLogger(__name__)
_ABANDONED_S = 15.0  # since its reader was heard of; a turn says something twice a second
_CANCELLED = 1024  # turns that are remembered, those cancelled last
Key = tuple[str, int]  # turn id, attempt
Carried = tuple[Key, list[StreamItem] | Exception | None]  # None: it ended; an exception: it broke
RunTurn = Callable[[TurnRequest], AsyncGenerator[list[StreamItem], None]]


class Carriers:
    """A replica's open streams, by the name that their ingress gave them. For its event loop."""

    def __init__(self, run_turn: RunTurn) -> None:
        """`run_turn`: an asynchronous generator; closed, it cancels its turn."""
        self._run_turn = run_turn
        self._open: dict[str, _Carrier] = {}
        self._cancelled: OrderedDict[tuple[str, int | None], None] = OrderedDict()

    async def carry(self, name: str, request: TurnRequest) -> AsyncGenerator[list[Carried], None]:
        """What this turn yields, and all that board. Closed, or not attended, it cancels them."""
        carrier = self._open[name] = _Carrier(self._run_turn, self._is_cancelled)
        carrier.board(request)
        try:
            while carried := await carrier.take():
                if time.monotonic() - carrier.attended > _ABANDONED_S:
                    logger.warning("nobody reads the stream of turn %s any more", request.id)
                    return
                yield carried
        finally:
            del self._open[name]
            carrier.close()

    def board(self, name: str, request: TurnRequest) -> bool:
        """Run a turn whose items leave on an open stream; False: there is none of that name."""
        carrier = self._open.get(name)
        if carrier is None:
            return False
        carrier.board(request)
        return True

    def attend(self, name: str) -> None:
        """Somebody still reads the stream."""
        if name in self._open:
            self._open[name].attended = time.monotonic()

    def cancel(self, turn_id: str, attempt: int | None) -> None:
        """A turn whose call comes later than this does not begin: calls overtake one another, and
        a process that stood still takes up many at once."""
        self._cancelled[turn_id, attempt] = None
        if len(self._cancelled) > _CANCELLED:
            self._cancelled.popitem(last=False)

    def _is_cancelled(self, key: Key) -> bool:
        return key in self._cancelled or (key[0], None) in self._cancelled


class _Carrier:
    def __init__(self, run_turn: RunTurn, is_cancelled: Callable[[Key], bool]) -> None:
        self._run_turn, self._is_cancelled = run_turn, is_cancelled
        self._running: set[asyncio.Task[None]] = set()
        self._waiting: list[Carried] = []
        self._ready = asyncio.Event()
        self.attended = time.monotonic()

    def board(self, request: TurnRequest) -> None:
        task = asyncio.create_task(self._run(request))
        self._running.add(task)
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._ready.set()

    async def _run(self, request: TurnRequest) -> None:
        key = request.id, request.attempt
        try:
            if not self._is_cancelled(key):
                async with aclosing(self._run_turn(request)) as lists:
                    async for items in lists:
                        self._put((key, items))
            self._put((key, None))
        except (ActorError, StorageError) as error:  # of this turn alone: its reader is told
            self._put((key, error))
        except Exception as error:
            logger.exception("turn %s broke", request.id)
            # This one can be sent, whatever it was.
            self._put((key, RuntimeError(f"{type(error).__name__}: {error}")))

    def _put(self, carried: Carried) -> None:
        self._waiting.append(carried)
        self._ready.set()

    async def take(self) -> list[Carried]:
        """What has come since, of all turns; empty when they have all ended."""
        while self._running and not self._waiting:
            await self._ready.wait()
            self._ready.clear()
        carried, self._waiting = self._waiting, []
        return carried

    def close(self) -> None:
        for task in self._running:
            task.cancel()
