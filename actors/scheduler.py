"""Which sequences take part in the next step, and with how many tokens. Pure; no engine.

One step: one decode token for every running sequence, plus prefill of the oldest sequences that
still lack rows, within a token budget. The budget shrinks while others decode, so that an arrival
does not stall them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from actors.errors import Overloaded
from actors.sequence import Sequence


@dataclass(frozen=True)
class SchedulerConfig:
    max_waiting: int = 64  # turns; one more is refused with 429
    prefill_chunk: int = 512  # tokens per step when nobody decodes
    prefill_chunk_busy: int = 128  # tokens per step while others decode


@dataclass(frozen=True)
class Scheduled:
    sequence: Sequence
    n_tokens: int


T = TypeVar("T")


class Scheduler(Generic[T]):
    """waiting: turns (T) not yet in the engine; running: sequences in it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.waiting: deque[T] = deque()
        self.running: list[Sequence] = []

    def check_room(self, arriving: int = 0) -> None:
        """Raises Overloaded when the queue, with the turns on their way to it, is full."""
        waiting = len(self.waiting) + arriving
        if waiting >= self.config.max_waiting:
            raise Overloaded(f"{waiting} turns are waiting already", retry_after=2.0)

    def schedule(self) -> list[Scheduled]:
        """The next step's chunks; empty when nothing can run."""
        active = [s for s in self.running if not s.paused]
        decodes = [s for s in active if not s.is_prefill]
        steps = [Scheduled(s, 1) for s in decodes]
        busy = bool(decodes)
        budget = self.config.prefill_chunk_busy if busy else self.config.prefill_chunk
        for sequence in active:
            if budget and sequence.is_prefill:
                n_tokens = min(budget, len(sequence.tokens) - sequence.n_rows)
                steps.append(Scheduled(sequence, n_tokens))
                budget -= n_tokens
        return steps
