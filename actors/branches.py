"""What an agent's memory consists of, as records: runs of encoded rows, branches, the agent.

Written by actors.memory and actors.rows; no logic but the conversion from and to cards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.turn import CacheState
from storage.card import AgentId, BlockRef, BranchCard, CacheCard, OpenTurn, Reply


@dataclass
class Run:
    """A whole block or a tail segment; `ref` is None until the store has it."""

    id: str
    rows: int
    ref: BlockRef | None = None


@dataclass(eq=False)
class Branch:
    """`tokens` may be longer than the rows that exist. `exported` counts the rows handed to the
    persister or already encoded; the engine exports from there on."""

    id: int
    tokens: list[int] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    blocks: list[Run] = field(default_factory=list)
    tail: list[Run] = field(default_factory=list)
    turn: OpenTurn | None = None
    exported: int = 0
    last_used: float = 0.0

    @property
    def runs(self) -> list[Run]:
        return self.blocks + self.tail

    @property
    def rows(self) -> int:
        """Rows that are encoded."""
        return sum(run.rows for run in self.runs)

    @property
    def last_reply_start(self) -> int:
        if self.turn is not None:
            return self.turn.prompt_tokens
        return self.replies[-1].start if self.replies else len(self.tokens)


@dataclass(eq=False)
class AgentMemory:
    """`card` is the last claim or commit; None for a one-off agent, which has no claim."""

    agent: AgentId
    card: CacheCard | None
    origin: CacheState  # where its rows come from when they are not in RAM: warm or remote
    branches: list[Branch] = field(default_factory=list)
    state: Literal["owned", "frozen", "released"] = "owned"
    last_used: float = field(default_factory=time.time)
    changed: float = field(default_factory=time.time)  # tokens, rows or card, for reports
    commits_queued: int = 0


def positions(branch: Branch) -> Iterator[tuple[int, Run]]:
    """(position of its first row, run) in order."""
    start = 0
    for run in branch.runs:
        yield start, run
        start += run.rows


def branch_of(card: BranchCard) -> Branch:
    return Branch(
        id=card.id,
        tokens=list(card.tokens),
        replies=list(card.replies),
        blocks=[Run(ref.id, ref.rows, ref) for ref in card.blocks],
        tail=[Run(ref.id, ref.rows, ref) for ref in card.tail],
        turn=card.turn,
        exported=card.rows,
        last_used=card.last_used,
    )


def card_of(branch: Branch) -> BranchCard:
    """The branch's tokens as they are now; its rows are added when they are stored."""
    return BranchCard(
        id=branch.id,
        tokens=tuple(branch.tokens),
        replies=tuple(branch.replies),
        turn=branch.turn,
        last_used=branch.last_used,
    )


def with_runs(card: BranchCard, branch: Branch) -> BranchCard:
    """What the store holds of a branch: its runs up to the first that is not stored."""
    stored: list[BlockRef] = []
    for run in branch.runs:
        if run.ref is None:
            break
        stored.append(run.ref)
    n_blocks = len(branch.blocks)
    return replace(card, blocks=tuple(stored[:n_blocks]), tail=tuple(stored[n_blocks:]))
