"""A file system that fails on demand, for the tests of everything that stores.

    Faulty        wraps any backend: errors before and after the deed, delays, truncated and
                  flipped reads, old listings, no space, a crash at the k-th write boundary
    SteppedLocal  the file:// backend with a boundary before every system call that writes; can lose
                  what was not synced when it crashed (power cut)
    DictBackend   files in a dict: as fast as it gets, for tests with many thousand runs

All random choices come from one seed. `store_on` puts a CacheStore on a backend.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from storage.backends import Backend, Entry, LocalBackend
from storage.files import FilesOptions
from storage.store import CacheStore


class Crashed(BaseException):
    """The process died here. No Exception: nothing in the code under test may handle it."""


def store_on(backend: Backend, options: FilesOptions | None = None, **arguments: Any) -> CacheStore:
    store = CacheStore("memory://faulty", options=options, **arguments)
    store.files.backend = backend
    return store


@dataclass
class Boundaries:
    """Counts the points at which a crash makes a difference; crashes at the `crash_at`-th."""

    crash_at: int | None = None
    passed: int = 0
    crashed: bool = False

    def check(self) -> None:
        if self.crashed:
            raise Crashed

    def cross(self) -> None:
        self.check()
        if self.passed == self.crash_at:
            self.crashed = True
            raise Crashed
        self.passed += 1

    def revive(self) -> None:
        self.crashed, self.crash_at = False, None


@dataclass(frozen=True)
class Rates:
    """Probability of each fault, per call that it can happen to."""

    error_before: float = 0.0
    error_after: float = 0.0  # done, but reported as failed
    delay: float = 0.0
    truncated: float = 0.0
    flipped: float = 0.0
    stale: float = 0.0
    no_space: float = 0.0


@dataclass
class Faulty:
    """A backend that does what `inner` does, most of the time.

    `half_written`: a crash within a create leaves a part of the file under its name, as a backend
    would whose create is not atomic. `before`: called with the call's name and path before each.
    """

    inner: Backend
    rates: Rates = Rates()
    seed: int = 0
    boundaries: Boundaries = field(default_factory=Boundaries)
    half_written: bool = False
    delay_s: float = 0.001
    staleness: int = 3  # how many changes of a folder an old listing may lack
    inline: bool = True
    before: Callable[[str, str], None] = lambda call, path: None
    transient: tuple[type[Exception], ...] = ()

    def __post_init__(self) -> None:
        self.root, self.fs = self.inner.root, self.inner.fs
        self.injected: dict[str, int] = {}
        self._random = random.Random(self.seed)
        self._older: dict[str, deque[list[Entry]]] = {}

    def names(self, folder: str) -> list[str]:
        self._enter("names", folder)
        older = self._old_listing(folder)
        if older is not None:
            return [entry.name for entry in older]
        return self._leave(self.inner.names(folder))

    def entries(self, folder: str) -> list[Entry]:
        self._enter("entries", folder)
        older = self._old_listing(folder)
        return self._leave(self.inner.entries(folder) if older is None else older)

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        self._enter("read", path)
        raw = self.inner.read(path, start, stop)
        if raw and self._hit("truncated"):
            return raw[: self._random.randrange(len(raw))]
        if raw and self._hit("flipped"):
            changed = bytearray(raw)
            changed[self._random.randrange(len(raw))] ^= 1 << self._random.randrange(8)
            return bytes(changed)
        return self._leave(raw)

    def create(self, path: str, raw: bytes) -> None:
        self._enter("create", path)
        if self._hit("no_space"):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        try:
            self.boundaries.cross()
        except Crashed:
            if self.half_written:
                self.inner.create(path, raw[: self._random.randrange(len(raw) + 1)])
            raise
        self._remember(path)
        self.inner.create(path, raw)
        self._changed()

    def rename(self, path: str, target: str) -> None:
        self._change("rename", path, lambda: self.inner.rename(path, target))

    def remove(self, path: str) -> None:
        self._change("remove", path, lambda: self.inner.remove(path))

    def modified(self, path: str) -> float:
        self._enter("modified", path)
        return self._leave(self.inner.modified(path))

    def _change(self, call: str, path: str, change: Callable[[], None]) -> None:
        self._enter(call, path)
        self.boundaries.cross()
        self._remember(path)
        change()
        self._changed()

    def _changed(self) -> None:
        self.boundaries.cross()
        self._leave(None)

    def _enter(self, call: str, path: str) -> None:
        self.boundaries.check()
        self.before(call, path)
        if self._hit("delay"):
            time.sleep(self.delay_s)
        if self._hit("error_before"):
            raise ConnectionResetError(errno.ECONNRESET, "injected before", path)

    def _leave(self, result: Any) -> Any:
        if self._hit("error_after"):
            raise ConnectionResetError(errno.ECONNRESET, "injected after")
        return result

    def _hit(self, fault: str) -> bool:
        rate = getattr(self.rates, fault)
        hit = rate > 0 and self._random.random() < rate
        if hit:
            self.injected[fault] = self.injected.get(fault, 0) + 1
        return hit

    def _remember(self, path: str) -> None:
        """What the folder held before this change."""
        if self.rates.stale:
            folder = path.rsplit("/", 1)[0]
            try:
                found = self.inner.entries(folder)
            except FileNotFoundError:
                found = []
            self._older.setdefault(folder, deque(maxlen=self.staleness)).append(found)

    def _old_listing(self, folder: str) -> list[Entry] | None:
        older = self._older.get(folder)
        return self._random.choice(older) if older and self._hit("stale") else None


class DictBackend:
    """Files in a dict, one step per call; `clock` is its modification times'."""

    inline = True
    transient: tuple[type[Exception], ...] = ()
    fs = None

    def __init__(self, root: str = "") -> None:
        self.root = root
        self.clock = 1.7e9
        self.files: dict[str, tuple[bytes, float]] = {}

    def names(self, folder: str) -> list[str]:
        start = len(folder) + 1
        inside = (path for path in self.files if path.startswith(f"{folder}/"))
        return list({path[start:].split("/", 1)[0] for path in inside})

    def entries(self, folder: str) -> list[Entry]:
        return [
            Entry(name, len(self.files[path][0]), self.files[path][1])
            for name in self.names(folder)
            if (path := f"{folder}/{name}") in self.files
        ]

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        return self._file(path)[0][start:stop]

    def create(self, path: str, raw: bytes) -> None:
        if path in self.files:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self.files[path] = (raw, self.clock)

    def rename(self, path: str, target: str) -> None:
        self.files[target] = self._file(path)
        del self.files[path]

    def remove(self, path: str) -> None:
        self._file(path)
        del self.files[path]

    def modified(self, path: str) -> float:
        return self._file(path)[1]

    def _file(self, path: str) -> tuple[bytes, float]:
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return self.files[path]


class SteppedLocal(LocalBackend):
    """file:// with a boundary before each system call that changes something."""

    def __init__(
        self, folder: os.PathLike[str], boundaries: Boundaries | None = None, seed: int = 0
    ) -> None:
        super().__init__(f"file://{folder}")
        self.inline = True  # a crash must not be followed by what another thread still does
        self.boundaries = boundaries or Boundaries()
        self.steps: list[str] = []
        self._random = random.Random(seed)
        self._unsynced: list[tuple[str, str, bytes]] = []  # ("made" or "gone", path, content)
        self._synced: set[str] = set()
        self._volatile: set[int] = set()  # inodes of files whose content no fsync has made last

    def mkdir(self, folder: str) -> None:
        self._step("mkdir")
        super().mkdir(folder)
        self._unsynced.append(("made", folder, b""))

    def write(self, temporary: str, raw: bytes) -> None:
        before = self.boundaries.passed
        try:
            self._step("write")
            super().write(temporary, raw)
        except Crashed:
            if before == self.boundaries.crash_at:  # in the middle of it
                with open(temporary, "xb") as file:
                    file.write(raw[: self._random.randrange(len(raw))])
            raise
        finally:
            if os.path.exists(temporary):
                self._unsynced.append(("made", temporary, b""))
                if temporary not in self._synced:
                    self._volatile.add(os.stat(temporary).st_ino)

    def sync_file(self, descriptor: int, path: str) -> None:
        self._step("sync file")  # durable by definition: a real fsync would only take its time
        self._synced.add(path)

    def link(self, temporary: str, path: str) -> None:
        self._step("link")
        super().link(temporary, path)
        self._unsynced.append(("made", path, b""))

    def unlink(self, path: str) -> None:
        self._step("unlink")
        with open(path, "rb") as file:
            content = file.read()
        super().unlink(path)
        self._unsynced.append(("gone", path, content))

    def rename(self, path: str, target: str) -> None:
        self._step("rename")
        super().rename(path, target)

    def sync_folder(self, folder: str) -> None:
        self._step("sync folder")
        self._unsynced = [e for e in self._unsynced if os.path.dirname(e[1]) != folder]

    def cut_power(self) -> None:
        """Undo some of what no fsync has made last; any subset may be lost."""
        for folder, _, names in os.walk(self.root):
            for path in (os.path.join(folder, name) for name in names):
                if os.stat(path).st_ino in self._volatile:
                    os.truncate(path, self._random.randrange(os.path.getsize(path) + 1))
        for change, path, content in reversed(self._unsynced):
            if self._random.random() < 0.5:
                continue
            if change == "gone" and not os.path.exists(path):
                with open(path, "wb") as file:
                    file.write(content)
            elif change == "made" and os.path.isfile(path):
                os.unlink(path)
            elif change == "made" and os.path.isdir(path) and not os.listdir(path):
                os.rmdir(path)

    def _step(self, name: str) -> None:
        self.boundaries.cross()
        self.steps.append(name)
