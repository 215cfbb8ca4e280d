"""What a store must prove before anybody trusts it with a claim, or with plain bytes."""

from __future__ import annotations

import contextlib
import secrets

from storage.errors import Locked, StoreUnavailable
from storage.files import Files

_MARKER = "encrypted"  # left by the first one to open a store with keys


def probe(files: Files, *, encrypted: bool) -> None:
    """A second create of one file is refused, and the store is encrypted if and only if it should
    be: nobody who forgot the keys adds plain files. Raises StoreUnavailable, Locked."""
    with files.translated():
        try:
            _probe_create(files, files.path("probe", secrets.token_hex(16)))
            _probe_encryption(files, encrypted)
        except FileNotFoundError as error:  # a place where no folder can be made
            raise StoreUnavailable(files.url, repr(error)) from error


def _probe_create(files: Files, path: str) -> None:
    files.create(path, b"1")
    try:
        files.create(path, b"2")
    except FileExistsError:
        return
    finally:
        files.remove(path)
    raise StoreUnavailable(files.url, "a second create of one file succeeds: no claim is safe")


def _probe_encryption(files: Files, encrypted: bool) -> None:
    names = files.names(files.root)
    if not encrypted and _MARKER in names:
        raise Locked(files.url, "is encrypted, and no encryption keys are configured")
    if encrypted and _MARKER not in names:
        if {"agents", "blocks"} & set(names):
            raise Locked(files.url, "holds plain files: encryption wants a store of its own")
        with contextlib.suppress(FileExistsError):
            files.create(files.path(_MARKER), b"aes-256-gcm")
