"""Where the files of a store are: this machine's file system, RAM, S3, SFTP.

A backend does one thing per call, blocks, and raises what its library raises; FileNotFoundError
and FileExistsError mean the same everywhere. Deadlines, retries and translation are in `files`,
the only caller. fsspec has the clients and their settings; creating a file exclusively is what the
backends differ in:

    file://    write a temporary file, fsync, link it to its name, fsync the folder
    memory://  under a lock
    s3://      conditional PUT, If-None-Match (storage.s3)
    sftp://    write a temporary file, fsync, RENAME of SFTP version 3 (storage.sftp)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import fsspec

_memory_lock = threading.Lock()  # fsspec's memory:// looks first and writes then


@dataclass(frozen=True)
class Entry:
    """A file in a folder. `size` in bytes, `modified` in unix seconds by the store's clock."""

    name: str
    size: int
    modified: float


class Backend(Protocol):
    """One root on one file system, used from several threads."""

    root: str
    fs: Any  # fsspec's file system
    inline: bool  # answers from this process's memory: needs neither a thread nor a deadline
    transient: tuple[type[Exception], ...]  # errors, besides OSError's, that may pass

    def names(self, folder: str) -> list[str]:
        """Files and folders, unsorted. May raise FileNotFoundError if there is no folder."""

    def entries(self, folder: str) -> list[Entry]:
        """Files only, temporary ones too, unsorted."""

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        """Bytes start to stop, fewer where the file ends before."""

    def create(self, path: str, raw: bytes) -> None:
        """A whole file or none, with its folders. Raises FileExistsError."""

    def rename(self, path: str, target: str) -> None: ...

    def remove(self, path: str) -> None: ...

    def modified(self, path: str) -> float: ...


def temporary_name() -> str:
    return f".{secrets.token_hex(8)}.tmp"


def is_temporary(name: str) -> bool:
    """A file that a writer has not given its name yet; a killed writer leaves it."""
    return name.startswith(".") and name.endswith(".tmp")


class LocalBackend:
    """file://, including network mounts. Its steps are methods, so that tests can fail each."""

    inline = False
    transient: tuple[type[Exception], ...] = ()

    def __init__(self, url: str) -> None:
        self.fs: Any
        self.fs, self.root = fsspec.core.url_to_fs(url)

    def names(self, folder: str) -> list[str]:
        return os.listdir(folder)

    def entries(self, folder: str) -> list[Entry]:
        found = []
        with os.scandir(folder) as items:
            for item in items:
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    if item.is_file(follow_symlinks=False):
                        status = item.stat(follow_symlinks=False)
                        found.append(Entry(item.name, status.st_size, status.st_mtime))
        return found

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        """Reads, never maps: a mapped file that another process truncates kills the reader
        (SIGBUS), and one that changes after its checksum was taken would reach the engine."""
        with open(path, "rb", buffering=0) as file:
            if start == 0 and stop is None:
                return file.readall()
            size = os.fstat(file.fileno()).st_size
            file.seek(start)
            left = max(0, min(size, size if stop is None else stop) - start)
            parts = []
            while left and (part := file.read(left)):
                parts.append(part)
                left -= len(part)
            return b"".join(parts)

    def create(self, path: str, raw: bytes) -> None:
        folder = os.path.dirname(path)
        self._make_folder(folder)
        temporary = f"{folder}/{temporary_name()}"
        try:
            self.write(temporary, raw)
            self.link(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self.unlink(temporary)
        self.sync_folder(folder)

    def rename(self, path: str, target: str) -> None:
        os.rename(path, target)

    def remove(self, path: str) -> None:
        self.unlink(path)

    def modified(self, path: str) -> float:
        return os.stat(path).st_mtime

    def _make_folder(self, folder: str) -> None:
        """Create a folder and its parents; after a power cut they are still there."""
        if os.path.isdir(folder):
            return
        parent = os.path.dirname(folder)
        self._make_folder(parent)
        with contextlib.suppress(FileExistsError):
            self.mkdir(folder)
        if not os.path.isdir(folder):
            raise NotADirectoryError(folder)
        self.sync_folder(parent)

    # ---- the steps

    def mkdir(self, folder: str) -> None:
        os.mkdir(folder, 0o700)

    def write(self, temporary: str, raw: bytes) -> None:
        with open(temporary, "xb", opener=_private) as file:
            file.write(raw)
            file.flush()
            self.sync_file(file.fileno(), temporary)

    def sync_file(self, descriptor: int, path: str) -> None:
        os.fsync(descriptor)

    def link(self, temporary: str, path: str) -> None:
        os.link(temporary, path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_folder(self, folder: str) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class FsspecBackend:
    """What fsspec's own calls suffice for."""

    inline = False
    transient: tuple[type[Exception], ...] = ()

    def __init__(self, url: str, **options: Any) -> None:
        self.fs: Any
        self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        """Around every call of the file system."""
        yield

    def names(self, folder: str) -> list[str]:
        with self._call():
            paths = self.fs.ls(folder, detail=False)
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def entries(self, folder: str) -> list[Entry]:
        with self._call():
            found = self.fs.ls(folder, detail=True)
        return [
            Entry(info["name"].rsplit("/", 1)[-1], info["size"], seconds(info))
            for info in found
            if info["type"] == "file"
        ]

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        with self._call():
            raw: bytes = self.fs.cat_file(path, start=start or None, end=stop)
        return raw

    def create(self, path: str, raw: bytes) -> None:
        with self._call():
            self.fs.pipe_file(path, raw, mode="create")

    def rename(self, path: str, target: str) -> None:
        with self._call():
            self.fs.mv(path, target)

    def remove(self, path: str) -> None:
        with self._call():
            self.fs.rm_file(path)

    def modified(self, path: str) -> float:
        with self._call():
            return seconds(self.fs.info(path))


def seconds(info: dict[str, Any]) -> float:
    """When a file was written, from what fsspec or S3 say of it."""
    when = info["LastModified"] if "LastModified" in info else info["created"]
    return when.timestamp() if isinstance(when, datetime) else float(when)


class MemoryBackend(FsspecBackend):
    """memory://, for tests: one process only."""

    inline = True

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        with _memory_lock:
            yield
