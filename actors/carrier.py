"""One stream for the turns that run side by side, on their way from a replica to one ingress.

A stream of its own for every turn costs the two processes 2 ms of the engine's cores for each list
of tokens; turns pass theirs on at the same moments (actors.outbox), so one list can carry them all.
The first turn opens a stream, those that come while it is open board it, and it ends with the last.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from actors.turn import StreamItem, TurnRequest

Key = tuple[str, int]  # turn id, attempt
Carried = tuple[Key, list[StreamItem] | Exception | None]  # None: it ended; an exception: it broke
RunTurn = Callable[[TurnRequest], AsyncGenerator[list[StreamItem], None]]


class Carriers:
    """A replica's open streams, by the name that their ingress gave them. For its event loop."""

    def __init__(self, run_turn: RunTurn) -> None:
        """`run_turn`: an asynchronous generator; closed, it cancels its turn."""
        self._run_turn = run_turn
        self._open: dict[str, _Carrier] = {}

    async def carry(self, name: str, request: TurnRequest) -> AsyncGenerator[list[Carried], None]:
        """What this turn yields, and all that board. When the caller goes away, they are
        cancelled."""
        carrier = self._open[name] = _Carrier(self._run_turn)
        carrier.board(request)
        try:
            while carried := await carrier.take():
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


class _Carrier:
    def __init__(self, run_turn: RunTurn) -> None:
        self._run_turn = run_turn
        self._running: set[asyncio.Task[None]] = set()
        self._waiting: list[Carried] = []
        self._ready = asyncio.Event()

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
            async with aclosing(self._run_turn(request)) as lists:
                async for items in lists:
                    self._put((key, items))
            self._put((key, None))
        except Exception as error:  # of this turn alone: whoever reads it is told
            self._put((key, error))

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
