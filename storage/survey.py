"""Every card of an agent's folder, with what is wrong with those that cannot be read.

For those who look at a whole store: collector, verify, usage. `latest` answers what counts; this
answers what is there, and tells a damaged card from one that only we cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from storage import cache_file
from storage.card import TENANT_PATTERN, CacheCard, parse_name
from storage.card_json import SCHEMA
from storage.errors import (
    CorruptData,
    Incompatible,
    Locked,
    StorageError,
    StoreUnavailable,
    Unsupported,
)
from storage.files import Entry
from storage.reader import CardReader, LoadedCard

AGENT_FOLDER = re.compile(r"[0-9a-f]{40}\Z")
_TRIES = 20


@dataclass(frozen=True)
class CardFile:
    """`loaded`, or the `error`: CorruptData if the file is proven to be damaged, anything else if
    somebody with other keys or another version may be able to read it."""

    path: str
    epoch: int
    generation: int
    size: int
    modified: float
    loaded: LoadedCard | None
    error: StorageError | None

    @property
    def card(self) -> CacheCard | None:
        return self.loaded.card if self.loaded else None

    @property
    def is_damaged(self) -> bool:
        return isinstance(self.error, CorruptData)


@dataclass(frozen=True)
class AgentFolder:
    """`cards` in order of epoch and generation, `others` the files that are no cards."""

    path: str
    cards: tuple[CardFile, ...]
    others: tuple[Entry, ...]

    @property
    def newest(self) -> CardFile | None:
        """The card that counts: of the greatest epoch, the last that is not damaged."""
        found = [c for c in self.cards if c.epoch == self.cards[-1].epoch and not c.is_damaged]
        return found[-1] if found else None


def tenants(store: CardReader) -> list[str]:
    """Every tenant with agents or blocks."""
    names = {n for kind in ("agents", "blocks") for n in store.files.names(store.files.path(kind))}
    return sorted(name for name in names if TENANT_PATTERN.match(name))


def agent_folders(store: CardReader, tenant: str) -> Iterator[AgentFolder]:
    """Raises StoreUnavailable."""
    root = store.files.path("agents", tenant)
    for name in store.files.names(root):
        if AGENT_FOLDER.match(name):
            yield survey(store, f"{root}/{name}")


def survey(store: CardReader, folder: str) -> AgentFolder:
    """All cards that are in the folder at one moment: when one vanishes while they are read, its
    successor may be missing from the list, so all of it is done again. Raises StoreUnavailable."""
    for _ in range(_TRIES):
        entries = store.files.entries(folder)
        cards = sorted((e for e in entries if parse_name(e.name)), key=lambda e: e.name)
        try:
            found = store.files.map(lambda entry: _read(store, folder, entry), cards)
        except FileNotFoundError:
            continue
        return AgentFolder(
            folder, tuple(found), tuple(e for e in entries if parse_name(e.name) is None)
        )
    raise StoreUnavailable(store.url, f"{folder}: its cards keep changing")


def _read(store: CardReader, folder: str, entry: Entry) -> CardFile:
    path = f"{folder}/{entry.name}"
    name = parse_name(entry.name)
    assert name is not None
    raw = store.files.read(path)
    loaded, error = None, None
    try:
        loaded = store.decode(raw, path)
    except CorruptData as fault:
        error = _judged(store, raw, path, fault)
    except (Incompatible, Locked, Unsupported) as fault:
        error = fault
    return CardFile(path, *name, entry.size, entry.modified, loaded, error)


def _judged(store: CardReader, raw: bytes, path: str, fault: CorruptData) -> StorageError:
    """The fault, if it proves damage: the checksum is one that we can check, and fails."""
    try:
        metadata = cache_file.load_metadata(store.open_card(raw, path), path)
    except CorruptData:
        return fault
    if metadata.get("schema") != SCHEMA:
        return Incompatible(path, [f"schema: {metadata.get('schema')} != {SCHEMA}"])
    seal = metadata.get("seal")
    kind = seal.get("kind") if isinstance(seal, dict) else None
    if store.signing_key is not None or kind == "hmac-sha256":
        return Locked(path, f"its seal does not hold under our key: {fault.reason}")
    return fault
