"""The turns a replica has taken on, and how far each has come. Used by the loop's thread only."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from actors.errors import ActorError
from actors.prepare import Prepared
from actors.sequence import Sequence
from actors.turn import CacheState, StreamItem, TurnFailed, TurnFinished, TurnRequest
from storage.card import AgentId
from storage.codec import Tensors
from storage.spec import KVRows

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Restore:
    """Rows on their way from pool or store into an empty sequence."""

    seq_id: int
    cache: CacheState  # where the rows come from
    away: CacheState  # the same, for those that are not in RAM
    begin: int = 0  # rows that were in the sequence already
    loaded: int = 0  # rows that are
    rows: queue.SimpleQueue[KVRows | Tensors | None] = field(default_factory=queue.SimpleQueue)
    room: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1))
    began: float = field(default_factory=time.monotonic)
    abandoned: bool = False


@dataclass(eq=False)
class Turn:
    """One submitted turn on its way through the loop."""

    request: TurnRequest
    sink: Callable[[StreamItem], None]
    began: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    prepared: Future[Prepared] | None = None
    _ready: Prepared | None = field(default=None, init=False)
    sequence: Sequence | None = None
    restore: Restore | None = None
    last: TurnFinished | None = None  # held back until the turn's memory is stored
    awaits: Turn | None = None  # whose rows it waits for, or has waited for, to share them
    holds_off: bool = False  # it does so at the moment
    looked: int = 0  # rows, at the last look at what their loss would cost
    failure: ActorError | None = None  # why it was cancelled, unless the client wished it

    def emit(self, item: StreamItem) -> None:
        try:
            self.sink(item)
        except Exception:  # nobody listens any more; the others' turns go on
            logger.exception("the sink of turn %s failed", self.request.id)

    def stopped(self, index: int, text: str) -> StreamItem:
        """The last item of a cancelled turn."""
        if self.failure is not None:
            return TurnFailed(self.request.attempt, self.failure)
        return TurnFinished(self.request.attempt, index, text, "cancelled")

    @property
    def asks_for(self) -> AgentId:
        return self.request.agent

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def preempted(self) -> bool:
        """It has begun, but had to leave the engine, or is on its way back."""
        return self.sequence is not None and self.sequence.seq_id < 0

    @property
    def ready(self) -> Prepared:
        """Only for a turn that is prepared."""
        if self._ready is None:
            assert self.prepared is not None
            self._ready = self.prepared.result(timeout=0)
        return self._ready


@dataclass
class Book:
    """active: the one turn of an agent that is under way; the other fields say where it is."""

    active: dict[AgentId, Turn] = field(default_factory=dict)
    restoring: list[Turn] = field(default_factory=list)
    draining: list[Turn] = field(default_factory=list)
    by_sequence: dict[int, Turn] = field(default_factory=dict)  # id(sequence) -> turn

    def in_engine(self) -> list[Turn]:
        """Every turn that holds a sequence."""
        return [*self.restoring, *self.by_sequence.values()]

    def forget(self, turn: Turn) -> None:
        if self.active.get(turn.request.agent) is turn:
            del self.active[turn.request.agent]
        if turn.sequence is not None:
            self.by_sequence.pop(id(turn.sequence), None)
            turn.sequence.drafting = None  # an index of all its ids: the turn may be known longer
        for turns in (self.restoring, self.draining):
            if turn in turns:
                turns.remove(turn)
