"""Agents of which the shared store lacks something that their last commit should have stored,
and when to try again: after a pause, ever longer, and as soon as an outage is over.

Without a local tier only; with one, that is the replicator's business. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from actors.branches import AgentMemory

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class Unsaved:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._memories: dict[AgentMemory, None] = {}  # in the order of their failures
        self._round: list[AgentMemory] = []  # of those that are due, the ones not handed out yet
        self._pause_s, self._due = _FIRST_PAUSE_S, 0.0

    def __len__(self) -> int:
        return len(self._memories)

    def __contains__(self, memory: AgentMemory) -> bool:
        return memory in self._memories

    def all(self) -> list[AgentMemory]:
        with self._lock:
            return list(self._memories)

    def add(self, memory: AgentMemory) -> None:
        with self._lock:
            if not self._memories:
                self._pause_s, self._round = _FIRST_PAUSE_S, []
                self._due = self._clock() + self._pause_s
            self._memories[memory] = None

    def discard(self, memory: AgentMemory) -> None:
        with self._lock:
            self._memories.pop(memory, None)

    def soon(self) -> None:
        """The next try of all is due, and the pauses begin anew."""
        with self._lock:
            self._pause_s, self._due, self._round = _FIRST_PAUSE_S, 0.0, []

    def due(self, most: int) -> list[AgentMemory]:
        """The next of those to be tried now; they stay until they are stored. The pause begins when
        all have been handed out."""
        now = self._clock()
        if most <= 0 or not self._memories:
            return []
        with self._lock:
            if not self._round and now >= self._due:
                self._round = list(self._memories)
            if not self._round:
                return []
            taken, self._round = self._round[:most], self._round[most:]
            if not self._round:
                self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s)
                self._due = now + self._pause_s
            return [memory for memory in taken if memory in self._memories]
