"""Encoded rows in RAM, on the node's disk, and in the shared store.

    pool (RAM)  ->  local tier (this node's disk; optional)  ->  a peer's local tier, shared store

A block or segment has a `full` part and, for models with sliding windows, a `sliding` part, which
may hold only the last of its rows. Reading falls through, verifies, and brings the rows up; of the
store and the peer that had them before, the one that is reached faster is asked first. Writing goes
to the first tier that has a disk; the shared store is filled from there. Called by actors.rows;
thread-safe.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from storage.cache_file import PAGE, load, save
from storage.card import AgentId, BlockRef, PartRef
from storage.codec import Codec, Tensors, check_tensors, count_rows
from storage.errors import CorruptData, StorageError
from storage.links import Link, LinkRate, peer_link, probe_link
from storage.local import LocalTier
from storage.peers import BlockSource, Peers
from storage.pool import Pool
from storage.spec import ModelCacheSpec, Part
from storage.store import CacheStore

logger = logging.getLogger(__name__)
BLOCK_SCHEMA = "kvferry.block.v1"
_MAX_KEEPING = 8  # blocks on their way into the local tier


class Tiers:
    """For one spec and codec. Without a local tier, rows are written to the shared store."""

    def __init__(
        self,
        shared: CacheStore,
        spec: ModelCacheSpec,
        codec: Codec,
        pool_bytes: int,
        local: LocalTier | None = None,
    ) -> None:
        self.shared, self.local, self.pool = shared, local, Pool(pool_bytes)
        self.peers = Peers()
        self._spec, self._codec = spec, codec
        self.links = {"store": Link()} | ({"disk": Link()} if local is not None else {})
        self._keeper = ThreadPoolExecutor(1, "local-tier")
        self._keeping = threading.BoundedSemaphore(_MAX_KEEPING)

    def read(
        self,
        tenant: str,
        run_id: str,
        rows: int,
        part: Part,
        local: BlockRef | None,
        shared: BlockRef | None,
        peer: BlockSource | None = None,
    ) -> Tensors | None:
        """The rows from the nearest place that has them; None when they are nowhere.

        `rows`: of the run; a sliding part may hold fewer. `peer`: the node that had them before.
        Raises CorruptData for bytes that cannot be trusted when no other place has sound ones,
        StoreUnavailable.
        """
        tensors = self.pool.get((run_id, part))
        if tensors is not None:
            return tensors
        refs = [ref for ref in (local, shared) if ref is not None and part in ref.parts]
        failure: StorageError | None = None
        for ref in refs:
            try:
                found = self._bytes(tenant, ref, part, peer)
                if found is None:
                    continue
                raw, path = found
                tensors = unpack_block(raw, path, self._spec, self._codec, run_id, rows, part)
            except StorageError as error:
                failure = error
                continue
            self.pool.put((run_id, part), tensors, pinned=False)
            return tensors
        if failure is not None:
            raise failure
        return None

    def _bytes(
        self, tenant: str, ref: BlockRef, part: Part, peer: BlockSource | None
    ) -> tuple[bytes, str] | None:
        local = self.local
        if local is not None:
            try:
                raw = self.links["disk"].timed(lambda: local.get(tenant, ref, part))
            except StorageError as error:  # the shared store may have it
                self.shared.on_fault(error)
                raw = None
            if raw is not None:
                return raw, local.store.block_path(tenant, ref, part)
        found = self._away(tenant, ref, part, peer)
        if found is not None:
            self._keep(tenant, ref, part, found[0])
        return found

    def _away(
        self, tenant: str, ref: BlockRef, part: Part, peer: BlockSource | None
    ) -> tuple[bytes, str] | None:
        """From the shared store or the peer; the nearer one first, then the other."""
        ways = [self._from_store]
        if peer is not None:
            size = ref.parts[part].size
            nearer = self.peers.seconds(peer.node, size) <= self.links["store"].seconds(size)
            ways.insert(0 if nearer else 1, partial(self._from_peer, peer))
        failure: StorageError | None = None
        for way in ways:
            try:
                found = way(tenant, ref, part)
            except StorageError as error:
                failure = error
                continue
            if found is not None:
                if failure is not None:
                    self.shared.on_fault(failure)
                return found
        if failure is not None:
            raise failure
        return None

    def _from_store(self, tenant: str, ref: BlockRef, part: Part) -> tuple[bytes, str] | None:
        raw = self.links["store"].timed(lambda: self.shared.get_block(tenant, ref, part))
        return None if raw is None else (raw, self.shared.block_path(tenant, ref, part))

    def _from_peer(
        self, peer: BlockSource, tenant: str, ref: BlockRef, part: Part
    ) -> tuple[bytes, str] | None:
        """Raises CorruptData: the bytes are not what the card says. One that does not answer, or
        has nothing, is a miss."""
        stored = self.peers.get(peer, tenant, ref, part)
        if stored is None:
            return None
        path = f"{peer.node}: {self.shared.block_path(tenant, ref, part)}"
        raw = self.shared.blocks.opened(tenant, ref, part, stored, path)
        return raw, path

    def probe_links(self) -> None:
        """Measure every link once, with a file of its own. Raises StoreUnavailable."""
        stores = {"store": self.shared} | ({"disk": self.local.store} if self.local else {})
        for name, store in stores.items():
            probe_link(self.links[name], store.files)

    def link_rates(self) -> dict[str, LinkRate]:
        """Of the links that are measured."""
        rates = {name: rate for name, link in self.links.items() if (rate := link.rate)}
        return rates | {peer_link(node): rate for node, rate in self.peers.rates().items()}

    def _keep(self, tenant: str, ref: BlockRef, part: Part, raw: bytes) -> None:
        """Cache on the node's disk, behind the reader's back; skipped when the disk is slow."""
        local = self.local
        if local is None or not self._keeping.acquire(blocking=False):
            return

        def write() -> None:
            try:
                local.keep(tenant, ref, part, raw)
            except StorageError as error:
                logger.warning("not cached: %s", error)
            finally:
                self._keeping.release()

        self._keeper.submit(write)

    def write(self, agent: AgentId, run_id: str, part: Part, tensors: Tensors) -> PartRef | None:
        """Store rows in the first tier that has a disk. None when the local tier takes nothing at
        the moment. Raises StoreUnavailable."""
        raw = pack_block(self._codec, run_id, count_rows(tensors), tensors, part)
        if self.local is not None:
            return self.local.put(agent, run_id, part, raw)
        return self.shared.put_block(agent.tenant, run_id, part, raw)

    def upload(self, tenant: str, run_id: str, part: Part, local: BlockRef) -> PartRef | None:
        """Store rows of the local tier or the pool in the shared store; None when they are in
        neither. Raises StoreUnavailable, CorruptData."""
        raw = None
        if self.local is not None and part in local.parts:
            raw = self.local.get(tenant, local, part)
        if raw is None:
            tensors = self.pool.get((run_id, part))
            if tensors is None:
                return None
            raw = pack_block(self._codec, run_id, count_rows(tensors), tensors, part)
        return self.shared.put_block(tenant, run_id, part, raw)


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
    """Tensors of a file, checked against what was asked for. A sliding part holds the last of its
    run's rows, as many as its metadata say. Raises CorruptData."""
    tensors, metadata = load(raw, path)
    expected = {"schema": BLOCK_SCHEMA, "id": run_id, "part": part, "codec": codec.name}
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise CorruptData(path, f"{name} is {metadata.get(name)!r}, not {value!r}")
    found = metadata.get("rows")
    if type(found) is not int or (found != rows if part == "full" else not 0 < found <= rows):
        raise CorruptData(path, f"rows is {found!r}, not {rows}")
    check_tensors(spec, codec, tensors, found, path, part)
    return tensors
