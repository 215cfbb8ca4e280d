"""One agent as one file: its card and all its rows, written and read piece by piece.

An export is a safetensors file whose tensors are, in this order:

    tokens.<branch>            uint32, as in the card
    runs.<n>.<tensor>          the n-th block or segment that the card names, each once; its `full`
                               part, then its `sliding` part: the data sections of their files
    digests                    uint8 (parts, 32): sha256 of each part's bytes in this file
    seal                       uint8 (32): sha256 over everything before the first run and `digests`
    signature                  uint8 (32): HMAC-SHA256 over the same, when a signing key is set

Neither side holds more than one part in memory. An import is untrusted: every tensor is held
against the spec before it is read, and against its digest before it is stored. Unless this store's
own key signed the file for this tenant, a random salt keeps its blocks away from all others.
Reading is in `imports`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from storage.cache_file import PAGE, Header, TensorInfo, header_bytes, parse_header, read_header
from storage.card import BlockRef, CacheCard, to_json, token_tensors
from storage.card_json import SCHEMA as CARD_SCHEMA
from storage.codec import Codec, Tensors, check_tensors, get_codec
from storage.errors import CorruptData, Incompatible
from storage.spec import Part
from storage.store import CacheStore

SCHEMA = "kvferry.export.v1"
MAX_PART = 1 << 29  # bytes of one part of one block
PARTS: tuple[Part, ...] = ("full", "sliding")
_U8 = np.dtype("u1")


@dataclass(frozen=True)
class Piece:
    """One part of one block or segment. `tensors` are where they lie: in the block's own file when
    it is exported, in the export when it is imported."""

    ref: BlockRef
    part: Part
    rows: int  # of this part: of a sliding one perhaps only the last of the block
    tensors: Mapping[str, TensorInfo]
    start: int
    stop: int


def runs_of(card: CacheCard) -> list[BlockRef]:
    """Every block and segment that the card names, once, with all its parts. Raises ValueError when
    two branches do not mean the same by one id."""
    runs: dict[str, BlockRef] = {}
    for branch in card.branches:
        for ref in (*branch.blocks, *branch.tail):
            known = runs.setdefault(ref.id, ref)
            if known.rows != ref.rows:
                raise ValueError(f"block {ref.id} has {known.rows} rows, and {ref.rows}")
            runs[ref.id] = replace(known, parts={**ref.parts, **known.parts})
    return list(runs.values())


def piece_of(
    card: CacheCard, ref: BlockRef, part: Part, tensors: Mapping[str, TensorInfo], path: str
) -> Piece:
    """Raises CorruptData unless names, types and shapes are the spec's."""
    start = min((info.start for info in tensors.values()), default=0)
    stop = max((info.stop for info in tensors.values()), default=0)
    if stop - start > MAX_PART:
        raise CorruptData(path, f"block {ref.id} takes {stop - start} bytes")
    rows = ref.rows
    if part == "sliding":
        rows = next((info.shape[1] for info in tensors.values() if len(info.shape) > 1), 0)
        if not 0 < rows <= ref.rows:
            raise CorruptData(path, f"{rows} sliding rows in a block of {ref.rows}")
    declared: Tensors = {
        name: np.broadcast_to(np.zeros((), info.dtype), info.shape)
        for name, info in tensors.items()
    }
    codec = codec_of(card, path)
    try:
        check_tensors(card.key.spec, codec, declared, rows, path, part)
    except ValueError as error:  # a geometry that the codec cannot store
        raise CorruptData(path, str(error)) from error
    return Piece(ref, part, rows, tensors, start, stop)


def codec_of(card: CacheCard, path: str) -> Codec:
    try:
        return get_codec(card.codec)
    except ValueError as error:
        raise Incompatible(path, [f"codec: {error}"]) from error


# ---- export


def export_agent(
    store: CacheStore,
    card: CacheCard,
    path: Path,
    *,
    signing_key: bytes | None = None,
    overwrite: bool = False,
) -> int:
    """Write a local file; its size in bytes. It is there whole or not at all, readable by its owner
    only. Raises FileExistsError, OSError, and what write_bundle raises."""
    if path.exists() and not overwrite:
        raise FileExistsError(str(path))
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            write_bundle(store, card, file, signing_key=signing_key)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def write_bundle(
    store: CacheStore, card: CacheCard, file: BinaryIO, *, signing_key: bytes | None = None
) -> None:
    """Write the whole export. Raises CorruptData for a block that is missing or damaged,
    Incompatible for an unknown codec, ValueError for an agent too large for one header."""
    pieces = list(_stored_pieces(store, card))
    tokens = token_tensors(card)
    table = [(name, x.dtype, x.shape) for name, x in tokens.items()]
    index = {ref.id: n for n, ref in enumerate(runs_of(card))}
    for piece in pieces:
        for name, info in sorted(piece.tensors.items(), key=lambda item: item[1].start):
            table.append((f"runs.{index[piece.ref.id]}.{name}", info.dtype, info.shape))
    table += [("digests", _U8, (len(pieces), 32)), ("seal", _U8, (32,))]
    if signing_key:
        table.append(("signature", _U8, (32,)))
    metadata = {"schema": SCHEMA, "card_schema": CARD_SCHEMA, "card": to_json(card)}
    head = header_bytes(table, metadata, align=PAGE)
    head += b"".join(x.tobytes() for x in tokens.values())
    file.write(head)
    digests = []
    for piece in pieces:
        raw = memoryview(_verified(store, card, piece.ref, piece.part))
        path = store.block_path(card.agent.tenant, piece.ref, piece.part)
        if parse_header(raw, path).tensors != piece.tensors:
            raise CorruptData(path, "it changed while it was exported")
        file.write(raw[piece.start : piece.stop])
        digests.append(hashlib.sha256(raw[piece.start : piece.stop]).digest())
    sealed = head + b"".join(digests)
    file.write(b"".join(digests) + hashlib.sha256(sealed).digest())
    if signing_key:
        file.write(hmac.digest(signing_key, sealed, "sha256"))


def _stored_pieces(store: CacheStore, card: CacheCard) -> Iterator[Piece]:
    """What is to be written, from the headers of the stored files."""
    tenant = card.agent.tenant
    for ref in runs_of(card):
        for part in PARTS:
            if part in ref.parts:
                path = store.block_path(tenant, ref, part)
                yield piece_of(
                    card, ref, part, _stored_header(store, card, ref, part).tensors, path
                )


def _stored_header(store: CacheStore, card: CacheCard, ref: BlockRef, part: Part) -> Header:
    path = store.block_path(card.agent.tenant, ref, part)
    try:
        return read_header(lambda start, stop: store.files.read(path, start, stop), path)
    except FileNotFoundError as error:
        raise CorruptData(path, "the block is missing") from error
    except CorruptData:  # damaged, or encrypted: the whole file tells
        return parse_header(_verified(store, card, ref, part), path)


def _verified(store: CacheStore, card: CacheCard, ref: BlockRef, part: Part) -> bytes:
    raw = store.get_block(card.agent.tenant, ref, part)
    if raw is None:
        raise CorruptData(store.block_path(card.agent.tenant, ref, part), "the block is missing")
    return raw
