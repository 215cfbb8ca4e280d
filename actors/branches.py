"""What an agent's memory consists of, as records: runs of encoded rows, branches, the agent.

Written by actors.memory and actors.rows; no logic but the conversion from and to cards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.turn import CacheState
from storage.card import AgentId, BlockRef, BranchCard, CacheCard, OpenTurn, PartRef, Reply
from storage.codec import Tensors
from storage.peers import BlockSource
from storage.reader import LoadedCard
from storage.spec import CompatibilityKey

Place = Literal["local", "shared"]
Parts = Mapping[str, PartRef]


@dataclass(eq=False)
class Run:
    """A whole block or a tail segment, and where its parts are stored: on this node's disk, in the
    shared store, or nowhere yet. `durable`: a card of the shared store names it. `carried`: sliding
    rows of the segments a block was joined from, until the next checkpoint completes them, and how
    many of its rows lie before their end."""

    id: str
    rows: int
    local: Parts = field(default_factory=dict)
    shared: Parts = field(default_factory=dict)
    durable: bool = False
    has_window: bool = False
    carried: tuple[Tensors, int] | None = None

    def ref(self, place: Place) -> BlockRef | None:
        """What a card may name; None while the full part is not stored. The journal on a node's
        disk also names what the shared store has already."""
        parts = {**self.local, **self.shared} if place == "local" else self.shared
        return BlockRef(self.id, self.rows, parts) if "full" in parts else None

    def stored(self, place: Place) -> BlockRef:
        """The parts that were written to one place."""
        return BlockRef(self.id, self.rows, self.local if place == "local" else self.shared)

    def note(self, place: Place, part: str, ref: PartRef) -> None:
        if place == "local":
            self.local = {**self.local, part: ref}
        else:
            self.shared = {**self.shared, part: ref}

    def lent(self) -> Run:
        """The same rows for another agent, whose card does not name them yet."""
        return Run(self.id, self.rows, self.local, self.shared, has_window=self.has_window)

    def drop_window(self) -> None:
        """No checkpoint needs its sliding part any more."""
        self.local = {k: v for k, v in self.local.items() if k != "sliding"}
        self.shared = {k: v for k, v in self.shared.items() if k != "sliding"}
        self.has_window, self.carried = False, None


@dataclass(eq=False)
class Branch:
    """`tokens` may be longer than the rows that exist. `exported` counts the rows handed to the
    persister or already encoded; the engine exports from there on. `checkpoints` are positions
    whose sliding window is kept, in order (models with sliding windows only)."""

    id: int
    tokens: list[int] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    blocks: list[Run] = field(default_factory=list)
    tail: list[Run] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    turn: OpenTurn | None = None
    exported: int = 0
    windowed: int = 0  # the last checkpoint handed over; 0 where that is not known
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
    """`card` is the last claim or commit; None for a one-off agent, which has no claim. `shared` is
    the last one that the shared store has. `peer`: the disk of the node that had it before. `seen`:
    when a migration's claim was seen to stand, for the turn that follows it. `moving`: until when
    rows of a turn under way go with a migration sooner than into a card."""

    agent: AgentId
    card: CacheCard | None
    origin: CacheState  # where its rows come from when they are not in RAM: warm or remote
    branches: list[Branch] = field(default_factory=list)
    state: Literal["owned", "frozen", "released"] = "owned"
    last_used: float = field(default_factory=time.time)
    changed: float = field(default_factory=time.time)  # tokens, rows or card, for reports
    commits_queued: int = 0
    shared: LoadedCard | None = None
    peer: BlockSource | None = None
    seen: float = -math.inf
    moving: float = -math.inf


@dataclass(frozen=True)
class Before:
    """What the target of a migration has from the owner. handed: its card, whose blocks are on the
    disk of `peer` and, as far as they were fetched, on ours. latest: the card that the shared store
    has."""

    handed: CacheCard | None = None
    peer: BlockSource | None = None
    latest: LoadedCard | None = None

    @property
    def epoch(self) -> int | None:
        """The frozen owner's: whoever claimed the next one before, be it the owner, wins."""
        if self.handed is not None:
            return self.handed.epoch
        return self.latest.ref.epoch if self.latest is not None else None

    def known(self, key: CompatibilityKey) -> LoadedCard | None:
        """`latest`, if it belongs with `handed` and to this key."""
        latest = self.latest
        if latest is None or (latest.card.key, latest.ref.epoch) != (key, self.epoch):
            return None
        return latest


UNKNOWN = Before()


@dataclass(frozen=True)
class BranchState:
    """A branch as a card is to say it: its tokens at one time, with the runs that belong to it."""

    card: BranchCard
    blocks: tuple[Run, ...]
    tail: tuple[Run, ...]
    checkpoints: tuple[int, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        return (*self.blocks, *self.tail)


def state_of(branch: Branch, card: BranchCard) -> BranchState:
    """`card` has the tokens that the branch's present runs belong to."""
    return BranchState(card, tuple(branch.blocks), tuple(branch.tail), tuple(branch.checkpoints))


def positions(branch: Branch) -> Iterator[tuple[int, Run]]:
    """(position of its first row, run) in order."""
    start = 0
    for run in branch.runs:
        yield start, run
        start += run.rows


def durable_rows(branch: Branch) -> int:
    """Rows that survive this node: named by a card of the shared store, without a gap."""
    rows = 0
    for run in branch.runs:
        if not run.durable:
            break
        rows += run.rows
    return rows


def branch_of(card: BranchCard, place: Place) -> Branch:
    """A branch from a card that was read in one place."""

    def run(ref: BlockRef) -> Run:
        made = Run(ref.id, ref.rows, durable=place == "shared", has_window="sliding" in ref.parts)
        for part, stored in ref.parts.items():
            made.note(place, part, stored)
        return made

    return Branch(
        id=card.id,
        tokens=list(card.tokens),
        replies=list(card.replies),
        blocks=[run(ref) for ref in card.blocks],
        tail=[run(ref) for ref in card.tail],
        checkpoints=list(card.checkpoints),
        turn=card.turn,
        exported=card.rows,
        last_used=card.last_used,
    )


def note_shared(branches: Sequence[Branch], card: CacheCard) -> None:
    """What the shared store holds of branches that were read from this node's disk."""
    shared = {ref.id: ref for b in card.branches for ref in (*b.blocks, *b.tail)}
    for run in (run for branch in branches for run in branch.runs):
        if run.id in shared:
            run.shared, run.durable = dict(shared[run.id].parts), True


def note_committed(states: Sequence[BranchState], card: CacheCard) -> None:
    """What the shared store has made of what it was to commit: a condemned block has another file
    now, and one that was gone, with those after it, has none: it is stored again if it can be."""
    for state, branch in zip(states, card.branches, strict=True):
        named = {ref.id: ref.parts for ref in (*branch.blocks, *branch.tail)}
        for run in state.runs:
            parts = named.get(run.id, {})
            run.shared = {part: parts[part] for part in run.shared if part in parts}
            run.durable = "full" in run.shared


def card_of(branch: Branch) -> BranchCard:
    """The branch's tokens as they are now; its rows are added when they are stored."""
    return BranchCard(
        id=branch.id,
        tokens=tuple(branch.tokens),
        replies=tuple(branch.replies),
        turn=branch.turn,
        last_used=branch.last_used,
    )


def with_runs(state: BranchState, place: Place, window: int) -> BranchCard:
    """What one place holds of a branch: its runs up to the first that is not stored there, and the
    checkpoints whose windows of `window` tokens are whole."""
    blocks, tail = _stored(state.blocks, place), _stored(state.tail, place)
    if len(blocks) < len(state.blocks):
        tail = ()
    kept = tuple(at for at in state.checkpoints if _covered((*blocks, *tail), at, window))
    return replace(state.card, blocks=blocks, tail=tail, checkpoints=kept)


def _covered(refs: Sequence[BlockRef], at: int, window: int) -> bool:
    stop = 0
    for ref in refs:
        start, stop = stop, stop + ref.rows
        if start < at and stop > at - window + 1 and "sliding" not in ref.parts:
            return False
    return stop >= at


def _stored(runs: Sequence[Run], place: Place) -> tuple[BlockRef, ...]:
    refs = []
    for run in runs:
        ref = run.ref(place)
        if ref is None:
            break
        refs.append(ref)
    return tuple(refs)
