"""The published lists of blocks that a collector is about to delete, or has deleted.

    <url>/gc/condemned/<tenant>/<random>.json

A list is written once: `{"kind", "names": {file name: bytes}, "schema", "sha256"}`, canonical JSON.
Writers must not adopt or name what is on a list (see `collector` for why that is enough); kind
"deleted" says that the files are gone and their names not free yet. The time of publication is the
file's, by the store's clock. Read by `blocks` and `store`, written by `collector`.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from storage.cache_file import sha256
from storage.errors import CorruptData, StoreUnavailable
from storage.files import Entry, Files
from storage.spec import canonical_json

SCHEMA = "kvferry.condemned.v1"
MAX_AGE_S = 5.0  # of what a writer knows
_TRIES = 10

Kind = Literal["condemned", "deleted"]


@dataclass(frozen=True)
class CondemnedList:
    path: str
    kind: Kind
    names: Mapping[str, int]  # file name -> bytes
    published: float  # unix seconds by the store's clock


class Condemned:
    """The lists of one store; safe to use from several threads."""

    def __init__(self, files: Files, clock: Callable[[], float]) -> None:
        self._files = files
        self._clock = clock
        self._known: dict[str, tuple[float, frozenset[str]]] = {}
        self._lists: dict[str, CondemnedList] = {}
        self._lock = threading.Lock()

    def names(self, tenant: str) -> frozenset[str]:
        """Every condemned or deleted file name, as of at most MAX_AGE_S ago.

        Raises StoreUnavailable, also for a list that cannot be read: without it nothing may be
        adopted.
        """
        started = self._clock()
        with self._lock:
            looked, names = self._known.get(tenant, (float("-inf"), frozenset()))
        if started - looked <= MAX_AGE_S:
            return names
        try:
            lists = self.lists(tenant)
        except CorruptData as error:
            raise StoreUnavailable(self._files.url, f"list of condemned blocks: {error}") from error
        names = frozenset(name for one in lists for name in one.names)
        with self._lock:
            self._known[tenant] = (started, names)
            for path in self._lists.keys() - {one.path for one in lists}:
                if path.startswith(f"{self._folder(tenant)}/"):
                    del self._lists[path]
        return names

    def lists(self, tenant: str) -> list[CondemnedList]:
        """Every list as it is now. Raises CorruptData, StoreUnavailable."""
        for _ in range(_TRIES):
            entries = [e for e in self._files.entries(self._folder(tenant)) if _is_list(e)]
            try:
                return [self._read(f"{self._folder(tenant)}/{e.name}", e.modified) for e in entries]
            except FileNotFoundError:  # its successor was published before it was retired
                continue
        raise StoreUnavailable(self._files.url, "the list of condemned blocks keeps changing")

    def _read(self, path: str, published: float) -> CondemnedList:
        known = self._lists.get(path)
        if known is not None:
            return known
        found = self._lists[path] = _decode(self._files.read(path), path, published)
        return found

    def publish(self, tenant: str, kind: Kind, names: Mapping[str, int]) -> None:
        """Raises StoreUnavailable; then the list may be there or not."""
        content = {"schema": SCHEMA, "kind": kind, "names": dict(names)}
        content["sha256"] = sha256(canonical_json(content))
        path = f"{self._folder(tenant)}/{secrets.token_hex(8)}.json"
        with self._files.translated():
            self._files.create(path, canonical_json(content))

    def retire(self, found: CondemnedList) -> None:
        self._files.remove(found.path)

    def tenants(self) -> list[str]:
        return self._files.names(self._files.path("gc", "condemned"))

    def _folder(self, tenant: str) -> str:
        return self._files.path("gc", "condemned", tenant)


def _is_list(entry: Entry) -> bool:
    return entry.name.endswith(".json")


def _decode(raw: bytes, path: str, published: float) -> CondemnedList:
    try:
        content = json.loads(raw)
        seal = content.pop("sha256")
        sound = content["schema"] == SCHEMA and seal == sha256(canonical_json(content))
        kind, names = content["kind"], content["names"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptData(path, f"no list of condemned blocks ({error!r})") from error
    if not sound or kind not in ("condemned", "deleted") or not isinstance(names, dict):
        raise CorruptData(path, "no list of condemned blocks of this version")
    return CondemnedList(path, kind, names, published)
