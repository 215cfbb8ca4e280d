"""How many bytes were written to a node's disk today, across restarts. Not thread-safe."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

_NOTE_BYTES = 16 << 20  # the count is written down this often


class Wear:
    def __init__(self, note: Path) -> None:
        """`note`: the file in which the count is kept."""
        self._note = note
        self._day, self._bytes = self._read()
        self._noted = self._bytes

    def today(self) -> int:
        if self._day != _today():
            self._day, self._bytes, self._noted = _today(), 0, 0
        return self._bytes

    def count(self, size: int) -> None:
        self._bytes = self.today() + size
        if self._bytes - self._noted >= _NOTE_BYTES:
            self._noted = self._bytes
            with contextlib.suppress(OSError):  # a full disk: the count goes on in RAM
                self._note.write_text(json.dumps({"day": self._day, "bytes": self._bytes}))

    def _read(self) -> tuple[str, int]:
        try:
            note = json.loads(self._note.read_text())
            if note["day"] == _today():
                return note["day"], int(note["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # none yet, or cut short by a crash: the day starts at 0
        return _today(), 0


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
