"""One block, one tail segment or one whole card, as safetensors bytes.

Any safetensors reader opens these files. Ours are deterministic: one metadata entry, `kvferry`,
holds canonical JSON, and a block's header is padded with spaces so that the data section starts on
a page. Knows bytes and tensors; what they mean is in `card` and `codec`.

Ids name the content that was asked for, digests the bytes that answered:

    block_id   = sha256(domain, parent id, token ids, key digest, codec, tenant, cache_salt)
    segment_id = the same over the rows since the last block boundary, with the segment's start

Every field is length-prefixed (u64, little endian); token ids are u32, little endian.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import load as _load
from safetensors.numpy import save as _save

from storage.codec import Tensors
from storage.errors import CorruptData
from storage.spec import canonical_json

PAGE = 4096
MAX_HEADER = 16 << 20  # bytes; a card takes about 250 per block of a branch
_METADATA_KEY = "kvferry"


def sha256(raw: bytes | memoryview) -> str:
    return hashlib.sha256(raw).hexdigest()


@dataclass(frozen=True)
class Chain:
    """What every id of one agent's chain has in common. Tenants and salts never share an id."""

    key_digest: str
    codec: str
    tenant: str
    cache_salt: str = ""

    def block_id(self, parent: str, token_ids: Sequence[int]) -> str:
        """Id of a whole block; `parent` is the id before it, "" for the first."""
        return self._id(b"kvferry.block.v1", parent, token_ids, b"")

    def segment_id(self, parent: str, token_ids: Sequence[int], start: int) -> str:
        """Id of a row segment: `token_ids` since the last block, of which it holds those from
        index `start` on."""
        return self._id(b"kvferry.segment.v1", parent, token_ids, struct.pack("<Q", start))

    def _id(self, domain: bytes, parent: str, token_ids: Sequence[int], start: bytes) -> str:
        digest = hashlib.sha256()
        for field in (
            domain,
            bytes.fromhex(parent),
            np.asarray(token_ids, dtype="<u4").tobytes(),
            bytes.fromhex(self.key_digest),
            self.codec.encode(),
            self.tenant.encode(),
            self.cache_salt.encode(),
            start,
        ):
            digest.update(struct.pack("<Q", len(field)))
            digest.update(field)
        return digest.hexdigest()


def save(tensors: Tensors, metadata: dict[str, Any], *, align: int = 8) -> bytes:
    """Serialize; the data section starts at a multiple of `align` bytes. Raises ValueError for a
    header that load would refuse."""
    raw = _save(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()},
        {_METADATA_KEY: canonical_json(metadata).decode("ascii")},
    )
    (header,) = struct.unpack_from("<Q", raw)
    pad = -(8 + header) % align
    if header + pad > MAX_HEADER:
        raise ValueError(f"header of {header} bytes is above the limit of {MAX_HEADER}")
    body = 8 + header
    return b"".join((struct.pack("<Q", header + pad), raw[8:body], b" " * pad, raw[body:]))


def load(raw: bytes, path: str) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and metadata of a whole file. Raises CorruptData, naming `path`."""
    metadata = load_metadata(raw, path)
    try:
        return _load(raw), metadata
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CorruptData(path, f"not a readable safetensors file ({error})") from error


def load_metadata(head: bytes, path: str) -> dict[str, Any]:
    """The metadata from the first bytes of a file, which must hold the whole header.

    Only the one way in which `save` writes it is accepted. Raises CorruptData, naming `path`.
    """
    if len(head) < 8:
        raise CorruptData(path, f"{len(head)} bytes are no safetensors file")
    (size,) = struct.unpack_from("<Q", head)
    if size > min(MAX_HEADER, len(head) - 8):
        raise CorruptData(path, f"header of {size} bytes does not fit")
    try:
        text = json.loads(head[8 : 8 + size])["__metadata__"][_METADATA_KEY]
        metadata = json.loads(text)
        canonical = canonical_json(metadata) == text.encode("ascii")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptData(path, f"header is not kvferry's ({error!r})") from error
    if not isinstance(metadata, dict):
        raise CorruptData(path, "metadata is no mapping")
    if not canonical or not head[8 : 8 + size].rstrip(b" ").endswith(b"}"):
        raise CorruptData(path, "header is not in canonical form")
    return metadata
