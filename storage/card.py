"""CacheCard: what an agent's memory is, whose, under which key, from which blocks.

A card describes the whole agent, all its branches, so that ownership is one fact: the file
`<epoch>-<generation>` in the agent's folder. It is a safetensors file: the description is canonical
JSON in the metadata, token ids are uint32 tensors (`tokens.<branch>`). A seal (sha256, or
HMAC-SHA256 when a signing key is configured) covers both.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage import cache_file
from storage.card_json import SCHEMA, VERSION, check, upgraded, version_of
from storage.codec import Tensors
from storage.errors import CorruptData, Incompatible, Unsupported
from storage.spec import CompatibilityKey, canonical_json

# \Z, not $: that also matches before a line break at the end.
_NAME = re.compile(r"([0-9]{8})-([0-9]{8})\.safetensors\Z")
TENANT_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}\Z")


@dataclass(frozen=True)
class AgentId:
    """Who: a session of a tenant, and optionally one agent inside that session."""

    tenant: str
    session: str
    name: str = ""

    def __str__(self) -> str:
        return f"{self.session}/{self.name}" if self.name else self.session

    def digest(self, key_digest: str) -> str:
        """The agent's folder name: safe on every file system, whatever the session is called."""
        fields = canonical_json([self.tenant, self.session, self.name, key_digest])
        return hashlib.sha256(b"kvferry.agent.v1" + fields).hexdigest()[:40]


@dataclass(frozen=True)
class PartRef:
    """One stored file: hex sha256 and length of its bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class BlockRef:
    """A whole block, or a tail segment of `rows` rows."""

    id: str
    rows: int
    # "full", and "sliding" where a checkpoint needs it: there perhaps only the last of the rows
    parts: Mapping[str, PartRef]

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts.values())


@dataclass(frozen=True)
class Reply:
    """tokens[start:stop] were emitted as an assistant message; the client saw their text + tail.

    `tail` is the text of a token that a stop string cut: shown, but not in the cache.
    """

    start: int
    stop: int
    tail: str = ""


@dataclass(frozen=True)
class OpenTurn:
    """A turn that was running when the card was written: its id, and where its prompt ends."""

    id: str
    prompt_tokens: int


@dataclass(frozen=True)
class BranchCard:
    """One line of the agent's history. `tokens` may be longer than blocks + tail cover."""

    id: int
    tokens: tuple[int, ...]
    blocks: tuple[BlockRef, ...] = ()
    tail: tuple[BlockRef, ...] = ()
    replies: tuple[Reply, ...] = ()
    checkpoints: tuple[int, ...] = ()  # positions whose sliding window is kept
    turn: OpenTurn | None = None
    last_used: float = 0.0  # unix seconds

    @property
    def rows(self) -> int:
        """Tokens whose KV is stored."""
        return sum(ref.rows for ref in (*self.blocks, *self.tail))


@dataclass(frozen=True)
class CardRef:
    """One exact card."""

    epoch: int
    generation: int
    sha256: str


@dataclass(frozen=True)
class Owner:
    """The replica that claimed an epoch; `incarnation` tells two lives of one node apart."""

    node: str
    incarnation: str


@dataclass(frozen=True)
class CacheCard:
    agent: AgentId
    epoch: int
    generation: int
    base: CardRef | None  # the card this epoch started from
    key: CompatibilityKey
    codec: str
    codec_parameters: Mapping[str, Mapping[str, int]]  # "full.0.k" -> what a foreign reader needs
    owner: Owner
    nonce: str
    branches: tuple[BranchCard, ...] = ()
    cache_salt: str = ""
    tombstone: bool = False
    parent: CardRef | None = None  # the card of the agent this one was forked from
    provenance: Mapping[str, str] = field(default_factory=dict)  # engine, build
    created: float = 0.0  # unix seconds
    updated: float = 0.0

    @property
    def name(self) -> str:
        return card_name(self.epoch, self.generation)

    @property
    def bytes_stored(self) -> int:
        """Bytes of the blocks and segments it names, each counted once."""
        refs = {ref.id: ref.size for b in self.branches for ref in (*b.blocks, *b.tail)}
        return sum(refs.values())


def card_name(epoch: int, generation: int) -> str:
    return f"{epoch:08d}-{generation:08d}.safetensors"


def parse_name(name: str) -> tuple[int, int] | None:
    """(epoch, generation), or None for a file that is no card."""
    match = _NAME.match(name)
    return (int(match[1]), int(match[2])) if match else None


def encode_card(card: CacheCard, signing_key: bytes | None = None) -> bytes:
    """The card's file. Raises ValueError for a card that decode_card would refuse."""
    description, tensors = to_json(card), token_tensors(card)
    check(description, {name: x.size for name, x in tensors.items()})
    seal = _seal(SCHEMA, description, tensors, signing_key)
    return cache_file.save(tensors, {"schema": SCHEMA, "card": description, "seal": seal})


def decode_card(
    raw: bytes,
    path: str,
    *,
    key: CompatibilityKey | None = None,
    signing_key: bytes | None = None,
) -> CacheCard:
    """Read and verify. Raises CorruptData, Unsupported for a sound card of a newer version, or
    Incompatible when `key` is given and differs."""
    tensors, metadata = cache_file.load(raw, path)
    schema, description, seal = (metadata.get(name) for name in ("schema", "card", "seal"))
    if not isinstance(description, dict) or not isinstance(seal, dict):
        raise CorruptData(path, "card or seal is missing")
    try:
        version = version_of(schema)
    except ValueError as error:
        raise CorruptData(path, str(error)) from error
    expected = _seal(str(schema), description, tensors, signing_key)
    if seal.get("kind") != expected["kind"]:
        raise CorruptData(path, f"sealed by {seal.get('kind')}, wanted {expected['kind']}")
    if not hmac.compare_digest(str(seal.get("value")), expected["value"]):
        raise CorruptData(path, f"{expected['kind']} does not match")
    if version > VERSION:
        raise Unsupported(path, str(schema), SCHEMA)
    try:
        card = from_json(description, tensors, version)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(path, f"malformed card ({error!r})") from error
    if key is not None and key != card.key:
        raise Incompatible(path, key.mismatches(card.key))
    return card


def _seal(
    schema: str,
    description: dict[str, Any],
    tensors: Mapping[str, Any],
    signing_key: bytes | None,
) -> dict[str, str]:
    """The rule is the same in every version, so that a newer card is told from a damaged one. Only
    version 1 leaves its own name out."""
    digest = hmac.new(signing_key, digestmod=hashlib.sha256) if signing_key else hashlib.sha256()
    if version_of(schema) > 1:
        digest.update(canonical_json(schema))
    digest.update(canonical_json(description))
    for name in sorted(tensors):
        digest.update(canonical_json([name, tensors[name].size]))
        digest.update(tensors[name].tobytes())
    return {"kind": "hmac-sha256" if signing_key else "sha256", "value": digest.hexdigest()}


# ---- JSON and tensors


def to_json(card: CacheCard) -> dict[str, Any]:
    """Everything but the token ids."""
    bare = replace(card, branches=tuple(replace(b, tokens=()) for b in card.branches))
    description = asdict(bare)
    description["key"] = card.key.to_json()
    for entry in description["branches"]:
        del entry["tokens"]
    return description


def token_tensors(card: CacheCard) -> Tensors:
    """`tokens.<branch>` -> uint32. Raises OverflowError for an id that is none."""
    return {f"tokens.{b.id}": np.asarray(b.tokens, dtype=np.uint32) for b in card.branches}


def from_json(
    description: dict[str, Any], tensors: Mapping[str, NDArray[Any]], version: int = VERSION
) -> CacheCard:
    """A card from a description of `version`, which may be an older one, and its token_tensors.
    Raises ValueError, TypeError, KeyError or AttributeError for what describes no card."""
    for name, array in tensors.items():
        if array.dtype != np.dtype("<u4") or array.ndim != 1:
            raise TypeError(f"tensor {name} is {array.dtype}{array.shape}, no token ids")
    data = upgraded(description, version)
    check(data, {name: x.size for name, x in tensors.items()})
    simple = {
        name: data[name]
        for name in (
            "epoch", "generation", "codec", "codec_parameters", "nonce", "cache_salt",
            "tombstone", "provenance", "created", "updated",
        )
    }  # fmt: skip
    return CacheCard(
        agent=AgentId(**data["agent"]),
        base=CardRef(**data["base"]) if data["base"] else None,
        parent=CardRef(**data["parent"]) if data["parent"] else None,
        key=CompatibilityKey.from_json(data["key"]),
        owner=Owner(**data["owner"]),
        branches=tuple(_branch(entry, tensors) for entry in data["branches"]),
        **simple,
    )


def _branch(data: Mapping[str, Any], tensors: Mapping[str, Any]) -> BranchCard:
    return BranchCard(
        id=data["id"],
        tokens=tuple(tensors[f"tokens.{data['id']}"].tolist()),
        blocks=tuple(_block_ref(ref) for ref in data["blocks"]),
        tail=tuple(_block_ref(ref) for ref in data["tail"]),
        replies=tuple(Reply(**reply) for reply in data["replies"]),
        checkpoints=tuple(data["checkpoints"]),
        turn=OpenTurn(**data["turn"]) if data["turn"] else None,
        last_used=data["last_used"],
    )


def _block_ref(data: Mapping[str, Any]) -> BlockRef:
    parts = {name: PartRef(**part) for name, part in data["parts"].items()}
    return BlockRef(id=data["id"], rows=data["rows"], parts=parts)
