"""What the files of a model are: sizes and sha256, whole and by the piece, cached per file.

A file of gigabytes is read once: what was computed is kept in the user's cache directory by path,
size and time of change. Called by the engines (compatibility keys) and by storage.weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
PIECE = 4 << 20  # bytes that are fetched and verified as one


@dataclass(frozen=True)
class WeightsFile:
    """A file's bytes. `pieces`: sha256 of each PIECE bytes in turn, the last may be shorter."""

    name: str
    size: int
    sha256: str
    pieces: tuple[str, ...]

    def span(self, index: int) -> tuple[int, int]:
        """First byte of a piece, and the byte after its last."""
        return index * PIECE, min(self.size, (index + 1) * PIECE)


def cache_root() -> Path:
    """kvferry's folder in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvferry"


def describe(path: Path) -> WeightsFile:
    """Of a file on this machine. Raises OSError."""
    try:
        size, digest, pieces = cached(path, "pieces", lambda: _read(path))
    except (TypeError, ValueError):  # JSON, but none of ours
        size, digest, pieces = _read(path)
    return WeightsFile(path.name, int(size), str(digest), tuple(map(str, pieces)))


def remember(path: Path, file: WeightsFile) -> None:
    """A file that was verified as it was written need not be read again."""
    _keep(_entry(path, "pieces"), [file.size, file.sha256, list(file.pieces)])


def cached(path: Path, kind: str, compute: Callable[[], Any]) -> Any:
    """compute(), or what it returned for this very file before; it must be JSON."""
    entry = _entry(path, kind)
    try:
        return json.loads(entry.read_text())
    except (OSError, ValueError):
        pass
    value = compute()
    _keep(entry, value)
    return value


def _entry(path: Path, kind: str) -> Path:
    stat = path.stat()
    key = f"{kind}:{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    return cache_root() / "digests" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _keep(entry: Path, value: Any) -> None:
    temporary = entry.with_suffix(f".{secrets.token_hex(4)}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value))
        temporary.replace(entry)
    except OSError as error:
        logger.warning("cannot keep a digest in %s: %s", entry.parent, error)


def _read(path: Path) -> tuple[int, str, list[str]]:
    whole, pieces, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while raw := file.read(PIECE):
            whole.update(raw)
            pieces.append(hashlib.sha256(raw).hexdigest())
            size += len(raw)
    return size, whole.hexdigest(), pieces
