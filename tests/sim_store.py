"""A store in memory with a clock of its own, shared by actors that are interleaved on purpose.

Every operation on a file is one step. Each actor runs in a thread, and only while it has the baton;
who is next, and how much time passes before, is the test's choice, so a seed is a schedule.
Listings may lag behind. Knows CacheStore only by its Files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from storage.files import Entry, Files
from storage.store import CacheStore


class Disk:
    """Files with their history, so that a listing can be given as of some time ago."""

    def __init__(self) -> None:
        self.clock = 1e9
        self.files: dict[str, tuple[bytes, float]] = {}
        self._history: dict[str, list[tuple[float, float]]] = {}  # path -> [(from, until)]

    def add(self, path: str, raw: bytes) -> None:
        if path in self.files:
            raise FileExistsError(path)
        self.files[path] = (raw, self.clock)

    def remove(self, path: str) -> None:
        if path in self.files:
            _, created = self.files.pop(path)
            self._history.setdefault(path, []).append((created, self.clock))

    def listing(self, folder: str, lag: float) -> dict[str, tuple[int, float] | None]:
        """name -> (size, modified), None for a folder."""
        prefix, when = f"{folder}/", self.clock - lag
        found: dict[str, tuple[int, float] | None] = {}

        def see(path: str, size: int, created: float) -> None:
            name, _, below = path[len(prefix) :].partition("/")
            found[name] = None if below else (size, created)

        if lag:
            for path, spans in self._history.items():
                if path.startswith(prefix):
                    for created, removed in spans:
                        if created <= when < removed:
                            see(path, 1, created)
        for path, (raw, created) in self.files.items():
            if path.startswith(prefix) and (created <= when or not lag):
                see(path, len(raw), created)
        return found


class SimFiles(Files):
    """Files over a Disk: `step` is called before every operation, `lag` says how old a listing of
    a folder may be."""

    url = root = "sim"  # type: ignore[assignment]

    def __init__(
        self, disk: Disk, step: Callable[[str, str], None], lag: Callable[[str], float]
    ) -> None:
        self._disk, self._step, self._lag = disk, step, lag

    def names(self, folder: str, timeout_s: float | None = None) -> list[str]:
        self._step("list", folder)
        return sorted(self._disk.listing(folder, self._lag(folder)))

    def entries(self, folder: str) -> list[Entry]:
        self._step("list", folder)
        found = self._disk.listing(folder, self._lag(folder))
        return [Entry(name, *of) for name, of in sorted(found.items()) if of is not None]

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        self._step("read", path)
        if path not in self._disk.files:
            raise FileNotFoundError(path)
        return self._disk.files[path][0][start:stop]

    def create(self, path: str, raw: bytes) -> None:
        self._step("create", path)
        self._disk.add(path, raw)

    def set_aside(self, path: str) -> None:
        self._step("set_aside", path)
        if path in self._disk.files:
            raw = self._disk.files[path][0]
            self._disk.remove(path)
            self._disk.add(f"{path}.corrupt", raw)

    def remove(self, path: str) -> None:
        self._step("remove", path)
        self._disk.remove(path)

    def now(self) -> float:
        return self._disk.clock

    def map(self, function: Any, items: Any) -> list[Any]:
        return [function(item) for item in items]


def sim_store(
    disk: Disk,
    step: Callable[[str, str], None] = lambda operation, path: None,
    lag: Callable[[str], float] = lambda folder: 0.0,
    **options: Any,
) -> CacheStore:
    files = SimFiles(disk, step, lag)
    with mock.patch("storage.store.Files", return_value=files):
        return CacheStore("sim", clock=lambda: disk.clock, **options)


class Stopped(BaseException):
    """Unwinds an actor's thread at the end of a schedule."""


@dataclass(eq=False)
class Actor:
    """`waiting_for` is the operation it is about to do; `since` when it came to that."""

    name: str
    waiting_for: str = ""
    since: float = 0.0
    busy_since: float | None = None  # start of what must not take long
    done: bool = False
    failure: BaseException | None = None


class Baton:
    """Runs actors one step at a time."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.actors: list[Actor] = []
        self._main = threading.Semaphore(0)
        self._turns: dict[Actor, threading.Semaphore] = {}
        self._threads: list[threading.Thread] = []
        self._stopping = False

    def spawn(self, name: str, program: Callable[[Actor], None]) -> Actor:
        actor = Actor(name, since=self.disk.clock)
        self._turns[actor] = threading.Semaphore(0)
        self.actors.append(actor)

        def run() -> None:
            self._turns[actor].acquire()
            try:
                if not self._stopping:
                    program(actor)
            except Stopped:
                pass
            except BaseException as error:
                actor.failure = error
            actor.done = True
            self._main.release()

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return actor

    def step(self, actor: Actor, operation: str) -> None:
        """Called by an actor: wait until it may do this."""
        actor.waiting_for, actor.since = operation, self.disk.clock
        self._main.release()
        self._turns[actor].acquire()
        if self._stopping:
            raise Stopped

    def resume(self, actor: Actor) -> None:
        """Let an actor go on to its next step."""
        self._turns[actor].release()
        assert self._main.acquire(timeout=30)
        if actor.failure is not None:
            raise actor.failure

    def stop(self) -> None:
        self._stopping = True
        for actor in self.actors:
            while not actor.done:
                self._turns[actor].release()
                assert self._main.acquire(timeout=30)
        for thread in self._threads:
            thread.join(timeout=30)
