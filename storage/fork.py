"""New agents that begin with a memory: forks of a living agent, and what an import founds.

A fork costs one small file, however long its history: the new agent's claim names the source's
blocks. Both chains are one up to there, so blocks stay shared; later blocks differ by content.
Called by bundle and by what serves forks.
"""

from __future__ import annotations

from dataclasses import replace

from storage.blocks import card_block_names
from storage.card import AgentId, CacheCard
from storage.claims import Claim
from storage.errors import AgentExists, Incompatible
from storage.store import CacheStore


def fork(store: CacheStore, source: AgentId, template: CacheCard) -> Claim | None:
    """Claim the agent that `template` names, with all that `source` remembers now.

    No block is read or written. None when the source is unknown, deleted or cold. Raises
    AgentExists when the new agent lives, Fenced when another creates it meanwhile, Incompatible
    when the codecs differ, ValueError across tenants, and what CacheStore.latest raises.
    """
    if template.agent.tenant != source.tenant:
        raise ValueError(f"{source.tenant}'s agent cannot be forked by {template.agent.tenant}")
    found = store.latest(source, template.key)
    if found is None or found.card.tombstone:
        return None
    if found.card.codec != template.codec:  # stored rows are never encoded again
        raise Incompatible(str(source), [f"codec: {found.card.codec} != {template.codec}"])
    memory = replace(
        template,
        branches=tuple(replace(branch, turn=None) for branch in found.card.branches),
        cache_salt=found.card.cache_salt,
        parent=found.ref,
    )
    return establish(store, memory, named=card_block_names(found.card))


def establish(
    store: CacheStore,
    card: CacheCard,
    *,
    replacing: bool = False,
    named: frozenset[str] = frozenset(),
) -> Claim:
    """Claim a new agent whose memory is the card's; its blocks must be stored already. `named`:
    files of them that another agent's newest card names; the others are looked at.

    Raises AgentExists when the agent lives, unless `replacing`; Fenced when another is faster.
    """
    after = free_epoch(store, card, replacing=replacing)
    return store.claim(card, after=after, inherit=False, named=named)


def free_epoch(store: CacheStore, card: CacheCard, *, replacing: bool = False) -> int:
    """The newest epoch of an agent that may be founded: 0, or a deleted agent's. Raises
    AgentExists."""
    epoch = store.epoch(card.agent, card.key)
    if epoch and not replacing:
        found = store.latest(card.agent, card.key)
        if found is None or not found.card.tombstone:
            raise AgentExists(str(card.agent), epoch)
    return epoch
