"""The lease that makes collectors take turns.

    <url>/gc/lease/<number>.json     the greatest number counts, for LEASE_S after it was written

Taken and renewed by exclusive create of the next number, as epochs are. The taker reads the age by
the store's clock, the holder by its own, from before it wrote: so the holder stops first.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from storage.errors import Busy
from storage.files import Entry, Files

LEASE_S = 300.0
_STOP_S = 0.8 * LEASE_S  # the holder's own limit: clocks drift, a request takes its time


class Lease:
    """Held from the constructor to release()."""

    def __init__(self, files: Files, clock: Callable[[], float]) -> None:
        """Raises Busy while another holder's is fresh."""
        self._files, self._clock = files, clock
        self._folder = files.path("gc", "lease")
        found = self._entries()
        if found and found[-1].modified + LEASE_S > files.now():
            left = found[-1].modified + LEASE_S - files.now()
            raise Busy(files.url, f"another collector is at work (its lease ends in {left:.0f} s)")
        self._number = int(found[-1].name[:8]) if found else 0
        self._since = 0.0
        self._next()

    def hold(self) -> None:
        """Still ours, and renewed in time; raises Busy when it is not, then nothing may be done."""
        age = self._clock() - self._since
        if age > _STOP_S:
            raise Busy(self._files.url, f"the collector's lease was lost after {age:.0f} s")
        if age > LEASE_S / 3:
            self._next()

    def release(self) -> None:
        self._files.remove(self._path(self._number))

    def _next(self) -> None:
        started = self._clock()
        try:
            with self._files.translated():
                self._files.create(self._path(self._number + 1), secrets.token_hex(8).encode())
        except FileExistsError as error:
            raise Busy(self._files.url, "another collector took the lease") from error
        self._number, self._since = self._number + 1, started
        for entry in self._entries():
            if int(entry.name[:8]) < self._number:
                self._files.remove(f"{self._folder}/{entry.name}")

    def _entries(self) -> list[Entry]:
        found = self._files.entries(self._folder)
        return [e for e in found if e.name[:8].isdigit() and e.name[8:] == ".json"]

    def _path(self, number: int) -> str:
        return f"{self._folder}/{number:08d}.json"
