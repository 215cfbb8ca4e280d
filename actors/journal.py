"""Is this node's own card of an agent ahead of the shared store's?

With a local tier, commits go to the node's disk first. A replica that starts again, or claims an
agent, finds there what the shared store had not caught up with; one that takes an agent over in a
migration gets the card of the node that had it. Reads and forgets, claims nothing.
"""

from __future__ import annotations

from actors.branches import Parts, Run
from storage.card import AgentId, CacheCard, Owner
from storage.local import LocalTier


def goes_on(handed: CacheCard, shared: CacheCard | None) -> bool:
    """Whether the card of an owner that hands its agent over says more than the shared store's
    newest. Of its epoch nobody else has written one, and the store has caught up, or has not."""
    if shared is None or shared.tombstone or handed.epoch != shared.epoch:
        return False
    return handed.branches != shared.branches


def held(local: LocalTier, agent: AgentId, run: Run) -> Parts:
    """The parts of a run that are on this node's disk, kept there for the agent's next card."""
    found = {part: local.hold(agent, run.id, part, ref) for part, ref in run.local.items()}
    return {part: ref for part, ref in found.items() if ref is not None}


def ahead(
    local: LocalTier | None, owner: Owner, agent: AgentId, shared: CacheCard | None
) -> CacheCard | None:
    """The node's card, if it goes on from `shared`, the agent's newest in the shared store. One of
    an epoch that is over is forgotten: another node has had the agent since."""
    loaded = local.card(agent) if local is not None else None
    if local is None or loaded is None:
        return None
    card = loaded.card
    if shared is None:
        return None  # not known there, or not mounted yet: nothing is decided
    if not shared.tombstone:
        if (card.epoch, card.generation) > (shared.epoch, shared.generation):
            return card if card.epoch == shared.epoch else None
        ours = shared.generation == 0 and shared.owner.node == owner.node
        base = shared.base  # of a claim after which we died
        if ours and base and base.epoch == card.epoch and card.generation > base.generation:
            return card
    local.forget(agent, card.epoch)
    return None
