"""AES-256-GCM for the files of a store, with keys per tenant.

    magic "kvfgcm01" | key id, 8 bytes | nonce, 12 bytes | ciphertext and tag

The associated data is magic, key id and the file's place in the store (its path without the digest
of its bytes), so a file that was moved to another tenant, agent or block does not open. A key's id
is a hash of the key: it may be shown, the key never is. Knows no path of a store and no card; used
by `blocks` and `store`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from storage.card import TENANT_PATTERN
from storage.errors import CorruptData, Locked

MAGIC = b"kvfgcm01"
KEY_BYTES = 32
EVERY_TENANT = "*"
_ID_BYTES, _NONCE_BYTES, _TAG_BYTES = 8, 12, 16
_HEAD = len(MAGIC) + _ID_BYTES + _NONCE_BYTES
OVERHEAD = _HEAD + _TAG_BYTES  # bytes a file grows by


def is_encrypted(raw: bytes) -> bool:
    return raw.startswith(MAGIC)


def key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"kvferry.key.v1" + key).digest()[:_ID_BYTES]


class Cipher:
    """The keys of a store. A tenant's first key writes, all of its keys read; the keys of "*"
    serve tenants that have none of their own."""

    def __init__(self, keys: Mapping[str, Sequence[bytes]]) -> None:
        """Raises ValueError for a key of the wrong length or a tenant without one."""
        for tenant, own in keys.items():
            if not own or any(len(key) != KEY_BYTES for key in own):
                raise ValueError(f"tenant {tenant}: wants keys of {KEY_BYTES} bytes")
        self._keys = {
            tenant: {key_id(key): AESGCM(key) for key in own} for tenant, own in keys.items()
        }

    def seal(self, tenant: str, place: str, raw: bytes) -> bytes:
        """The file for `raw` at `place`. Raises Locked for a tenant without a key."""
        found, cipher = next(iter(self._of(tenant, place).items()))
        nonce = secrets.token_bytes(_NONCE_BYTES)
        head = MAGIC + found
        return b"".join((head, nonce, cipher.encrypt(nonce, raw, head + place.encode())))

    def open(self, tenant: str, place: str, raw: bytes, path: str) -> bytes:
        """What a file at `place` holds. Raises Locked naming the key it wants, CorruptData."""
        if not is_encrypted(raw):
            raise Locked(path, "is not encrypted, and this store has encryption keys")
        keys = self._of(tenant, path)
        if len(raw) < OVERHEAD:
            raise CorruptData(path, f"{len(raw)} bytes are no encrypted file")
        wanted = raw[len(MAGIC) : len(MAGIC) + _ID_BYTES]
        if wanted not in keys:
            raise Locked(path, f"encrypted under key {wanted.hex()}, which tenant {tenant} lacks")
        nonce = raw[_HEAD - _NONCE_BYTES : _HEAD]
        try:
            return keys[wanted].decrypt(nonce, raw[_HEAD:], MAGIC + wanted + place.encode())
        except InvalidTag as error:
            reason = f"does not open under its key {wanted.hex()}: damaged, or not from here"
            raise CorruptData(path, reason) from error

    def _of(self, tenant: str, path: str) -> dict[bytes, AESGCM]:
        keys = self._keys.get(tenant) or self._keys.get(EVERY_TENANT)
        if keys is None:
            raise Locked(path, f"tenant {tenant} has no encryption key")
        return keys


def seal(cipher: Cipher | None, tenant: str, place: str, raw: bytes) -> bytes:
    """`raw` as it is stored."""
    return raw if cipher is None else cipher.seal(tenant, place, raw)


def unseal(cipher: Cipher | None, tenant: str, place: str, raw: bytes, path: str) -> bytes:
    """What is stored at `path`, in the clear. Raises Locked, CorruptData."""
    if cipher is not None:
        return cipher.open(tenant, place, raw, path)
    if is_encrypted(raw):
        wanted = raw[len(MAGIC) : len(MAGIC) + _ID_BYTES].hex()
        raise Locked(path, f"encrypted under key {wanted}, and no encryption keys are configured")
    return raw


def parse_keys(text: str, source: str) -> Cipher:
    """Keys from lines (or parts between semicolons) `tenant = key`, the key 32 bytes in hex or
    base64; several keys of a tenant are separated by commas, the first one writes.

    Raises ValueError naming source and line, never a key.
    """
    keys: dict[str, list[bytes]] = {}
    for number, line in enumerate(re.split(r"[\n;]", text), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        tenant, _, rest = line.partition("=")
        tenant, where = tenant.strip(), f"{source}: line {number}"
        if tenant != EVERY_TENANT and not TENANT_PATTERN.match(tenant):
            raise ValueError(f"{where}: wants `tenant = key`, or `* = key` for all others")
        if tenant in keys:
            raise ValueError(f"{where}: tenant {tenant} again; put its keys in one line")
        keys[tenant] = [_key(word.strip(), where) for word in rest.split(",")]
    if not keys:
        raise ValueError(f"{source}: holds no encryption key")
    return Cipher(keys)


def read_keys(path: Path) -> Cipher:
    """Keys from a file that only its owner may read. Raises OSError, ValueError."""
    mode = os.stat(path).st_mode & 0o777
    if mode & 0o077:
        raise ValueError(f"{path}: encryption keys that others may read (mode {mode:o}, wants 600)")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        text = ""  # the error would carry the bytes
    return parse_keys(text, str(path))


def _key(word: str, where: str) -> bytes:
    try:
        key = (
            bytes.fromhex(word)
            if len(word) == 2 * KEY_BYTES
            else base64.b64decode(word, None, True)
        )
    except (ValueError, binascii.Error):
        key = b""
    if len(key) != KEY_BYTES:
        raise ValueError(f"{where}: a key is {KEY_BYTES} bytes in hex or base64")
    return key
