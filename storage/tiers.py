"""Encoded rows in RAM, and below them the store.

The pool holds blocks and tail segments as tensors, by id, within a budget in bytes; the least
recently used leave first. Rows that are not in the store yet are pinned. Reading falls through to
the store, verifies, and brings the rows back. Called by actors.memory; thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from storage.cache_file import PAGE, load, save
from storage.card import BlockRef
from storage.codec import Codec, Tensors, check_tensors, tensor_bytes
from storage.errors import CorruptData
from storage.spec import ModelCacheSpec, Part
from storage.store import CacheStore

BLOCK_SCHEMA = "kvferry.block.v1"


@dataclass
class _Entry:
    tensors: Tensors
    size: int
    pins: int


class Tiers:
    """RAM over a store, for one spec and codec."""

    def __init__(
        self, store: CacheStore, spec: ModelCacheSpec, codec: Codec, pool_bytes: int
    ) -> None:
        self._store = store
        self._spec = spec
        self._codec = codec
        self.pool_bytes = pool_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used_bytes(self) -> int:
        return self._used

    def put(self, run_id: str, tensors: Tensors, *, pinned: bool) -> None:
        """Add rows to the pool, or pin the ones that are there."""
        with self._lock:
            entry = self._entries.get(run_id)
            if entry is None:
                entry = self._entries[run_id] = _Entry(tensors, tensor_bytes(tensors), 0)
                self._used += entry.size
            entry.pins += pinned
            self._entries.move_to_end(run_id)
            self._evict()

    def unpin(self, run_id: str) -> None:
        """The rows may be evicted: the store has them, or nobody can keep them."""
        with self._lock:
            entry = self._entries.get(run_id)
            if entry is not None:
                entry.pins = max(0, entry.pins - 1)
                self._evict()

    def _evict(self) -> None:
        for run_id in list(self._entries):
            if self._used <= self.pool_bytes:
                return
            if not self._entries[run_id].pins:
                self._used -= self._entries.pop(run_id).size

    def evict_all(self) -> None:
        """Drop everything that is not pinned."""
        with self._lock:
            for run_id in [i for i, entry in self._entries.items() if not entry.pins]:
                self._used -= self._entries.pop(run_id).size

    def size_of(self, run_id: str) -> int:
        """Bytes the rows take in RAM, 0 if they are not there."""
        entry = self._entries.get(run_id)
        return entry.size if entry else 0

    def resident(self, run_id: str) -> Tensors | None:
        """The rows, if they are in RAM."""
        with self._lock:
            entry = self._entries.get(run_id)
            if entry is None:
                return None
            self._entries.move_to_end(run_id)
            return entry.tensors

    def read(self, tenant: str, run_id: str, rows: int, ref: BlockRef | None) -> Tensors | None:
        """The rows from RAM or, verified, from the store; None when they are nowhere.

        Raises CorruptData for bytes that cannot be trusted, StoreUnavailable.
        """
        tensors = self.resident(run_id)
        if tensors is not None or ref is None:
            return tensors
        raw = self._store.get_block(tenant, ref, "full")
        if raw is None:
            return None
        path = self._store.block_path(tenant, ref, "full")
        tensors = unpack_block(raw, path, self._spec, self._codec, run_id, rows)
        self.put(run_id, tensors, pinned=False)
        return tensors

    def write(self, tenant: str, run_id: str, rows: int, tensors: Tensors) -> BlockRef:
        """Store the rows. Raises StoreUnavailable."""
        raw = pack_block(self._codec, run_id, rows, tensors)
        part = self._store.put_block(tenant, run_id, "full", raw)
        return BlockRef(id=run_id, rows=rows, parts={"full": part})


def pack_block(
    codec: Codec, run_id: str, rows: int, tensors: Tensors, part: Part = "full"
) -> bytes:
    """The file of one part of a block or segment; its data section starts on a page."""
    metadata = {
        "schema": BLOCK_SCHEMA,
        "id": run_id,
        "part": part,
        "rows": rows,
        "codec": codec.name,
    }
    return save(tensors, metadata, align=PAGE)


def unpack_block(
    raw: bytes,
    path: str,
    spec: ModelCacheSpec,
    codec: Codec,
    run_id: str,
    rows: int,
    part: Part = "full",
) -> Tensors:
    """Tensors of a file, checked against what was asked for. Raises CorruptData."""
    tensors, metadata = load(raw, path)
    expected = {
        "schema": BLOCK_SCHEMA,
        "id": run_id,
        "part": part,
        "rows": rows,
        "codec": codec.name,
    }
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise CorruptData(path, f"{name} is {metadata.get(name)!r}, not {value!r}")
    check_tensors(spec, codec, tensors, rows, path, part)
    return tensors
