"""The newest card of each agent that one store object has written itself."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

MAX_CARDS = 4096  # agents that are remembered


class Written(NamedTuple):
    epoch: int
    generation: int
    named: frozenset[str]  # files of the blocks it names


class WrittenCards:
    """By the agents' folders; the one written longest ago is forgotten first. Thread-safe."""

    def __init__(self) -> None:
        self._cards: OrderedDict[str, Written] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, folder: str) -> Written | None:
        with self._lock:
            return self._cards.get(folder)

    def note(self, folder: str, card: Written | None) -> None:
        """None: what was written is in doubt."""
        with self._lock:
            self._cards.pop(folder, None)
            if card is not None:
                self._cards[folder] = card
            if len(self._cards) > MAX_CARDS:
                self._cards.popitem(last=False)
