"""Between the engine's thread and the event loop: a turn's items on their way out.

Passing every token on by itself costs more than computing the next one is worth on a small machine:
tokens wait for company, but never long, and the first one not at all. They leave at moments that
all turns of a replica share, so that who carries them on wakes up once for all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from actors.turn import Progress, StreamItem, Tokens, TurnRequest

_PROGRESS_S = 0.25  # of silence before how far a prefill is, is told
_UNSTREAMED_S = 0.25  # of tokens that nobody reads as they come


def interval(request: TurnRequest, running: int) -> float:
    """Seconds between two lists of a turn's tokens, with so many turns running: a lone stream moves
    ten times a second, several five times. A list costs the processes between the engine and the
    client 1 to 2 ms, on the engine's own cores."""
    if not request.streamed:
        return _UNSTREAMED_S
    return min(0.2, 0.1 * max(1, running))


class Outbox:
    """`put` from any thread, `take` on the event loop that made it. `pause()` is how many
    seconds tokens may wait for the next ones: until the next multiple of it. Asked once per list of
    items."""

    def __init__(self, pause: Callable[[], float]) -> None:
        self._pause = pause
        self._here = asyncio.get_running_loop()
        self._items: deque[StreamItem] = deque()
        self._ready = asyncio.Event()
        self._armed = False
        self._not_before = 0.0  # when tokens leave next, by the event loop's clock
        self._left = self._here.time()  # when items left last

    @property
    def silent_s(self) -> float:
        """Since items left."""
        return self._here.time() - self._left

    def put(self, item: StreamItem) -> None:
        if isinstance(item, Progress) and self.silent_s < _PROGRESS_S:
            return  # the next one says it anew
        self._items.append(item)
        if not isinstance(item, Tokens):
            self._here.call_soon_threadsafe(self._ready.set)
        elif not self._armed:
            self._armed = True
            self._here.call_soon_threadsafe(self._arm)

    def _arm(self) -> None:
        self._here.call_at(self._not_before, self._ready.set)

    async def take(self) -> list[StreamItem]:
        """The items that have come since, at least one."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            self._armed = False  # what is put from here on arms again
            items = [self._items.popleft() for _ in range(len(self._items))]
            if any(isinstance(item, Tokens) for item in items):
                pause = self._pause()
                self._not_before = (self._here.time() // pause + 1) * pause
            if items:
                self._left = self._here.time()
                return items
