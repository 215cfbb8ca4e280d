"""Exports read back: opened, held against spec, digests and signature, and stored as new agents.

Nothing in the file is believed. See `bundle` for its layout.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from storage.bundle import PARTS, SCHEMA, Piece, codec_of, piece_of, runs_of
from storage.cache_file import Chain, Header, TensorInfo, parse_header, read_header, sha256, view
from storage.card import BlockRef, BranchCard, CacheCard, PartRef, from_json
from storage.card_json import SCHEMA as CARD_SCHEMA
from storage.card_json import VERSION as CARD_VERSION
from storage.card_json import version_of
from storage.claims import Claim
from storage.codec import check_tensors
from storage.errors import CorruptData, Incompatible, StoreUnavailable, Unsupported
from storage.fork import establish, free_epoch
from storage.store import CacheStore
from storage.tiers import pack_block

MAX_TOKENS = 1 << 23  # of all branches
_SCHEMA = re.compile(r"kvferry\.export\.v([1-9][0-9]{0,5})\Z")
_U8 = np.dtype("u1")

Read = Callable[[int, int], bytes]  # (start, stop) -> those bytes of the file


@dataclass(frozen=True)
class Bundle:
    """An export whose head is sound; its rows are read when it is imported."""

    path: str
    card: CacheCard
    signed: bool  # by the key it was opened with
    pieces: tuple[Piece, ...]
    digests: tuple[str, ...]  # of the pieces, hex
    read: Read


def open_file(url: str) -> tuple[Read, int]:
    """A path or an fsspec URL as ranged reads, and its size. Raises FileNotFoundError,
    StoreUnavailable."""
    if "://" not in url:
        url = f"file://{Path(url).expanduser().absolute()}"
    try:
        fs, path = fsspec.core.url_to_fs(url)
        size = int(fs.size(path))
    except FileNotFoundError:
        raise
    except Exception as error:  # any backend's
        raise StoreUnavailable(url, repr(error)) from error

    def read(start: int, stop: int) -> bytes:
        try:
            raw: bytes = fs.cat_file(path, start=start, end=stop)
        except Exception as error:
            raise StoreUnavailable(url, repr(error)) from error
        return raw

    return read, size


def open_bundle(read: Read, size: int, path: str, *, signing_key: bytes | None = None) -> Bundle:
    """Read and verify all but the rows.

    Raises CorruptData, Unsupported for an export of a newer kvferry, Incompatible for an unknown
    codec, and what `read` raises.
    """
    header = read_header(read, path)
    if header.size != size:
        raise CorruptData(path, f"{size} bytes, the header says {header.size}")
    token_names = [name for name in header.tensors if name.startswith("tokens.")]
    head_end = max((header.tensors[name].stop for name in token_names), default=header.data)
    if head_end - header.data > 4 * MAX_TOKENS:
        raise CorruptData(path, f"more than {MAX_TOKENS} token ids")
    head = _exactly(read, 0, head_end, path)
    header = parse_header(head, path)  # what is sealed, should the file change meanwhile
    tables = _by_run(header, path)
    digests = _matrix(header, "digests", (len(tables), 32), read, path)
    signed = _check_seal(header, head + digests.tobytes(), read, path, signing_key)
    card = _card(header, head, token_names, path)
    pieces = _pieces(card, tables, path)
    _check_order(header, [header.tensors[name] for name in token_names], pieces, path)
    hexes = tuple(row.tobytes().hex() for row in digests)
    return Bundle(path, card, signed, tuple(pieces), hexes, read)


def _exactly(read: Read, start: int, stop: int, path: str) -> bytes:
    raw = read(start, stop) if stop > start else b""
    if len(raw) != stop - start:
        raise CorruptData(path, f"ends at byte {start + len(raw)}, not at {stop}")
    return raw


def _matrix(
    header: Header, name: str, shape: tuple[int, ...], read: Read, path: str
) -> NDArray[np.uint8]:
    info = header.tensors.get(name)
    if info is None or info.dtype != _U8 or info.shape != shape:
        raise CorruptData(path, f"{name} is no uint8 tensor of shape {shape}")
    return view(_exactly(read, info.start, info.stop, path), info, info.start)


def _by_run(header: Header, path: str) -> dict[tuple[int, str], dict[str, TensorInfo]]:
    """(run, part) -> tensors, as the header lists them."""
    tables: dict[tuple[int, str], dict[str, TensorInfo]] = {}
    for name, info in header.tensors.items():
        match = re.match(r"runs\.(0|[1-9][0-9]{0,8})\.((full|sliding)\.[a-z0-9._]+)\Z", name)
        if match:
            tables.setdefault((int(match[1]), match[3]), {})[match[2]] = info
        elif not name.startswith("tokens.") and name not in ("digests", "seal", "signature"):
            raise CorruptData(path, f"unknown tensor {name}")
    return tables


def _check_seal(
    header: Header, sealed: bytes, read: Read, path: str, signing_key: bytes | None
) -> bool:
    """Raises CorruptData for damage. Whether our own key signed the file: a foreign signature is no
    fault, and earns no trust."""
    found = _matrix(header, "seal", (32,), read, path)
    if not hmac.compare_digest(found.tobytes(), hashlib.sha256(sealed).digest()):
        raise CorruptData(path, "sha256 does not match")
    if "signature" not in header.tensors:
        return False
    signature = _matrix(header, "signature", (32,), read, path)
    if signing_key is None:
        return False
    return hmac.compare_digest(signature.tobytes(), hmac.digest(signing_key, sealed, "sha256"))


def _card(header: Header, head: bytes, token_names: list[str], path: str) -> CacheCard:
    schema, card_schema = header.metadata.get("schema"), header.metadata.get("card_schema")
    match = _SCHEMA.match(schema) if isinstance(schema, str) else None
    if match is None:
        raise CorruptData(path, f"schema {schema!r} is not {SCHEMA}")
    if int(match[1]) > 1:
        raise Unsupported(path, str(schema), SCHEMA)
    tokens: dict[str, NDArray[Any]] = {
        name: view(head, header.tensors[name]) for name in token_names
    }
    try:
        version = version_of(card_schema)
        if version > CARD_VERSION:
            raise Unsupported(path, str(card_schema), CARD_SCHEMA)
        return from_json(header.metadata["card"], tokens, version)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(path, f"malformed card ({error!r})") from error


def _pieces(
    card: CacheCard, tables: Mapping[tuple[int, str], Mapping[str, TensorInfo]], path: str
) -> list[Piece]:
    """The parts that the card names, in its order; no more and no fewer are in the file."""
    try:
        runs = runs_of(card)
    except ValueError as error:
        raise CorruptData(path, str(error)) from error
    named = {(n, part): ref for n, ref in enumerate(runs) for part in PARTS if part in ref.parts}
    if named.keys() != tables.keys():
        raise CorruptData(path, "the file does not hold the blocks that its card names")
    return [piece_of(card, ref, at[1], tables[at], path) for at, ref in named.items()]


def _check_order(header: Header, tokens: list[TensorInfo], pieces: list[Piece], path: str) -> None:
    """Tokens, pieces, trailer: what the seal does not cover is covered by the digests."""
    trailer = [header.tensors[name] for name in ("digests", "seal")]
    trailer += [header.tensors[name] for name in ("signature",) if name in header.tensors]
    end = max((info.stop for info in tokens), default=header.data)
    spans = [(x.start, x.stop) for x in pieces] + [(x.start, x.stop) for x in trailer]
    for start, stop in spans:
        if start != end:
            raise CorruptData(path, f"rows or trailer start at byte {start}, not at {end}")
        end = stop


# ---- import


def import_bundle(
    store: CacheStore,
    bundle: Bundle,
    template: CacheCard,
    *,
    n_vocab: int | None = None,
    replacing: bool = False,
) -> Claim:
    """Store the rows and claim the agent that `template` names: blocks first, the claim last.

    `n_vocab`: the size of the model's vocabulary, None when nobody here knows. Raises Incompatible,
    naming the fields, CorruptData, AgentExists unless `replacing`, Fenced, StoreUnavailable.
    """
    card, path = bundle.card, bundle.path
    fields = template.key.mismatches(card.key)
    if template.codec != card.codec:  # stored rows are never encoded again
        fields.append(f"codec: {card.codec} != {template.codec}")
    if fields:
        raise Incompatible(path, fields)
    for branch in card.branches:
        if n_vocab is not None and max(branch.tokens, default=0) >= n_vocab:
            raise CorruptData(path, f"a token id outside the vocabulary of {n_vocab}")
    free_epoch(store, template, replacing=replacing)
    trusted = bundle.signed and card.agent.tenant == template.agent.tenant
    salt = card.cache_salt if trusted else secrets.token_hex(16)
    chain = Chain(card.key.digest, card.codec, template.agent.tenant, salt)
    ids = _renamed(card, chain, path)
    if trusted and any(old != new for old, new in ids.items()):
        raise CorruptData(path, "a block's id does not follow from its tokens")
    parts: dict[str, dict[str, PartRef]] = {}
    for piece, digest in zip(bundle.pieces, bundle.digests, strict=True):
        raw = _block_file(bundle, piece, digest, ids[piece.ref.id])
        new_id = ids[piece.ref.id]
        stored = store.put_block(template.agent.tenant, new_id, piece.part, raw)
        parts.setdefault(piece.ref.id, {})[piece.part] = stored
    origin = f"{card.agent.tenant}/{card.agent} {card.epoch}-{card.generation}"
    memory = replace(
        template,
        branches=tuple(_branch(branch, ids, parts) for branch in card.branches),
        cache_salt=salt,
        codec_parameters=card.codec_parameters,
        provenance={**card.provenance, "imported": origin},
    )
    return establish(store, memory, replacing=replacing)


def _renamed(card: CacheCard, chain: Chain, path: str) -> dict[str, str]:
    """Id in the file -> id in the chain. Raises CorruptData when they are not one to one, which
    would let a small file write the same rows many times."""
    size, ids = card.key.spec.block_tokens, dict[str, str]()

    def rename(ref: BlockRef, new: str) -> None:
        if ids.setdefault(ref.id, new) != new:
            raise CorruptData(path, f"block {ref.id} is used for different tokens")

    for branch in card.branches:
        parent = ""
        for n, ref in enumerate(branch.blocks):
            parent = chain.block_id(parent, branch.tokens[n * size : (n + 1) * size])
            rename(ref, parent)
        start = filled = size * len(branch.blocks)
        for ref in branch.tail:
            in_block = branch.tokens[start : filled + ref.rows]
            rename(ref, chain.segment_id(parent, in_block, filled - start))
            filled += ref.rows
    if len(set(ids.values())) != len(ids):
        raise CorruptData(path, "two blocks for the same tokens")
    return ids


def _block_file(bundle: Bundle, piece: Piece, digest: str, block_id: str) -> bytes:
    """The block's file, made of its verified rows."""
    card, path = bundle.card, bundle.path
    raw = _exactly(bundle.read, piece.start, piece.stop, path)
    if sha256(raw) != digest:
        raise CorruptData(path, f"sha256 of block {piece.ref.id} does not match")
    tensors = {name: view(raw, info, piece.start) for name, info in piece.tensors.items()}
    for name, x in tensors.items():
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise CorruptData(path, f"{name} of block {piece.ref.id} is not finite")
    codec = codec_of(card, path)
    check_tensors(card.key.spec, codec, tensors, piece.rows, path, piece.part)
    return pack_block(codec, block_id, piece.rows, tensors, piece.part)


def _branch(
    branch: BranchCard, ids: Mapping[str, str], parts: Mapping[str, Mapping[str, PartRef]]
) -> BranchCard:
    def moved(ref: BlockRef) -> BlockRef:
        return BlockRef(ids[ref.id], ref.rows, {part: parts[ref.id][part] for part in ref.parts})

    return replace(
        branch,
        blocks=tuple(moved(ref) for ref in branch.blocks),
        tail=tuple(moved(ref) for ref in branch.tail),
        turn=None,
    )
