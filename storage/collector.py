"""The collector: deletes blocks that no card names, and what crashes and claims have left behind.

In two looks, which may be two runs. The first look reads every card of a tenant; blocks that none
names, and that are older than `grace_s`, are published as condemned. The second look, at least
`grace_s` after the publication, reads every card again: what is on the list and still unnamed is
deleted, and its name stays published as deleted for another `grace_s`. Times are the store's.

Why no interleaving deletes a block that a newest readable card names. The writers' side
(`blocks`, `store`) is: (1) put and adopt return no name that is on a list; (2) right before a card
is created, every name in it is held against the lists: what is condemned is stored anew under
another name; (3) so is the existence of every name that neither the agent's card before had nor
the writer put or adopted within WRITER_WINDOW_S. What a writer knows of the lists is at most
MAX_AGE_S old. Let block X be condemned at T, and deleted at D by a second look that began after
T + grace_s. Suppose a card K names X and is the newest readable one of its agent at or after D.

- K was held against the lists at k, and X was not on one: so k < T + MAX_AGE_S. K is visible at
  most one slow create later. As long as a create, the age of a list and the staleness of a listing
  together are shorter than grace_s, K was there before the second look began.
- K counts at or after D, so no later card took its place before, and K was in its folder during
  the whole second look. A look lists a folder and reads every card in it, of all epochs and
  generations, and begins again when one vanished meanwhile: it has read K, and spared X.
- X cannot have been deleted before K was created, either: a name that the card before K had was
  safe until then by the same argument; one that was put or adopted within the window was there
  then, and had it been condemned in between, it would still be on a list at k.

Without the second look, a block would go whose card was checked before the publication and became
visible after the first look. (2) and (3) overlap on purpose: (2) also covers what a claim inherits
from a card that is about to be removed, (3) a name so old that its list is retired. A create that
outlasts all this (a machine that sleeps between check and create) can leave a card that names a
deleted block: readers take that for a miss and prefill, and the next commit looks at every block
(CacheStore._wrote). A collector that wakes up late finds its lease gone; what it may still delete
is the one name it was about to, which is published and which no writer uses.

Anything but proven damage of a card (another version, another key, a store that does not answer)
makes its whole tenant be skipped, loudly. Called by the command line; one at a time (see `lease`).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from storage.blocks import (
    BLOCK_FOLDER,
    BLOCK_NAME,
    WRITER_WINDOW_S,
    block_folder,
    card_block_names,
)
from storage.condemned import CondemnedList
from storage.errors import Busy, CorruptData, StorageError
from storage.files import Entry
from storage.lease import LEASE_S, Lease
from storage.store import CacheStore
from storage.survey import AgentFolder, agent_folders, tenants

logger = logging.getLogger(__name__)

MIN_GRACE_S = 2 * WRITER_WINDOW_S
MAX_CONDEMNED = 50_000  # blocks of one tenant per run: writers keep the list in RAM
_DAY_S = 86400.0


@dataclass(frozen=True)
class CollectOptions:
    grace_s: float = 3600.0  # between condemning and deleting, and before a block is looked at
    corrupt_keep_s: float = 7 * _DAY_S  # of files that were set aside
    tombstone_keep_s: float = 30 * _DAY_S
    dry_run: bool = False  # look and count only
    wait: bool = False  # stay until what is condemned may be deleted

    def __post_init__(self) -> None:
        if self.grace_s < MIN_GRACE_S:
            raise ValueError(f"grace of {self.grace_s} s: writers need at least {MIN_GRACE_S:.0f}")


@dataclass
class CollectReport:
    """What was done; with `dry_run`, what would have been."""

    deleted: int = 0
    deleted_bytes: int = 0
    spared: int = 0  # condemned, but named again by the second look
    condemned: int = 0
    condemned_bytes: int = 0
    due_s: float = 0.0  # until everything that is condemned may be deleted
    leftovers: int = 0  # temporary files, and old ones that were set aside
    stale_cards: int = 0  # of older epochs
    tombstones: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # tenant -> why


def collect(
    store: CacheStore,
    options: CollectOptions | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> CollectReport:
    """One run over the whole store. Raises Busy when another collector is at work, also when it
    took over meanwhile; StoreUnavailable before anything was looked at."""
    options = options or CollectOptions()
    lease = None if options.dry_run else Lease(store.files, clock)
    report = CollectReport()
    collector = _Collector(store, options, lease, report)
    try:
        collector.run()
        if options.wait and lease is not None and report.due_s:
            until = store.files.now() + report.due_s
            while (left := until - store.files.now()) > 0:
                sleep(min(left, LEASE_S / 4))
                lease.hold()
            report.due_s, report.skipped = 0.0, {}
            collector.run(condemn=False)
    finally:
        if lease is not None:
            lease.release()
    return report


class _Collector:
    def __init__(
        self, store: CacheStore, options: CollectOptions, lease: Lease | None, report: CollectReport
    ) -> None:
        self._store, self._files = store, store.files
        self._options, self._lease, self._report = options, lease, report

    def run(self, *, condemn: bool = True) -> None:
        """`condemn`: False deletes what is due and condemns nothing more."""
        self._leftovers(self._files.path("probe"), self._files.now(), r".*")
        for tenant in sorted({*tenants(self._store), *self._store.condemned.tenants()}):
            try:
                self._collect(tenant, condemn)
            except Busy:
                raise
            except StorageError as error:
                logger.warning("nothing more is collected of tenant %s: %s", tenant, error)
                self._report.skipped[tenant] = str(error)

    def _collect(self, tenant: str, condemn: bool) -> None:
        self._hold()
        lists = self._lists(tenant)
        began = self._files.now()
        named = self._look(tenant, began)
        waiting = False
        for found in lists:
            due = found.published + self._options.grace_s - began
            if due <= 0:
                self._sweep(tenant, found, named)
            elif found.kind == "condemned":
                waiting = True
                self._report.due_s = max(self._report.due_s, due)
        listed = {name for found in lists for name in found.names}
        candidates = self._walk_blocks(tenant, began, named | listed)
        if condemn and candidates and not waiting:
            self._condemn(tenant, candidates)
        self._leftovers(self._files.path("gc", "condemned", tenant), began)

    # ---- the two looks

    def _lists(self, tenant: str) -> list[CondemnedList]:
        """The published lists; nothing is deleted on the word of a damaged one."""
        while True:
            try:
                return self._store.condemned.lists(tenant)
            except CorruptData as error:
                if self._options.dry_run:
                    raise
                logger.warning("%s; set aside", error)
                self._hold()
                self._files.set_aside(error.path)

    def _look(self, tenant: str, began: float) -> set[str]:
        """The names of all blocks that a card names. Raises StorageError for a card that somebody
        else may be able to read."""
        named: set[str] = set()
        for folder in agent_folders(self._store, tenant):
            self._hold()
            for found in folder.cards:
                if found.card is not None:
                    named |= card_block_names(found.card)
                elif found.error is not None and not found.is_damaged:
                    raise found.error
            self._tidy(folder, began)
        return named

    def _sweep(self, tenant: str, found: CondemnedList, named: set[str]) -> None:
        """Delete what is on a list that is due; a list of deleted names is retired."""
        gone = {}
        for name, size in found.names.items() if found.kind == "condemned" else ():
            match = BLOCK_NAME.match(name)
            if match is None or name in named:
                self._report.spared += 1
                continue
            folder = block_folder(self._files, tenant, match[1])
            self._remove(f"{folder}/{name}")
            self._report.deleted += 1
            self._report.deleted_bytes += size
            gone[name] = size
        if self._options.dry_run:
            return
        if gone:
            self._hold()
            self._store.condemned.publish(tenant, "deleted", gone)
        self._store.condemned.retire(found)

    def _walk_blocks(self, tenant: str, began: float, known: set[str]) -> dict[str, int]:
        """Blocks that may be condemned, with their sizes."""
        candidates: dict[str, int] = {}
        root = self._files.path("blocks", tenant)
        for prefix in filter(BLOCK_FOLDER.match, self._files.names(root)):
            self._hold()
            for entry in self._leftovers(f"{root}/{prefix}", began):
                if len(candidates) == MAX_CONDEMNED:
                    return candidates
                old = entry.modified < began - self._options.grace_s
                if old and BLOCK_NAME.match(entry.name) and entry.name not in known:
                    candidates[entry.name] = entry.size
        return candidates

    def _condemn(self, tenant: str, candidates: dict[str, int]) -> None:
        self._report.condemned += len(candidates)
        self._report.condemned_bytes += sum(candidates.values())
        if not self._options.dry_run:
            self._hold()
            self._store.condemned.publish(tenant, "condemned", candidates)
            self._report.due_s = max(self._report.due_s, self._options.grace_s)

    # ---- what else is left behind

    def _tidy(self, folder: AgentFolder, began: float) -> None:
        """Remove cards of epochs that are over, and a tombstone that has outlived all writers."""
        self._remove_leftovers(folder.path, folder.others, began)
        newest = folder.newest
        if newest is None or newest.card is None:
            return
        older = [found for found in folder.cards if found.epoch < newest.epoch]
        claimed = min(found.modified for found in folder.cards if found.epoch == newest.epoch)
        if older and claimed < began - self._options.grace_s:
            self._report.stale_cards += len(older)
            for found in older:
                self._remove(found.path)
        buried = newest.card.tombstone and newest.modified < began - self._options.tombstone_keep_s
        if buried and not older:
            self._report.tombstones += 1
            for found in folder.cards:
                self._remove(found.path)

    def _leftovers(self, folder: str, began: float, pattern: str = r".*\.tmp\Z") -> list[Entry]:
        """Remove old leftovers of a folder; the other files."""
        return self._remove_leftovers(folder, self._files.entries(folder), began, pattern)

    def _remove_leftovers(
        self, folder: str, entries: Sequence[Entry], began: float, pattern: str = r".*\.tmp\Z"
    ) -> list[Entry]:
        kept = []
        for entry in entries:
            age = began - entry.modified
            abandoned = re.match(pattern, entry.name) and age > self._options.grace_s
            set_aside = entry.name.endswith(".corrupt") and age > self._options.corrupt_keep_s
            if abandoned or set_aside:
                self._report.leftovers += 1
                self._remove(f"{folder}/{entry.name}")
            else:
                kept.append(entry)
        return kept

    def _remove(self, path: str) -> None:
        if not self._options.dry_run:
            self._hold()
            self._files.remove(path)

    def _hold(self) -> None:
        if self._lease is not None:
            self._lease.hold()
