"""Files of a store: list, read, create exclusively, set aside, remove.

Knows paths and bytes, not what they mean. Every call ends at its deadline; errors that may pass are
retried until then, a few times. The backend's errors become StoreUnavailable here; a missing or
present file stays FileNotFoundError or FileExistsError.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import math
import random
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from storage.backends import Backend, Entry, LocalBackend, MemoryBackend, is_temporary
from storage.errors import StorageError, StoreUnavailable
from storage.workers import DeadlinePassed, Workers

__all__ = ["Entry", "Files", "FilesOptions"]

T = TypeVar("T")
Item = TypeVar("Item")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
# Errors of the operating system that may pass. One without a number is a client library's.
_TRANSIENT = {
    None,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EINTR,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.EPIPE,
    getattr(errno, "EREMOTEIO", errno.EIO),  # s3fs: the server's internal error; not on macOS
    errno.ESTALE,
    errno.ETIMEDOUT,
}


@dataclass(frozen=True)
class FilesOptions:
    timeout_s: float = 30.0  # of one call, retries included; disks too: they may be mounts
    workers: int = 8  # calls at a time
    attempts: int = 5  # of a call whose errors may pass


def is_remote(url: str) -> bool:
    """Whether a store lies elsewhere than on this node or in this process."""
    return "://" in url and url.split("://", 1)[0] not in ("file", "memory", "cluster")


class Files:
    """One root on one file system; safe to use from several threads."""

    def __init__(self, url: str, options: FilesOptions | None = None) -> None:
        """A URL, or a path. Raises ValueError for a scheme without a tested backend, or without
        its library. Opens no connection."""
        if "://" not in url:
            url = f"file://{Path(url).expanduser().absolute()}"
        scheme, rest = url.split("://", 1)
        self.url = f"{scheme}://{rest.rstrip('/')}"
        self.options = options or FilesOptions()
        self.backend = open_backend(self.url, self.options.timeout_s)
        self._workers = Workers(self.options.workers)

    @property
    def root(self) -> str:
        return self.backend.root

    @property
    def fs(self) -> Any:
        """fsspec's file system, without deadlines: for tests and one-off work."""
        return self.backend.fs

    @fs.setter
    def fs(self, fs: Any) -> None:
        self.backend.fs = fs

    def path(self, *parts: str) -> str:
        return "/".join((self.root, *parts))

    def names(self, folder: str, timeout_s: float | None = None) -> list[str]:
        """Names of files and folders in a folder, sorted; empty when there is none. Without the
        temporary files of writers. `timeout_s`: a deadline sooner than that of all calls."""
        with self.translated():
            try:
                found = self._call(self.backend.names, folder, timeout_s=timeout_s)
            except FileNotFoundError:
                return []
        return sorted(name for name in found if not is_temporary(name))

    def entries(self, folder: str) -> list[Entry]:
        """Files in a folder, temporary ones too, sorted by name; empty when there is none."""
        with self.translated():
            try:
                found = self._call(self.backend.entries, folder)
            except FileNotFoundError:
                return []
        return sorted(found, key=lambda entry: entry.name)

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The file, or its bytes from `start` to `stop` (fewer where it ends before).

        Raises FileNotFoundError, StoreUnavailable.
        """
        with self.translated():
            return self._call(self.backend.read, path, start or 0, stop)

    def create(self, path: str, raw: bytes) -> None:
        """Create a whole file, or raise FileExistsError; a crash leaves none, or all of it.

        Raises the backend's own errors, and StoreUnavailable at the deadline: after them, what the
        store holds decides, then or later. Hence it is never tried twice here.
        """
        self._call(self.backend.create, path, raw, attempts=1)

    def set_aside(self, path: str) -> None:
        """Rename a file that cannot be trusted, out of the way of a sound one."""
        with self.translated(), contextlib.suppress(FileNotFoundError):  # another was faster
            self._call(self.backend.rename, path, f"{path}.corrupt")

    def remove(self, path: str) -> None:
        """A file that is gone already is no error."""
        with self.translated(), contextlib.suppress(FileNotFoundError):
            self._call(self.backend.remove, path)

    def now(self) -> float:
        """The store's clock in unix seconds, as `Entry.modified` has it: some backends' counts
        whole seconds. Writes a small file and removes it. Raises StoreUnavailable."""
        path = self.path("probe", secrets.token_hex(16))
        with self.translated():
            try:
                self.create(path, b"now")
                return self._call(self.backend.modified, path)
            except (FileNotFoundError, FileExistsError) as error:
                raise StoreUnavailable(self.url, repr(error)) from error
            finally:
                self.remove(path)

    def map(self, function: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
        """function(item) of each, several at a time; results in order. The first exception is
        raised once the calls that have begun are over."""
        todo = list(items)
        if len(todo) < 2 or self.backend.inline:
            return [function(item) for item in todo]
        with ThreadPoolExecutor(min(len(todo), self.options.workers), "store-map") as pool:
            return list(pool.map(function, todo))

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError, StorageError):
            raise
        except Exception as error:
            raise StoreUnavailable(self.url, repr(error)) from error

    def _call(
        self,
        function: Callable[..., T],
        *args: Any,
        attempts: int | None = None,
        timeout_s: float | None = None,
    ) -> T:
        """One call of the backend before the deadline, tried again after errors that may pass."""
        deadline = time.monotonic() + min(self.options.timeout_s, timeout_s or math.inf)
        attempts = attempts or self.options.attempts
        attempt = 0
        while True:
            attempt += 1
            try:
                if self.backend.inline:
                    return function(*args)
                left = deadline - time.monotonic()
                return self._workers.call(partial(function, *args), left)
            except DeadlinePassed as error:
                raise StoreUnavailable(self.url, str(error)) from error
            except Exception as error:
                # Full jitter: writers that failed together do not come back together.
                pause = random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))
                late = time.monotonic() + pause >= deadline
                if attempt >= attempts or late or not self._may_pass(error):
                    raise
            time.sleep(pause)

    def _may_pass(self, error: Exception) -> bool:
        if isinstance(error, FileNotFoundError | FileExistsError | PermissionError):
            return False
        if isinstance(error, self.backend.transient):
            return True
        return isinstance(error, OSError) and error.errno in _TRANSIENT


def open_backend(url: str, timeout_s: float) -> Backend:
    """The backend of a URL; opens no connection. Raises ValueError for a scheme that has none,
    naming the extra to install where only its library is missing."""
    scheme = url.split("://", 1)[0]
    if scheme == "file":
        return LocalBackend(url)
    if scheme == "memory":
        return MemoryBackend(url)
    if scheme == "s3":
        _need("s3fs", "s3", url)
        from storage.s3 import S3Backend

        return S3Backend(url, timeout_s)
    if scheme in ("sftp", "ssh"):
        _need("paramiko", "sftp", url)
        from storage.sftp import SftpBackend

        return SftpBackend(url, timeout_s)
    if scheme == "cluster":  # by name: what it is made of lies above this package
        opened: Backend = importlib.import_module("cluster.disks").open_backend(url)
        return opened
    known = "file://, memory://, s3://, sftp://, cluster://"
    raise ValueError(f"store {url!r}: scheme {scheme}:// is not supported; use {known}")


def _need(library: str, extra: str, url: str) -> None:
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise ValueError(
            f"store {url!r}: needs {library}, which is not installed: pip install '.[{extra}]'"
        ) from error
