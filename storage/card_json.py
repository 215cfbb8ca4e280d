"""A card's description as JSON: its schema versions, and what a sound one looks like.

A reader takes its own version and all older ones: an old description goes through UPGRADES, one
small function per version, and is then checked and read as if it had been written today. A newer
one is refused as Unsupported, which is no damage: nothing may set it aside or claim past it.
Knows JSON only; `card` makes records of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from storage.spec import DIGEST

VERSION = 1
SCHEMA = f"kvferry.card.v{VERSION}"
# version -> the description of that version as the next version has it; the argument may be changed
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

MAX_BRANCHES = 1024
MAX_EPOCH = 99_999_999  # eight digits of a file name; generations, too
_MAX_BYTES = 1 << 48
_MAX_SECONDS = 1e12
_SCHEMA = re.compile(r"kvferry\.card\.v([1-9][0-9]{0,5})\Z")
_FIELDS = {
    "agent", "epoch", "generation", "base", "key", "codec", "codec_parameters", "owner", "nonce",
    "branches", "cache_salt", "tombstone", "parent", "provenance", "created", "updated",
}  # fmt: skip
_BRANCH_FIELDS = {"id", "blocks", "tail", "replies", "checkpoints", "turn", "last_used"}


def version_of(schema: object) -> int:
    """Raises ValueError for what is no schema of a card."""
    match = _SCHEMA.match(schema) if isinstance(schema, str) else None
    if match is None:
        raise ValueError(f"schema {schema!r} is not {SCHEMA}")
    return int(match[1])


def upgraded(description: dict[str, Any], version: int) -> dict[str, Any]:
    """A description of `version` as the newest version has it."""
    while version in UPGRADES:
        description = UPGRADES[version](description)
        version += 1
    return description


def check(card: Mapping[str, Any], tokens: Mapping[str, int]) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError for a description that no writer
    makes; `tokens` is the number of token ids of every `tokens.<branch>`."""
    _fields(card, _FIELDS)
    _texts(*card["agent"].values(), *card["owner"].values())
    _texts(card["codec"], card["nonce"], card["cache_salt"])
    _texts(*card["provenance"].keys(), *card["provenance"].values())
    for numbers in card["codec_parameters"].values():
        for number in numbers.values():
            _count(number, _MAX_BYTES)
    if type(card["tombstone"]) is not bool:
        raise TypeError(f"tombstone {card['tombstone']!r}")
    _times(card["created"], card["updated"])
    for ref in (card, card["base"], card["parent"]):
        if ref is not None:
            _count(ref["epoch"], MAX_EPOCH)
            _count(ref["generation"], MAX_EPOCH)
    for ref in (card["base"], card["parent"]):
        if ref is not None:
            _digest(ref["sha256"])
    if len(card["branches"]) > MAX_BRANCHES:
        raise ValueError(f"{len(card['branches'])} branches")
    for branch in card["branches"]:
        _count(branch["id"], MAX_EPOCH)
    names = [f"tokens.{branch['id']}" for branch in card["branches"]]
    if sorted(names) != sorted(tokens):
        raise ValueError(f"branches {sorted(names)} with {sorted(tokens)}")
    for name, branch in zip(names, card["branches"], strict=True):
        _check_branch(branch, tokens[name], card["key"]["spec"]["block_tokens"])


def _check_branch(branch: Mapping[str, Any], n_tokens: int, block_tokens: int) -> None:
    _fields(branch, _BRANCH_FIELDS)
    for ref in (*branch["blocks"], *branch["tail"]):
        _check_ref(ref)
    if any(ref["rows"] != block_tokens for ref in branch["blocks"]):
        raise ValueError(f"a block has {block_tokens} rows")
    tail = [ref["rows"] for ref in branch["tail"]]
    if 0 in tail or sum(tail) >= max(block_tokens, 1):
        raise ValueError(f"a tail of {tail} rows")
    rows = block_tokens * len(branch["blocks"]) + sum(tail)
    if rows > n_tokens:
        raise ValueError(f"{rows} rows of {n_tokens} tokens")
    for reply in branch["replies"]:
        _texts(reply["tail"])
        _count(reply["stop"], n_tokens)
        _count(reply["start"], reply["stop"])
    for position in branch["checkpoints"]:
        _count(position, n_tokens)
    if branch["turn"] is not None:
        _texts(branch["turn"]["id"])
        _count(branch["turn"]["prompt_tokens"], n_tokens)
    _times(branch["last_used"])


def _check_ref(ref: Mapping[str, Any]) -> None:
    _digest(ref["id"])
    _count(ref["rows"], _MAX_BYTES)
    if not ref["parts"] or not ref["parts"].keys() <= {"full", "sliding"}:
        raise ValueError(f"unknown parts {sorted(ref['parts'])}")
    for part in ref["parts"].values():
        _digest(part["sha256"])
        _count(part["size"], _MAX_BYTES)


def _fields(entry: Mapping[str, Any], names: set[str]) -> None:
    if entry.keys() != names:
        raise ValueError(f"fields missing or unknown: {sorted(entry.keys() ^ names)}")


def _count(value: object, limit: int) -> None:
    if type(value) is not int or not 0 <= value <= limit:  # True is an int, too
        raise ValueError(f"{value!r} is no count up to {limit}")


def _digest(value: object) -> None:
    if not isinstance(value, str) or not DIGEST.match(value):  # it becomes a file name
        raise ValueError(f"{value!r} is no digest")


def _texts(*values: object) -> None:
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} are no texts")


def _times(*values: object) -> None:
    for value in values:
        if not isinstance(value, (int, float)) or not 0 <= value <= _MAX_SECONDS:
            raise ValueError(f"{value!r} is no time")
