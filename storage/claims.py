"""Cards as claims make them: the template that names the owner, the epoch's first card."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace

from storage.card import AgentId, CacheCard, Owner
from storage.reader import LoadedCard
from storage.spec import CompatibilityKey


@dataclass(frozen=True)
class Claim:
    """The card that now owns the agent, as it is stored, and the one it started from."""

    stored: LoadedCard
    previous: CacheCard | None

    @property
    def card(self) -> CacheCard:
        return self.stored.card


def new_card(
    agent: AgentId,
    key: CompatibilityKey,
    codec: str,
    owner: Owner,
    *,
    codec_parameters: dict[str, dict[str, int]] | None = None,
    provenance: dict[str, str] | None = None,
) -> CacheCard:
    """A template for claim() and delete(): an agent without memory."""
    return CacheCard(
        agent=agent,
        epoch=0,
        generation=0,
        base=None,
        key=key,
        codec=codec,
        codec_parameters=codec_parameters or {},
        owner=owner,
        nonce="",
        provenance=provenance or {},
    )


def first_card(
    template: CacheCard, epoch: int, found: LoadedCard | None, *, inherit: bool, tombstone: bool
) -> CacheCard:
    """Of an epoch, after the card that was found; what it inherits is still to be added."""
    now = time.time()
    return replace(
        template,
        epoch=epoch,
        generation=0,
        base=found.ref if found else None,
        nonce=secrets.token_hex(16),
        tombstone=tombstone,
        branches=() if inherit else template.branches,
        created=now,
        updated=now,
    )
