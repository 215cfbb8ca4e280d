"""Files of a store over fsspec: list, read, create exclusively, set aside, remove.

Knows paths and bytes, not what they mean. The backend's errors become StoreUnavailable here; a
missing or present file stays FileNotFoundError or FileExistsError.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from storage.errors import StorageError, StoreUnavailable

SCHEMES = ("file", "memory")
_memory_lock = threading.Lock()  # fsspec's memory:// looks first and writes then
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class FilesOptions:
    """How a store is reached."""


@dataclass(frozen=True)
class Entry:
    """A file in a folder; `modified` in unix seconds by the store's clock."""

    name: str
    size: int
    modified: float


class Files:
    """One root on one file system; safe to use from several threads."""

    def __init__(self, url: str, options: FilesOptions | None = None) -> None:
        """A URL, or a path. Raises ValueError for a scheme without a tested backend."""
        if "://" not in url:
            url = f"file://{Path(url).expanduser().absolute()}"
        scheme, rest = url.split("://", 1)
        if scheme not in SCHEMES:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise ValueError(f"store {url!r}: scheme {scheme}:// is not supported; use {known}")
        self.url = f"{scheme}://{rest.rstrip('/')}"
        self.fs: Any
        self.fs, self.root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        self._is_local = scheme == "file"
        self._guard = contextlib.nullcontext() if self._is_local else _memory_lock

    def path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def names(self, folder: str) -> list[str]:
        """File names in a folder, sorted; empty when there is none."""
        with self.translated(), self._guard:
            try:
                paths = self.fs.ls(folder, detail=False)
            except FileNotFoundError:
                return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def entries(self, folder: str) -> list[Entry]:
        """The files in a folder, sorted by name; empty when there is none."""
        with self.translated(), self._guard:
            try:
                found = self.fs.ls(folder, detail=True)
            except FileNotFoundError:
                return []
        entries = [
            Entry(
                info["name"].rstrip("/").rsplit("/", 1)[-1],
                info["size"],
                info.get("mtime", info.get("created", 0.0)),
            )
            for info in found
            if info["type"] == "file"
        ]
        return sorted(entries, key=lambda entry: entry.name)

    def now(self) -> float:
        """Unix seconds by the store's clock."""
        return time.time()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [function(item) for item in items]

    def read(self, path: str) -> bytes:
        with self.translated():
            raw: bytes = self.fs.cat_file(path)
        return raw

    def create(self, path: str, raw: bytes) -> None:
        """Create or raise FileExistsError; on file:// a crash leaves no half-written file.

        Raises the backend's own errors: after them, what the store holds decides.
        """
        if not self._is_local:
            with self._guard:
                self.fs.pipe_file(path, raw, mode="create")
            return
        folder = os.path.dirname(path)
        _make_folder(folder)
        temporary = f"{folder}/.{secrets.token_hex(8)}.tmp"
        try:
            with open(temporary, "xb", opener=_private) as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        _sync_folder(folder)

    def set_aside(self, path: str) -> None:
        """Rename a file that cannot be trusted, out of the way of a sound one."""
        with self.translated(), contextlib.suppress(FileNotFoundError):  # another was faster
            self.fs.mv(path, f"{path}.corrupt")

    def remove(self, path: str) -> None:
        """A file that is gone already is no error."""
        with self.translated(), self._guard, contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(path)

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError, StorageError):
            raise
        except Exception as error:
            raise StoreUnavailable(self.url, repr(error)) from error


def _make_folder(folder: str) -> None:
    """Create a folder and its parents; after a power cut they are still there."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(folder)
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
