"""Fetch a model's files by digest: in pieces, each verified, from the first source that has it.

    <model_dir>/<digest>/<file>            whole and verified
    <model_dir>/<digest>/.<file>.part      verified pieces from its beginning on, so far
    <model_dir>/<digest>/.lock             whoever holds it fetches; others on this host wait

A download that was killed goes on behind its last sound piece. A source that fails, stalls or sends
other bytes makes room for the next one. Knows no Ray and no engine; called by cluster.weights.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from storage.digests import PIECE, WeightsFile, describe, remember
from storage.errors import WeightsUnavailable
from storage.weights import Manifest, PieceSource, SourceFailed, holds
from storage.workers import DeadlinePassed, Workers

logger = logging.getLogger(__name__)
_FIRST, _SMALLEST = 256 << 10, 32 << 10  # bytes of one read, whatever the link
_MOST_BAD = 3  # pieces with other bytes, until a source is not asked again
_LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True)
class Progress:
    """Of one manifest. `waiting`: for what, while nothing is asked for."""

    name: str
    done: int  # bytes, those of an earlier start included
    total: int
    rate: float = 0.0  # bytes/s
    source: str = ""
    waiting: str = ""


@dataclass(frozen=True)
class FetchOptions:
    stall_s: float = 60.0  # without a byte from any source, or from who holds the lock: it fails
    read_s: float = 20.0  # of one read; the next source is asked then
    spare: int = 64 << 20  # bytes that stay free on the disk
    poll_s: float = 0.2


@dataclass
class _Source:
    source: PieceSource
    failures: int = 0
    bad: int = 0
    not_before: float = 0.0
    error: str = ""


@dataclass
class Fetch:
    """One manifest into one folder; `report` is called as bytes come, and while it waits."""

    manifest: Manifest
    folder: Path
    sources: Sequence[PieceSource]
    report: Callable[[Progress], None] = lambda progress: None
    options: FetchOptions = field(default_factory=FetchOptions)

    def __post_init__(self) -> None:
        self._asked = [_Source(source) for source in self.sources]
        self._workers = Workers(4)
        self._done, self._chunk, self._rate, self._logged = 0, _FIRST, 0.0, 0
        self._moved = time.monotonic()

    @property
    def path(self) -> Path:
        """Of the file or directory that an engine opens."""
        return self.folder / self.manifest.digest / self.manifest.name

    def run(self) -> Path:
        """`path`, whole and verified. Raises WeightsUnavailable; what came so far is kept."""
        if holds(self.path, self.manifest):
            return self.path
        home = self.path if self.manifest.is_directory else self.path.parent
        names = [file.name for file in self.manifest.files] + [self.manifest.name]
        if any(Path(name).name != name for name in names):
            raise WeightsUnavailable(f"{self.manifest.name}: a file of it has no plain name")
        try:
            home.mkdir(parents=True, exist_ok=True)
            with self._alone(self.path.parent / ".lock"):
                if not holds(self.path, self.manifest):
                    for file in self.manifest.files:
                        self._file(file, home)
        except OSError as error:
            reason = f"cannot keep {self.manifest.name} in {home}: {error.strerror or error}"
            raise WeightsUnavailable(reason) from error
        return self.path

    # ---- one file

    def _file(self, file: WeightsFile, home: Path) -> None:
        final, part = home / file.name, home / f".{file.name}.part"
        if final.is_file() and describe(final).sha256 == file.sha256:
            self._done += file.size
            return
        with part.open("a+b") as output:
            whole = hashlib.sha256()
            n_sound = self._resume(output, file, whole)
            self._check_space(home, file.size - n_sound * PIECE)
            for index in range(n_sound, len(file.pieces)):
                raw = self._piece(file, index)
                whole.update(raw)
                output.write(raw)
                output.flush()
            os.fsync(output.fileno())
        if whole.hexdigest() != file.sha256:
            part.unlink()
            raise WeightsUnavailable(
                f"{file.name}: its pieces are sound, their sum is not its sha256"
            )
        part.replace(final)
        _sync_folder(home)
        remember(final, file)
        logger.info("%s is here and verified: %d bytes", final, file.size)

    def _resume(self, output: BinaryIO, file: WeightsFile, whole: hashlib._Hash) -> int:
        """How many pieces from the beginning on are sound already; what follows is cut off."""
        output.seek(0)
        n_sound = 0
        for digest in file.pieces:
            raw = output.read(PIECE)
            if hashlib.sha256(raw).hexdigest() != digest:
                break
            whole.update(raw)
            n_sound += 1
        kept = min(file.size, n_sound * PIECE)
        output.truncate(kept)
        self._done += kept
        if kept:
            logger.info("%s: %d of %d bytes are here already", file.name, kept, file.size)
        return n_sound

    def _check_space(self, home: Path, wanted: int) -> None:
        free = shutil.disk_usage(home).free
        if free < wanted + self.options.spare:
            raise WeightsUnavailable(
                f"{self.manifest.name} needs {wanted / 1e6:.0f} MB more in {home}, "
                f"where {free / 1e6:.0f} MB are free ({self.options.spare / 1e6:.0f} are kept)"
            )

    # ---- one piece

    def _piece(self, file: WeightsFile, index: int) -> bytes:
        """Verified. Raises WeightsUnavailable when no source has moved for too long."""
        (start, stop), parts = file.span(index), bytearray()
        while True:
            asked = self._next_source()
            try:
                while (here := start + len(parts)) < stop:
                    parts += self._read(asked.source, file, here, min(stop, here + self._chunk))
                if hashlib.sha256(parts).hexdigest() == file.pieces[index]:
                    asked.failures, asked.error = 0, ""
                    return bytes(parts)
                self._done -= len(parts)
                parts.clear()
                asked.bad += 1
                raise SourceFailed(f"piece {index} of {file.name} has other bytes there")
            except SourceFailed as error:
                asked.failures, asked.error = asked.failures + 1, str(error)
            pause = min(_LONGEST_PAUSE_S, self.options.poll_s * 2**asked.failures)
            asked.not_before = time.monotonic() + pause
            logger.warning("%s: %s", asked.source.name, asked.error)

    def _read(self, source: PieceSource, file: WeightsFile, start: int, stop: int) -> bytes:
        began = time.monotonic()
        try:
            raw = self._workers.call(partial(source.read, file, start, stop), self.options.read_s)
        except DeadlinePassed as error:
            self._chunk = max(_SMALLEST, self._chunk // 4)
            raise SourceFailed(str(error)) from error
        if len(raw) != stop - start:
            raise SourceFailed(f"{len(raw)} bytes of {file.name} came instead of {stop - start}")
        self._arrived(len(raw), time.monotonic() - began, source.name)
        return raw

    def _arrived(self, n_bytes: int, seconds: float, source: str) -> None:
        self._moved = time.monotonic()
        self._done += n_bytes
        rate = n_bytes / max(seconds, 1e-6)
        self._rate = 0.7 * self._rate + 0.3 * rate if self._rate else rate
        # A read takes a twentieth of its deadline where the link is slow, else it is a whole piece.
        self._chunk = min(PIECE, max(_SMALLEST, int(self._rate * self.options.read_s / 20)))
        total = self.manifest.size
        if self._done * 10 // total > self._logged:
            self._logged = self._done * 10 // total
            percent, speed = 100 * self._done / total, self._rate / 1e6
            logger.info("%s: %.0f %%, %.1f MB/s", self.manifest.name, percent, speed)
        self.report(Progress(self.manifest.name, self._done, total, self._rate, source))

    def _next_source(self) -> _Source:
        """The first that may be asked now, waiting for one."""
        while True:
            able = [s for s in self._asked if s.bad < _MOST_BAD]
            now = time.monotonic()
            if not able or now - self._moved > self.options.stall_s:
                said = "; ".join(f"{s.source.name}: {s.error}" for s in self._asked if s.error)
                raise WeightsUnavailable(
                    f"{self.manifest.name}: stopped at {self._done} of {self.manifest.size} bytes "
                    f"({said or 'there is no source'})"
                )
            for source in able:
                if source.not_before <= now:
                    return source
            self._waits("a source that answers", self._done)
            time.sleep(min(self.options.poll_s, min(s.not_before for s in able) - now))

    def _waits(self, what: str, done: int) -> None:
        self.report(Progress(self.manifest.name, done, self.manifest.size, 0.0, "", what))

    # ---- one fetcher per host

    @contextlib.contextmanager
    def _alone(self, lock: Path) -> Iterator[None]:
        """Where files cannot be locked, two fetch the same bytes into the same places."""
        with lock.open("a") as file:
            moved, seen = time.monotonic(), -1
            while not _locked(file.fileno()):
                size = sum(p.stat().st_size for p in lock.parent.rglob("*") if p.is_file())
                if size != seen:
                    moved, seen = time.monotonic(), size
                if time.monotonic() - moved > self.options.stall_s:
                    raise WeightsUnavailable(
                        f"{self.manifest.name}: another process fetches it and does not get on"
                    )
                self._waits("another replica on this host, which fetches it", size)
                time.sleep(self.options.poll_s)
            yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("fetching without a lock: %s", error)
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
