"""What a model reference stands for, as files and digests, and its pieces in a store.

    models/<sha256 of a file>/<index of a piece>      immutable, created exclusively

Whoever reads a piece verifies it by the manifest, which comes from the head. Knows no engine and no
Ray; called by storage.fetch and cluster.weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from storage.digests import PIECE, WeightsFile, describe
from storage.errors import StoreUnavailable
from storage.files import Files

logger = logging.getLogger(__name__)
DIRECTORY_FILES = ("*.json", "*.jinja", "model*.safetensors")
DIRECTORY_WEIGHTS = ("model*.safetensors", "config.json")
_SHARD = re.compile(r"(.+)-00001-of-(\d{5})\.gguf", re.IGNORECASE)
FOLDER = "models"


@dataclass(frozen=True)
class Manifest:
    """What a model reference stands for: a GGUF (or its parts), or an MLX directory."""

    name: str  # of the file that is opened, or of the directory
    is_directory: bool
    files: tuple[WeightsFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """Of a single file its sha256."""
        one = len(self.files) == 1 and not self.is_directory
        return self.files[0].sha256 if one else directory_digest(self.files)

    @property
    def weights(self) -> str:
        """The weights digest of the compatibility key."""
        if not self.is_directory:
            return self.files[0].sha256
        return directory_digest(
            f for f in self.files if any(Path(f.name).match(p) for p in DIRECTORY_WEIGHTS)
        )


def directory_digest(files: Iterable[WeightsFile]) -> str:
    names = sorted([file.name, file.sha256] for file in files)
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def manifest_of(path: Path) -> Manifest:
    """Of the GGUF or MLX directory at `path`. Raises OSError."""
    paths = [path]
    if path.is_dir():
        paths = sorted({file for pattern in DIRECTORY_FILES for file in path.glob(pattern)})
    elif shard := _SHARD.fullmatch(path.name):
        count = int(shard[2])
        names = [f"{shard[1]}-{n:05d}-of-{shard[2]}.gguf" for n in range(1, count + 1)]
        paths = [path.with_name(name) for name in names]
    return Manifest(path.name, path.is_dir(), tuple(map(describe, paths)))


def holds(path: Path, manifest: Manifest) -> bool:
    """Whether a copy on this machine has all of the manifest's files, byte for byte."""
    folder = path if manifest.is_directory else path.parent
    try:
        for index, file in enumerate(manifest.files):
            main = index == 0 and not manifest.is_directory
            copy = path if main else folder / file.name  # the first may have another name
            if copy.stat().st_size != file.size or describe(copy).sha256 != file.sha256:
                return False
    except OSError:
        return False
    return True


class SourceFailed(Exception):
    """A source does not have the bytes, or cannot be reached."""


class PieceSource(Protocol):
    name: str  # for people: "the store", "the head"

    def read(self, file: WeightsFile, start: int, stop: int) -> bytes:
        """These bytes of a file, all in one piece. Raises SourceFailed."""


class StoreSource:
    """Pieces that somebody has published."""

    name = "the store"

    def __init__(self, files: Files) -> None:
        self._files = files

    def read(self, file: WeightsFile, start: int, stop: int) -> bytes:
        """Within one piece. Raises SourceFailed."""
        index = start // PIECE
        path = _path(self._files, file, index)
        try:
            return self._files.read(path, start - index * PIECE, stop - index * PIECE)
        except FileNotFoundError as error:
            raise SourceFailed(f"it lacks piece {index} of {file.name}") from error
        except StoreUnavailable as error:
            raise SourceFailed(str(error)) from error


def publish(files: Files, path: Path, manifest: Manifest) -> int:
    """Bring the pieces that a store lacks there; returns how many bytes those were. Killed, it goes
    on where it was. Raises StoreUnavailable, OSError."""
    sent = 0
    for index, file in enumerate(manifest.files):
        main = index == 0 and not manifest.is_directory
        local = path if main else (path if manifest.is_directory else path.parent) / file.name
        there = set(files.names(files.path(FOLDER, file.sha256)))
        with local.open("rb") as data:
            for number in range(len(file.pieces)):
                if f"{number:08d}" in there:
                    continue
                start, stop = file.span(number)
                data.seek(start)
                raw = data.read(stop - start)
                if hashlib.sha256(raw).hexdigest() != file.pieces[number]:
                    raise OSError(f"{local} has changed while it was published")
                sent += _create(files, _path(files, file, number), raw)
    return sent


def _create(files: Files, path: str, raw: bytes) -> int:
    try:
        with files.translated():
            files.create(path, raw)
    except FileExistsError:  # another head was faster
        return 0
    return len(raw)


def _path(files: Files, file: WeightsFile, index: int) -> str:
    return files.path(FOLDER, file.sha256, f"{index:08d}")
