"""Walk a store and check every byte in it: cards first, then blocks, one file in memory at a time.

| kind       | what                                                              | a problem |
|------------|-------------------------------------------------------------------|-----------|
| corrupt    | a card or block that fails its checksum, shape or format          | yes       |
| missing    | a block that an agent's newest card names and the store lacks     | yes       |
| unreadable | sound as far as can be said, but our keys or version do not do    | yes       |
| orphan     | a block that no card names; the collector's                       | no        |
| leftover   | a temporary file, or one that was set aside; the collector's      | no        |
| foreign    | a file that is not kvferry's, or not where it belongs             | no        |

The names of a tenant's blocks are held in RAM, about 250 bytes each. Nothing is locked: on a store
in use, what looks wrong is looked at again. Called by the command line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from storage.blocks import BLOCK_FOLDER, BLOCK_NAME, block_place, card_block_names
from storage.cache_file import sha256
from storage.crypto import unseal
from storage.errors import CorruptData, Locked, StorageError
from storage.files import Entry
from storage.store import CacheStore
from storage.survey import AGENT_FOLDER, AgentFolder, agent_folders, survey, tenants

Kind = Literal["corrupt", "missing", "unreadable", "orphan", "leftover", "foreign"]
PROBLEMS: tuple[Kind, ...] = ("corrupt", "missing", "unreadable")


@dataclass(frozen=True)
class Finding:
    kind: Kind
    path: str
    reason: str
    size: int = 0


@dataclass
class VerifyReport:
    cards: int = 0
    blocks: int = 0
    bytes: int = 0  # that were read
    counts: Counter[Kind] = field(default_factory=Counter)
    sizes: Counter[Kind] = field(default_factory=Counter)  # bytes
    findings: list[Finding] = field(default_factory=list)  # the first MAX_FINDINGS
    set_aside: int = 0

    @property
    def is_clean(self) -> bool:
        return not any(self.counts[kind] for kind in PROBLEMS)


MAX_FINDINGS = 1000


def verify(
    store: CacheStore,
    *,
    quarantine: bool = False,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> VerifyReport:
    """Check everything; `quarantine` sets corrupt files aside, so that nobody tries them again
    (but the claim of an agent's newest epoch, which still says that older epochs are over).
    `on_finding` is told of every one as it is found. Raises StoreUnavailable."""
    report = VerifyReport()
    for tenant in tenants(store):
        _Tenant(store, tenant, report, quarantine, on_finding).check()
    return report


class _Tenant:
    def __init__(
        self,
        store: CacheStore,
        tenant: str,
        report: VerifyReport,
        quarantine: bool,
        on_finding: Callable[[Finding], None],
    ) -> None:
        self._store, self._files, self._tenant = store, store.files, tenant
        self._report, self._quarantine, self._on_finding = report, quarantine, on_finding
        self._named: set[str] = set()  # by any readable card
        self._needed: dict[str, str] = {}  # by a newest card -> its folder
        self._partial = False  # some card could not be read: what it names is unknown

    def check(self) -> None:
        self._check_folders(self._files.path("agents", self._tenant), AGENT_FOLDER)
        for folder in agent_folders(self._store, self._tenant):
            self._check_cards(folder)
        root = self._files.path("blocks", self._tenant)
        for prefix in self._check_folders(root, BLOCK_FOLDER):
            for entry in self._files.entries(f"{root}/{prefix}"):
                self._check_block(f"{root}/{prefix}", entry)
        for name, path in sorted(self._needed.items()):
            self._check_missing(name, path)

    def _check_folders(self, root: str, pattern: re.Pattern[str]) -> list[str]:
        """The folders of a tenant; what else is there is foreign."""
        names = self._files.names(root)
        for name in names:
            if not pattern.match(name):
                self._found("foreign", f"{root}/{name}", "not of this place")
        return [name for name in names if pattern.match(name)]

    def _check_cards(self, folder: AgentFolder) -> None:
        for found in folder.cards:
            self._report.cards += 1
            self._report.bytes += found.size
            if found.card is not None:
                self._named |= card_block_names(found.card)
            elif found.is_damaged:
                # The claim of the newest epoch stays: it keeps the epochs before it from counting.
                claim = (found.epoch, found.generation) == (folder.cards[-1].epoch, 0)
                self._found("corrupt", found.path, _reason(found.error), found.size, keep=claim)
            else:
                self._partial = True
                self._found("unreadable", found.path, _reason(found.error), found.size)
        for entry in folder.others:
            self._found_other(folder.path, entry)
        newest = folder.newest
        if newest is not None and newest.card is not None:
            for name in card_block_names(newest.card):
                self._needed[name] = folder.path

    def _check_block(self, folder: str, entry: Entry) -> None:
        match = BLOCK_NAME.match(entry.name)
        path = f"{folder}/{entry.name}"
        if match is None or not folder.endswith(f"/{match[1][:3]}"):
            self._found_other(folder, entry)
            return
        try:
            raw = self._files.read(path)
        except FileNotFoundError:  # the collector was there
            return
        self._needed.pop(entry.name, None)
        self._report.blocks += 1
        self._report.bytes += len(raw)
        try:
            if sha256(raw) != match[3]:
                raise CorruptData(path, "sha256 does not match its name")
            place = block_place(self._tenant, match[1], match[2])
            unseal(self._store.cipher, self._tenant, place, raw, path)
        except CorruptData as error:
            self._found("corrupt", path, error.reason, len(raw))
        except Locked as error:
            self._found("unreadable", path, error.reason, len(raw))
        else:
            if entry.name not in self._named and not self._partial:
                self._found("orphan", path, "no card names it", len(raw))

    def _check_missing(self, name: str, folder: str) -> None:
        """Not in the walk: it came later, or its agent has moved on, or it is missing."""
        newest = survey(self._store, folder).newest
        if newest is None or newest.card is None or name not in card_block_names(newest.card):
            return
        path = self._files.path("blocks", self._tenant, name[:3])
        if name not in self._files.names(path):
            self._found("missing", f"{path}/{name}", f"named by {newest.path}")

    def _found_other(self, folder: str, entry: Entry) -> None:
        path = f"{folder}/{entry.name}"
        if entry.name.endswith((".tmp", ".corrupt")):
            self._found("leftover", path, "waits for the collector", entry.size)
        else:
            self._found("foreign", path, "not a file of this place", entry.size)

    def _found(
        self, kind: Kind, path: str, reason: str, size: int = 0, *, keep: bool = False
    ) -> None:
        finding = Finding(kind, path, reason, size)
        self._report.counts[kind] += 1
        self._report.sizes[kind] += size
        if len(self._report.findings) < MAX_FINDINGS:
            self._report.findings.append(finding)
        self._on_finding(finding)
        if kind == "corrupt" and self._quarantine and not keep:
            self._files.set_aside(path)
            self._report.set_aside += 1


def _reason(error: StorageError | None) -> str:
    return getattr(error, "reason", None) or str(error)
