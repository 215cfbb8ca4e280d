"""Encoded rows in RAM, within a budget in bytes; the least recently used leave first.

Rows that are not stored yet are pinned. Thread-safe; knows no store.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from storage.codec import Tensors, tensor_bytes
from storage.spec import Part

Key = tuple[str, Part]  # (id of a block or segment, part)


@dataclass
class _Entry:
    tensors: Tensors
    size: int
    pins: int


class Pool:
    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, key: Key, tensors: Tensors, *, pinned: bool) -> None:
        """Add rows, or pin the ones that are there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(tensors, tensor_bytes(tensors), 0)
                self.used_bytes += entry.size
            entry.pins += pinned
            self._entries.move_to_end(key)
            self._evict()

    def unpin(self, key: Key) -> None:
        """The rows may be evicted: they are stored, or nobody can keep them."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                entry.pins = max(0, entry.pins - 1)
                self._evict()

    def _evict(self) -> None:
        victims, excess = [], self.used_bytes - self.budget_bytes
        for key, entry in self._entries.items():
            if excess <= 0:
                break
            if not entry.pins:
                victims.append(key)
                excess -= entry.size
        for key in victims:
            self.used_bytes -= self._entries.pop(key).size

    def evict_all(self) -> None:
        """Drop everything that is not pinned."""
        with self._lock:
            for key in [i for i, entry in self._entries.items() if not entry.pins]:
                self.used_bytes -= self._entries.pop(key).size

    def drop(self, key: Key) -> None:
        """These rows are not wanted any more; pinned ones stay until they are stored."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and not entry.pins:
                self.used_bytes -= self._entries.pop(key).size

    def size_of(self, key: Key) -> int:
        """Bytes the rows take, 0 if they are not there."""
        entry = self._entries.get(key)
        return entry.size if entry else 0

    def get(self, key: Key) -> Tensors | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry.tensors
