"""A node's own disk, between the pool in RAM and the shared store.

    <folder>/blocks/…    as in a store: a cache within a budget; the least recently used leave first
    <folder>/agents/…    cards of agents whose newest rows the shared store lacks: a journal
    <folder>/written     bytes written today, against wear

A card is here only as long as it is ahead of the shared one; the blocks it names, and those that
were written for the next one, are pinned. Claims are never made here: who owns an agent is decided
in the shared store. Thread-safe.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

from storage.backends import is_temporary
from storage.card import AgentId, BlockRef, CacheCard, PartRef
from storage.errors import CorruptData, Fenced, StoreUnavailable
from storage.spec import CompatibilityKey, Part
from storage.store import CacheStore, LoadedCard
from storage.wear import Wear

logger = logging.getLogger(__name__)


class LocalTier:
    def __init__(
        self,
        store: CacheStore,
        key: CompatibilityKey,
        budget_bytes: int,
        daily_write_bytes: int = 0,
    ) -> None:
        """`store` is on file:// and this replica's alone. daily_write_bytes 0: no limit."""
        if not store.url.startswith("file://"):
            raise ValueError(f"local tier {store.url!r}: wants a directory of this machine")
        self.store, self.key = store, key
        self.budget_bytes, self._daily = budget_bytes, daily_write_bytes
        self._root = Path(store.files.root)
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # path -> bytes, oldest first
        self._pins: Counter[str] = Counter()
        self._carded: dict[str, set[str]] = {}  # agent's folder -> paths its card names
        self._fresh: dict[str, set[str]] = {}  # agent's folder -> paths written since
        self._newest: dict[str, tuple[int, int]] = {}  # agent's folder -> its card
        self.used_bytes = 0
        self.written_bytes = 0  # by this process
        self._same: dict[str, BlockRef] = {}  # path of a shared file -> the file that holds it here
        self._refused = ""  # why nothing is written at the moment
        self._wear = Wear(self._root / "written")
        self._index()

    # ---- start

    def _index(self) -> None:
        found, blocks = [], f"{self._root}/blocks/"
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = f"{folder}/{name}"
                with contextlib.suppress(FileNotFoundError):
                    if is_temporary(name):  # of a writer that was killed: the folder is ours alone
                        os.unlink(path)
                    elif name.endswith(".safetensors") and path.startswith(blocks):
                        stat = os.stat(path)
                        found.append((stat.st_mtime, path, stat.st_size))
        for _, path, size in sorted(found):
            self._sizes[path] = size
            self.used_bytes += size
        for card in self.cards():
            self._pin_card(card)
        with self._lock:
            self._evict(0)

    def cards(self) -> Iterator[CacheCard]:
        """Cards that were ahead of the shared store when they were written, one per agent."""
        for loaded in self.store.cards(self.store.tenants(), self.key):
            yield loaded.card

    # ---- blocks

    def put(self, agent: AgentId, run_id: str, part: Part, raw: bytes) -> PartRef | None:
        """Write a block for the agent's next card; it is pinned until then. None when there is no
        room or the day's bytes are spent. Raises StoreUnavailable."""
        with self._lock:
            if not self._may_write(len(raw)):
                return None
        ref = self.store.put_block(agent.tenant, run_id, part, raw)
        path = self._path(agent.tenant, run_id, ref, part)
        with self._lock:
            if not os.path.exists(path):  # one that we adopted, and that was evicted since
                return None
            self._add(path, ref.size)
            self._pin_fresh(agent, path)
        return ref

    def hold(self, agent: AgentId, run_id: str, part: str, ref: PartRef) -> PartRef | None:
        """Pin a block that is here for the agent's next card: the file that holds it, which may be
        another one where the store is encrypted. None if it is not here."""
        path = self._path(agent.tenant, run_id, ref, part)
        with self._lock:
            if path in self._same:
                ref = self._same[path].parts[part]
                path = self._path(agent.tenant, run_id, ref, part)
            if path not in self._sizes:
                return None
            self._pin_fresh(agent, path)
        return ref

    def _pin_fresh(self, agent: AgentId, path: str) -> None:
        fresh = self._fresh.setdefault(self.store.agent_folder(agent, self.key), set())
        if path not in fresh:
            fresh.add(path)
            self._pins[path] += 1

    def keep(self, tenant: str, ref: BlockRef, part: Part, raw: bytes) -> None:
        """Cache a block that came from the shared store, if there is room. Raises
        StoreUnavailable."""
        path = self.store.block_path(tenant, ref, part)
        with self._lock:
            if path in self._sizes or path in self._same:
                return
            if self._daily and self._wear.today() > self._daily / 2:
                return  # the rest of the day is for what only we have
            if not self._may_write(len(raw)):
                return
        stored = self.store.put_block(tenant, ref.id, part, raw)
        with self._lock:
            kept = self._path(tenant, ref.id, stored, part)
            if os.path.exists(kept):
                self._add(kept, stored.size)
                if kept != path:  # encrypted: our bytes are others
                    self._same[path] = BlockRef(ref.id, ref.rows, {part: stored})

    def has(self, tenant: str, ref: BlockRef, part: str) -> bool:
        path = self.store.block_path(tenant, ref, part)
        with self._lock:
            return path in self._sizes or path in self._same

    def get(self, tenant: str, ref: BlockRef, part: Part) -> bytes | None:
        """The verified bytes; None when they are not here. Raises CorruptData: the file is then
        forgotten here, so that a sound copy can take its place."""
        path = self.store.block_path(tenant, ref, part)
        with self._lock:
            if path in self._same:
                ref = self._same[path]
                path = self.store.block_path(tenant, ref, part)
            if path not in self._sizes:
                return None
            self._sizes.move_to_end(path)
        try:
            raw = self.store.get_block(tenant, ref, part)
        except CorruptData:
            self._forget_file(path)
            raise
        if raw is None:
            self._forget_file(path)
        return raw

    def _path(self, tenant: str, run_id: str, ref: PartRef, part: str) -> str:
        return self.store.block_path(tenant, BlockRef(run_id, 0, {part: ref}), part)

    def _add(self, path: str, size: int) -> None:
        if path not in self._sizes:
            self.used_bytes += size
            self.written_bytes += size
            self._wear.count(size)
        self._sizes[path] = size
        self._sizes.move_to_end(path)

    def _forget_file(self, path: str) -> None:
        with self._lock:
            self.used_bytes -= self._sizes.pop(path, 0)
        with contextlib.suppress(OSError):
            os.unlink(path)

    def _may_write(self, size: int) -> bool:
        """Make room for `size` bytes; says why not, once."""
        reason = ""
        if self._daily and self._wear.today() + size > self._daily:
            reason = f"the daily budget of {self._daily} bytes is spent"
        elif not self._evict(size):
            reason = f"{self.used_bytes} bytes wait for the shared store, all there is room for"
        if reason and not self._refused:
            logger.warning("local tier %s writes nothing: %s", self._root, reason)
        self._refused = reason
        return not reason

    def _evict(self, size: int) -> bool:
        if size > self.budget_bytes:
            return False
        victims, excess = [], self.used_bytes + size - self.budget_bytes
        for path, stored in self._sizes.items():
            if excess <= 0:
                break
            if path not in self._pins:
                victims.append(path)
                excess -= stored
        if excess > 0:  # what is pinned leaves no room: the cache need not go for nothing
            return False
        for path in victims:
            self.used_bytes -= self._sizes.pop(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        return self.used_bytes + size <= self.budget_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes that the shared store lacks."""
        with self._lock:
            return sum(self._sizes.get(path, 0) for path in self._pins)

    @property
    def writes(self) -> bool:
        """False while nothing more can be written here."""
        return not self._refused

    # ---- the journal

    def write_card(self, card: CacheCard) -> None:
        """The agent's newest card, ahead of the shared store's. Raises StoreUnavailable."""
        try:
            self.store.journal(card)
        except Fenced as error:  # no claim is at stake here
            raise StoreUnavailable(self.store.url, f"cannot write {card.name}") from error
        self._pin_card(card)

    def card(self, agent: AgentId) -> LoadedCard | None:
        return self.store.latest(agent, self.key)

    def drop_card(self, card: CacheCard) -> None:
        """The shared store has caught up with this card; a newer one stays."""
        folder = self.store.agent_folder(card.agent, card.key)
        with self._lock:
            if self._newest.get(folder, (0, 0)) > (card.epoch, card.generation):
                return
            self._newest.pop(folder, None)
            self._unpin(self._carded.pop(folder, set()))
            self.store.drop_cards(card.agent, card.key)

    def forget(self, agent: AgentId, epoch: int) -> None:
        """The agent's `epoch` is over: what is here of it is only a cache. A card of a newer epoch
        stays."""
        folder = self.store.agent_folder(agent, self.key)
        with self._lock:
            if self._newest.get(folder, (0, 0))[0] > epoch:
                return
            if folder not in self._newest and folder not in self._fresh:
                return
            self._unpin(self._carded.pop(folder, set()))
            self._unpin(self._fresh.pop(folder, set()))
            self._newest.pop(folder, None)
            self.store.drop_cards(agent, self.key)

    def _pin_card(self, card: CacheCard) -> None:
        folder = self.store.agent_folder(card.agent, card.key)
        refs = [ref for b in card.branches for ref in (*b.blocks, *b.tail)]
        tenant = card.agent.tenant
        named = {self.store.block_path(tenant, ref, part) for ref in refs for part in ref.parts}
        with self._lock:
            self._pins.update(named)
            self._unpin(self._carded.pop(folder, set()))
            self._unpin(self._fresh.pop(folder, set()))
            self._carded[folder] = named
            self._newest[folder] = (card.epoch, card.generation)

    def _unpin(self, paths: set[str]) -> None:
        for path in paths:
            self._pins[path] -= 1
            if self._pins[path] <= 0:
                del self._pins[path]
