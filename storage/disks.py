"""A store on the disks of the cluster itself: no shared store is needed.

    the head's disk      cards, claims, everything but blocks: one place, with exclusive creates
    every node's disk    block files: each on the disk of the node that wrote it and on those of
                         its buddies, `replicas` in all

A buddy is the first of the other living nodes in an order that the file's name decides, so that
the blocks of a node that leaves are spread over all others. Readers ask their own disk, then the
others in that order. A file's name says what its bytes are: a copy that is not that is passed over
for one that is. Knows disks by the calls of `Disk`; cluster.disks has them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

from storage.backends import Entry, LocalBackend
from storage.blocks import BLOCK_NAME
from storage.buddies import ranked
from storage.cache_file import sha256

logger = logging.getLogger(__name__)
T = TypeVar("T")
ROOT = "cluster"
_SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,255}\Z")
PAUSE_S = 10.0  # a node that did not answer is not asked so long


class Disk(Protocol):
    """One folder of one machine. Paths are relative to it. Every call ends at a deadline; raises
    FileNotFoundError, FileExistsError, and other OSErrors where nobody answers."""

    def names(self, folder: str) -> list[str]: ...

    def entries(self, folder: str) -> list[tuple[str, int, float]]:
        """(name, bytes, seconds since it was written) of files."""

    def read(self, path: str, start: int, stop: int | None) -> bytes: ...

    def create(self, path: str, raw: bytes) -> None: ...

    def rename(self, path: str, target: str) -> None: ...

    def remove(self, path: str) -> None: ...

    def clock(self) -> float:
        """Unix seconds."""


class FolderDisk:
    """A folder of this machine, as a Disk."""

    def __init__(self, folder: str) -> None:
        self._backend = LocalBackend(f"file://{folder}")

    def names(self, folder: str) -> list[str]:
        return self._backend.names(self._path(folder))

    def entries(self, folder: str) -> list[tuple[str, int, float]]:
        found, now = self._backend.entries(self._path(folder)), time.time()
        return [(entry.name, entry.size, now - entry.modified) for entry in found]

    def read(self, path: str, start: int = 0, stop: int | None = None) -> bytes:
        return self._backend.read(self._path(path), start, stop)

    def create(self, path: str, raw: bytes) -> None:
        self._backend.create(self._path(path), raw)

    def rename(self, path: str, target: str) -> None:
        self._backend.rename(self._path(path), self._path(target))

    def remove(self, path: str) -> None:
        self._backend.remove(self._path(path))

    def clock(self) -> float:
        return time.time()

    def keep(self, path: str, raw: bytes) -> bool:
        """Write a copy of a block's file; False: the bytes are not what its name says."""
        if not _sound(path, raw):
            return False
        with contextlib.suppress(FileExistsError):
            self.create(path, raw)
        return True

    def blocks(self) -> dict[str, int]:
        """Every block file here: path -> bytes."""
        found = {}
        root = self._path("blocks")
        for folder, _, names in os.walk(root):
            for name in names:
                path = f"{folder}/{name}"
                with contextlib.suppress(FileNotFoundError):
                    if BLOCK_NAME.match(name):
                        found["blocks" + path.removeprefix(root)] = os.stat(path).st_size
        return found

    def _path(self, path: str) -> str:
        """Raises ValueError for one that leads out of the folder."""
        if path and not all(_SEGMENT.match(part) and part != ".." for part in path.split("/")):
            raise ValueError(f"no path below this folder: {path!r}")
        return f"{self._backend.root}/{path}".rstrip("/")


class Disks(Protocol):
    """Who is there now. May raise OSError where that cannot be said."""

    def head(self) -> Disk: ...

    def own(self) -> tuple[str, Disk] | None:
        """This process's node, if it has a disk, reached without anybody's help."""

    def living(self) -> Mapping[str, Disk]:
        """By node, the own one among them."""


class DisksBackend:
    """A storage.backends.Backend over the disks of a cluster."""

    inline = False
    transient: tuple[type[Exception], ...] = ()
    fs: Any = None

    def __init__(
        self, disks: Disks, replicas: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.root = ROOT
        self._disks, self._replicas, self._clock = disks, replicas, clock
        self._silent_until: dict[str, float] = {}
        self._lock = threading.Lock()

    # ---- files

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        path = _relative(path)
        if not _is_block(path):
            return self._disks.head().read(path, start, stop)
        bad: list[tuple[Disk, bytes]] = []
        failure: OSError | None = None
        for node, disk in self._nearest_first(path):
            try:
                raw = self._ask(node, disk.read, path, start, stop)
            except FileNotFoundError:
                continue
            except OSError as error:
                failure = error
                continue
            if start == 0 and stop is None and not _sound(path, raw):
                bad.append((disk, raw))
                continue
            for spoilt, _ in bad:  # so that a sound copy can take its place
                logger.warning("a copy of %s is damaged: set aside", path)
                with contextlib.suppress(OSError):
                    spoilt.rename(path, f"{path}.corrupt")
            return raw
        if bad:
            return bad[0][1]  # the reader says what is wrong with it
        raise failure or FileNotFoundError(path)

    def create(self, path: str, raw: bytes) -> None:
        """A block is written to this node's disk, or, from elsewhere, to the first that takes it,
        and then to buddies; too few of them are no error."""
        path = _relative(path)
        if not _is_block(path):
            self._disks.head().create(path, raw)
            return
        copies, failure = 0, None
        for node, disk in self._nearest_first(path):
            if copies >= self._replicas:
                break
            try:
                self._ask(node, disk.create, path, raw)
            except FileExistsError:
                if not copies:
                    raise
            except OSError as error:
                failure = error
                continue
            copies += 1
        if not copies:
            raise failure or OSError("no node of the cluster has a disk")

    def rename(self, path: str, target: str) -> None:
        self._everywhere(path, lambda disk, name: disk.rename(name, _relative(target)))

    def remove(self, path: str) -> None:
        self._everywhere(path, lambda disk, name: disk.remove(name))

    # ---- folders

    def names(self, folder: str) -> list[str]:
        found: set[str] = set()
        seen = False
        for disk_names in self._from(folder, lambda disk, name: disk.names(name)):
            seen = True
            found.update(disk_names)
        if not seen:
            raise FileNotFoundError(folder)
        return list(found)

    def entries(self, folder: str) -> list[Entry]:
        """A file's latest copy counts: a collector that waits too long harms nobody. Times are the
        head's: clocks of nodes may differ."""
        found: dict[str, Entry] = {}
        seen, now = False, self._disks.head().clock()
        for listed in self._from(folder, lambda disk, name: disk.entries(name)):
            seen = True
            for name, size, age in listed:
                old = found.get(name)
                if old is None or old.modified < now - age:
                    found[name] = Entry(name, size, now - age)
        if not seen:
            raise FileNotFoundError(folder)
        return list(found.values())

    def modified(self, path: str) -> float:
        folder, name = path.rsplit("/", 1)
        for entry in self.entries(folder):
            if entry.name == name:
                return entry.modified
        raise FileNotFoundError(path)

    # ---- disks

    def _nearest_first(self, path: str) -> Iterator[tuple[str, Disk]]:
        """The own disk, before anybody is asked who else is there."""
        own = self._disks.own()
        if own is not None:
            yield own
        living = self._disks.living()
        others = living.keys() - {own[0] if own is not None else ""}
        for node in ranked(path.rsplit("/", 1)[-1], others):
            yield node, living[node]

    def _from(self, folder: str, ask: Callable[[Disk, str], T]) -> Iterator[T]:
        """What the disks that may have the folder say; one that has none, or does not answer, says
        nothing. Raises OSError when the head is silent about what only it has."""
        name = _relative(folder)
        if not _is_block(name):
            with contextlib.suppress(FileNotFoundError):
                yield ask(self._disks.head(), name)
        if _is_block(name) or not name:
            for node, disk in self._nearest_first(name):
                with contextlib.suppress(OSError):
                    yield self._ask(node, ask, disk, name)

    def _everywhere(self, path: str, act: Callable[[Disk, str], None]) -> None:
        """On every disk that has the file and answers. Raises FileNotFoundError where none has."""
        name, done = _relative(path), 0
        if not _is_block(name):
            act(self._disks.head(), name)
            return
        for node, disk in self._nearest_first(name):
            with contextlib.suppress(OSError):
                self._ask(node, act, disk, name)
                done += 1
        if not done:
            raise FileNotFoundError(path)

    def _ask(self, node: str, question: Callable[..., T], *arguments: Any) -> T:
        """Ask a disk, unless its node has just been silent."""
        with self._lock:
            if self._clock() < self._silent_until.get(node, float("-inf")):
                raise ConnectionError(f"{node} did not answer just now")
        try:
            return question(*arguments)
        except (ConnectionError, TimeoutError):
            with self._lock:
                self._silent_until[node] = self._clock() + PAUSE_S
            raise


def _relative(path: str) -> str:
    return path.removeprefix(ROOT).removeprefix("/")


def _is_block(path: str) -> bool:
    return path == "blocks" or path.startswith("blocks/")


def _sound(path: str, raw: bytes) -> bool:
    """Whether the bytes are those that a block's name says."""
    match = BLOCK_NAME.match(path.rsplit("/", 1)[-1])
    return match is None or match[3] == sha256(raw)
