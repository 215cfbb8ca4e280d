"""The source's side of a migration: pre-copy, freeze, then release or thaw. See cluster.migration.

Runs on the loop's thread, between two steps. A frozen agent takes no step until this replica has
itself claimed the next epoch; if the target was faster, it is released. While the store gives no
answer its turns leave, to go on without a memory. What was copied while the agent ran is not copied
again: the rows since then go with the freeze's answer, which waits for the store only where they
are too many. A target that reads this node's disk needs nothing of the store: then all of this is
about the card and the blocks here (`near`).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from actors.book import Book, Turn
from actors.branches import AgentMemory
from actors.coverage import missing
from actors.errors import AgentMoved, EngineFault
from actors.exporter import Exporter, Held, Tail
from actors.futures import done
from actors.memory import Memory
from actors.rates import Rates
from actors.residency import Residency
from storage.card import AgentId, CacheCard
from storage.codec import row_bytes
from storage.errors import Fenced, StorageError, StoreUnavailable
from storage.reader import LoadedCard

logger = logging.getLogger(__name__)
FEW_ROWS = 8  # computed again sooner than stored and read
_FEW_S = 0.01  # on its way with a freeze: another round takes longer
_MOST_BYTES, _MOST_ROWS = 1 << 20, 256  # that go with a freeze rather than through the store
_MOVING_S = 5.0  # between two rounds, or the last one and the freeze
_UNANSWERED_S = 3.0  # a claim back; then the agent's turns go on elsewhere


@dataclass(frozen=True)
class Copied:
    """What can be fetched of an agent. `lacks`: rows of turns under way that the shared store, or
    this node's disk, does not have; None: something of turns that are over, which a migration must
    not lose. `card`: the one on this node's disk; `latest`: the shared store's. branch_id: the one
    that is under way, which has another row every step_s; None: none is. row_bytes: encoded."""

    lacks: int | None
    card: CacheCard | None = None
    latest: LoadedCard | None = None
    branch_id: int | None = None
    step_s: float = math.inf
    row_bytes: int = _MOST_BYTES

    def suffices(self, held: Held, took_s: float, bytes_per_s: float) -> bool:
        """Whether what the target lacks, who now has `held` and took so long to get it, goes with
        the freeze sooner than with another round."""
        if self.lacks is None:
            return False
        few = FEW_ROWS  # are computed again, where there is nothing to append them to
        if held.rows and held.branch_id == self.branch_id:
            few = tail_rows(min(_MOST_BYTES, _FEW_S * bytes_per_s), self.row_bytes)
        return self.lacks + took_s / self.step_s <= few


def tail_rows(n_bytes: float, row_bytes: int) -> int:
    """Rows of so many bytes in all: at least a few, at most a block."""
    return min(max(FEW_ROWS, int(n_bytes) // row_bytes), _MOST_ROWS)


@dataclass(frozen=True)
class Frozen:
    """What the target needs besides: the `card` on this node's disk, if it reads that, the rows of
    the turn under way that it does not have, and the latest card of the shared store.
    waited_s: until the token boundary, while the agent spoke on."""

    card: CacheCard | None = None
    tail: Tail | None = None
    latest: LoadedCard | None = None
    waited_s: float = 0.0


class Handoff:
    """`move(turn)` ends a turn here with TurnMoved; `call` runs a function on the loop's thread."""

    def __init__(
        self,
        memory: Memory,
        book: Book,
        residency: Residency,
        exporter: Exporter,
        rates: Rates,
        move: Callable[[AgentId], None],
        call: Callable[[Callable[[], Any]], object],
        timeout_s: float,
    ) -> None:
        self._memory, self._book, self._residency = memory, book, residency
        self._exporter, self._rates, self._move, self._call = exporter, rates, move, call
        self._timeout_s = timeout_s
        self._row_bytes = row_bytes(memory.key.spec, memory.codec)
        self._deadlines: dict[AgentId, float] = {}
        self._reclaims: dict[AgentId, float] = {}  # until when their claims back are waited for

    def copied(self, agent: AgentId, *, near: bool = False) -> Copied:
        """While the agent runs on. For a while its new rows go with the move, and are not stored
        before they fill a block. Raises AgentMoved."""
        memory = self._owned(agent)
        memory.moving = time.monotonic() + _MOVING_S
        card, lacks = self.card(agent) if near else None, self._missing(memory, near)
        copied = Copied(lacks, card, memory.shared, row_bytes=self._row_bytes)
        if (turn := self._running(memory)) is None:
            return copied
        step_s = self._rates.filled().decode_step_s
        return replace(copied, branch_id=turn.ready.match.branch.id, step_s=step_s)

    def card(self, agent: AgentId) -> CacheCard | None:
        """The last one on this node's disk."""
        memory = self._memory.get(agent)
        return memory.card if memory is not None and self._memory.tiers.local else None

    def precopy(self, agent: AgentId, *, near: bool = False) -> Future[None]:
        """While the agent runs on: hand over what the shared store lacks of it. Done when it has
        been tried. Raises AgentMoved."""
        memory = self._owned(agent)
        return done(None) if self._missing(memory, near) == 0 else self._hand_over(memory, near)

    def missing(self, agent: AgentId, *, near: bool = False) -> int | None:
        """Rows of turns under way that the shared store lacks; None: of turns that are over."""
        memory = self._memory.get(agent)
        return self._missing(memory, near) if memory is not None else None

    def freeze(
        self, agent: AgentId, held: Held | None = None, *, near: bool = False
    ) -> tuple[Tail | None, Future[None]]:
        """Stop the agent at this token boundary. (Rows of its turn that the target, who has `held`,
        lacks, if they can go with the answer; done at once where the shared store lacks no others,
        or few, else when it has been given all). See `lacks_little`.

        Raises AgentMoved when the agent is not owned here.
        """
        memory = self._owned(agent)
        memory.state = "frozen"
        self._deadlines[agent] = time.monotonic() + self._timeout_s
        turn, tail = self._book.active.get(agent), None
        if turn is not None and turn.sequence is not None:
            turn.sequence.paused = True
        running = self._running(memory)
        if running is not None and held is not None:
            try:
                tail = self._exporter.tail(running, held, tail_rows(_MOST_BYTES, self._row_bytes))
            except EngineFault as error:  # they are stored, or computed again
                self._memory.faults.count("engine_refused", error)
        if self.lacks_little(agent, tail, near=near):
            return tail, done(None)
        return tail, self._hand_over(memory, near)

    def lacks_little(self, agent: AgentId, tail: Tail | None, *, near: bool = False) -> bool:
        """Whether the shared store lacks nothing of an agent but what `tail` has, and a few rows of
        turns under way."""
        lacks = self.missing(agent, near=near)
        come = len(tail.tokens) - tail.start if tail is not None else 0
        return lacks is not None and lacks <= come + FEW_ROWS

    def answer(self, agent: AgentId) -> tuple[CacheCard | None, LoadedCard | None]:
        """(the last card on this node's disk, in the shared store) of a frozen agent. From any
        thread. Raises StoreUnavailable when that took so long that it is claimed back."""
        memory, card = self._memory.get(agent), self.card(agent)
        latest = memory.shared if memory is not None else None
        if agent not in self._deadlines:
            raise StoreUnavailable("the store", f"it was too slow to hand over agent {agent}")
        return card, latest

    def _owned(self, agent: AgentId) -> AgentMemory:
        memory = self._memory.get(agent)
        if memory is None or memory.state != "owned":
            raise AgentMoved(f"agent {agent} is not owned here")
        return memory

    def _running(self, memory: AgentMemory) -> Turn | None:
        """The agent's turn with a sequence, whose rows are kept."""
        turn = self._book.active.get(memory.agent)
        begun = turn is not None and turn.sequence is not None
        return turn if turn is not None and begun and turn.ready.memory is memory else None

    def _missing(self, memory: AgentMemory, near: bool) -> int | None:
        turn = self._running(memory)
        n_rows = {}
        if turn is not None and turn.sequence is not None:
            n_rows[turn.ready.match.branch.id] = turn.sequence.n_rows
        windows = self._memory.rows.windows.size > 0
        return missing(memory, n_rows, windows=windows, near=near)

    def _hand_over(self, memory: AgentMemory, near: bool) -> Future[None]:
        turn = self._running(memory)
        if turn is not None and turn.sequence is not None:
            self._exporter.export(turn, turn.sequence.n_rows, wait=False)
            self._exporter.checkpoint(turn)
        self._memory.commits.later(memory)
        return self._memory.commits.settle(memory, near=near)

    def release(self, agent: AgentId) -> None:
        """Another replica owns the agent now: its turns move, its cells are freed."""
        self._settled(agent)
        self._move(agent)
        self.drop(agent)
        memory = self._memory.get(agent)
        if memory is not None:
            self._memory.forget(memory)

    def thaw(self, agent: AgentId) -> None:
        """The migration failed: claim the agent back and go on, or release it."""
        memory = self._memory.get(agent)
        if memory is not None and memory.state == "frozen":
            now = time.monotonic()
            self._deadlines[agent] = now + self._timeout_s
            self._reclaims.setdefault(agent, now + _UNANSWERED_S)
            self._memory.persister.submit(lambda: self._reclaim(memory))

    def thaw_overdue(self) -> None:
        """Migrations that never came back: their agents are frozen no longer than the deadline."""
        now = time.monotonic()
        for agent in [a for a, deadline in self._deadlines.items() if now > deadline]:
            self.thaw(agent)
        for agent in [a for a, deadline in self._reclaims.items() if now > deadline]:
            self._reclaims[agent] = math.inf
            logger.warning("the claim of frozen agent %s has no answer; its turns leave", agent)
            self._memory.outage.began()
            self._move(agent)

    def _settled(self, agent: AgentId) -> None:
        self._deadlines.pop(agent, None)
        self._reclaims.pop(agent, None)

    def drop(self, agent: AgentId) -> None:
        """Free the cells of an agent that has no turn under way."""
        memory = self._memory.get(agent)
        for branch in memory.branches if memory is not None else ():
            self._residency.drop(branch)

    def _reclaim(self, memory: AgentMemory) -> None:
        """On the persister's thread: no commit of the epoch before may be under way."""
        if memory.state != "frozen":
            return
        try:
            self._memory.reclaim(memory)
        except Fenced:
            self._call(lambda: self.release(memory.agent))
        except StorageError as error:  # nobody owns it: stay frozen, try again at the deadline
            logger.warning("cannot claim frozen agent %s back: %s", memory.agent, error)
        else:
            self._call(lambda: self._unpause(memory))

    def _unpause(self, memory: AgentMemory) -> None:
        self._settled(memory.agent)
        self._memory.commits.later(memory)  # what the epoch before could not
        turn = self._book.active.get(memory.agent)
        if turn is not None and turn.sequence is not None:
            turn.sequence.paused = False
