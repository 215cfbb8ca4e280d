"""sftp:// over paramiko: the backend of a store on any machine that runs an SSH server.

A file is created by writing a temporary one and renaming it. RENAME of SFTP version 3 must not
overwrite; OpenSSH carries it out as link and unlink, so of two writers one gets an error. (On a
file system without hard links OpenSSH looks first and renames then, which is not safe; a store on
such a file system is for one writer.) Host keys must be known beforehand.
"""

from __future__ import annotations

import contextlib
import errno
import stat
import threading
from collections.abc import Iterator
from typing import Any

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem
from fsspec.utils import infer_storage_options
from paramiko.sftp import CMD_EXTENDED

from storage.backends import Entry, temporary_name

_KEEPALIVE_S = 15


class SftpBackend:
    """sftp://user@host:port/path.

    One SSH connection, made by the first call and again after it broke; on it one channel per
    thread, because paramiko's channels mix up the answers to several threads.
    """

    inline = False
    transient: tuple[type[Exception], ...] = (EOFError, paramiko.SSHException)

    def __init__(self, url: str, timeout_s: float) -> None:
        options = infer_storage_options(url)
        self.root = options["path"].rstrip("/")
        if not options.get("host") or not self.root:
            raise ValueError(f"store {url!r}: wants sftp://[user@]host[:port]/path")
        if options.get("password"):
            raise ValueError("store: a password in a URL ends up in logs; set FSSPEC_SFTP_PASSWORD")
        names = ("host", "port", "username")
        self._target = {name: options[name] for name in names if name in options}
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._fs: Any = None
        self._mine = threading.local()  # fs and channel of this thread

    @property
    def fs(self) -> Any:
        with self._lock:
            if self._fs is None or not self._fs.is_connected():
                self._fs = _FileSystem(**self._target, deadline_s=self._timeout_s)
            return self._fs

    @fs.setter
    def fs(self, fs: Any) -> None:
        self._fs = fs

    def names(self, folder: str) -> list[str]:
        with self._channel() as ftp:
            names: list[str] = ftp.listdir(folder)
            return names

    def entries(self, folder: str) -> list[Entry]:
        with self._channel() as ftp:
            return [
                Entry(found.filename, found.st_size or 0, float(found.st_mtime or 0))
                for found in ftp.listdir_attr(folder)
                if stat.S_ISREG(found.st_mode or 0)
            ]

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        with self._channel() as ftp, ftp.open(path, "rb") as file:
            size = file.stat().st_size or 0
            stop = size if stop is None else min(stop, size)
            if start >= stop:
                return b""
            file.seek(start)
            file.prefetch(stop)  # many requests under way: one after another takes 20 times longer
            raw: bytes = file.read(stop - start)
            return raw

    def create(self, path: str, raw: bytes) -> None:
        folder = path.rsplit("/", 1)[0]
        temporary = f"{folder}/{temporary_name()}"
        with self._channel() as ftp:
            try:
                self._write(ftp, temporary, raw)
            except FileNotFoundError:
                _make_folder(ftp, folder)
                self._write(ftp, temporary, raw)
            try:
                ftp.rename(temporary, path)
            except OSError as error:
                ftp.remove(temporary)
                if not _exists(ftp, path):
                    raise
                raise FileExistsError(errno.EEXIST, "file exists", path) from error

    def rename(self, path: str, target: str) -> None:
        with self._channel() as ftp:
            ftp.posix_rename(path, target)

    def remove(self, path: str) -> None:
        with self._channel() as ftp:
            ftp.remove(path)

    def modified(self, path: str) -> float:
        with self._channel() as ftp:
            return float(ftp.stat(path).st_mtime or 0)

    def _write(self, ftp: paramiko.SFTPClient, path: str, raw: bytes) -> None:
        with ftp.open(path, "wbx") as file:
            file.chmod(0o600)
            file.set_pipelined(True)
            file.write(raw)
            _sync(ftp, file)
            stored = file.stat().st_size  # of pipelined writes this alone says that they worked
            if stored != len(raw):
                raise OSError(errno.EIO, f"{stored} of {len(raw)} bytes written", path)

    @contextlib.contextmanager
    def _channel(self) -> Iterator[paramiko.SFTPClient]:
        fs = self.fs
        if getattr(self._mine, "fs", None) is not fs:
            self._mine.ftp = fs.open_channel()
            self._mine.fs = fs
        try:
            yield self._mine.ftp
        except (FileNotFoundError, FileExistsError, PermissionError):
            raise  # answers
        except BaseException as error:
            self._mine.fs = None
            self._mine.ftp.close()
            if isinstance(error, (TimeoutError, *self.transient)):
                fs.client.close()  # whatever broke it, the next call connects anew
            raise


class _FileSystem(SFTPFileSystem):  # type: ignore[misc]
    """fsspec's, with its settings (FSSPEC_SFTP_...), but it connects to known hosts only."""

    cachable = False

    def _connect(self) -> None:
        self._deadline_s = self.ssh_kwargs.pop("deadline_s")
        known_hosts = self.ssh_kwargs.pop("known_hosts", None)
        self.client = paramiko.SSHClient()
        self.client.load_system_host_keys(known_hosts)  # None: ~/.ssh/known_hosts
        self.client.set_missing_host_key_policy(_OnlyKnownHosts())
        limits = ("timeout", "banner_timeout", "auth_timeout", "channel_timeout")
        try:
            self.client.connect(
                self.host, **dict.fromkeys(limits, self._deadline_s) | self.ssh_kwargs
            )
        except (paramiko.AuthenticationException, paramiko.BadHostKeyException) as error:
            raise PermissionError(errno.EACCES, str(error)) from error  # not tried again
        transport = self.client.get_transport()
        assert transport is not None
        transport.set_keepalive(_KEEPALIVE_S)
        self.ftp = self.open_channel()

    def is_connected(self) -> bool:
        transport = self.client.get_transport()
        return transport is not None and transport.is_active()

    def open_channel(self) -> paramiko.SFTPClient:
        ftp = self.client.open_sftp()
        channel = ftp.get_channel()
        assert channel is not None
        channel.settimeout(self._deadline_s)
        return ftp


class _OnlyKnownHosts(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
    def missing_host_key(self, client: Any, hostname: str, key: paramiko.PKey) -> None:
        raise PermissionError(
            errno.EACCES, f"{hostname} is not in known_hosts: its key is {key.fingerprint}"
        )


def _make_folder(ftp: paramiko.SFTPClient, folder: str) -> None:
    if folder in ("", "/") or _exists(ftp, folder):
        return
    _make_folder(ftp, folder.rsplit("/", 1)[0])
    try:
        ftp.mkdir(folder, 0o700)
    except OSError:
        if not _exists(ftp, folder):  # no other writer made it meanwhile
            raise


def _exists(ftp: paramiko.SFTPClient, path: str) -> bool:
    try:
        ftp.stat(path)
    except FileNotFoundError:
        return False
    return True


def _sync(ftp: paramiko.SFTPClient, file: paramiko.SFTPFile) -> None:
    """OpenSSH's extension; paramiko has no name for it. Other servers may not know it."""
    try:
        ftp._request(CMD_EXTENDED, "fsync@openssh.com", file.handle)
    except OSError as error:
        if "unsupported" not in str(error).lower():
            raise
