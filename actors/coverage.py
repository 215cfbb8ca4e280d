"""What would a replica miss that took an agent over now, from the last card of the shared store, or
of this node's own disk?

The ids of turns under way are in the ingress's log; all else is where the rows are, or nowhere.
"""

from __future__ import annotations

from actors.branches import AgentMemory, Branch
from actors.prompt import common_prefix
from storage.card import BranchCard


def missing(
    memory: AgentMemory, n_rows: dict[int, int], *, windows: bool, near: bool = False
) -> int | None:
    """Rows of turns under way that it would compute again; `n_rows`: by branch id, those that are
    computed. `near`: from the card on this node's disk. None: something of turns that are over is
    missing, and must not get lost."""
    stored = memory.shared.card if memory.shared is not None else None
    last = memory.card if near else stored
    named = last.branches if last is not None else ()
    cards = {card.id: card for card in named}
    total = 0
    for branch in memory.branches:
        card = cards.get(branch.id, BranchCard(branch.id, ()))
        if card.replies[: len(branch.replies)] != tuple(branch.replies):
            return None
        if branch.turn is None:
            if card.rows != branch.exported or list(card.tokens) != branch.tokens:
                return None
            continue
        held = max(branch.exported, n_rows.get(branch.id, 0))
        total += max(0, held - _usable(branch, card, windows=windows))
    return total


def _usable(branch: Branch, card: BranchCard, *, windows: bool) -> int:
    """Rows of the card from which the branch can go on."""
    rows = min(card.rows, common_prefix(card.tokens, branch.tokens))
    if not windows:
        return rows
    return max((at for at in card.checkpoints if at <= rows), default=0)
