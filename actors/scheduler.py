"""Whose turn it is, which sequences take part in the next step, and with how many tokens. Pure: no
engine, no clock but the one it is given.

One step: one decode token for every running sequence, with what was drafted to follow it, plus
prefill within a token budget. While others decode, the budget follows the measured speed, so that
an arrival does not stall them; drafts beside a prefill count as tokens of that budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from actors.engines.base import Chunk
from actors.errors import Overloaded
from actors.rates import Pace, Rates
from actors.sequence import Sequence

_AGING_S = 10.0  # of waiting count as one more priority
_MAX_PASSED = 8  # turns that may overtake one which does not fit yet
_RETRY_S = 2.0  # until a turn was measured
_LEAST_RETRY_S, _MOST_RETRY_S = 1.0, 60.0  # the most that OpenAI's SDKs heed
_DRAFT_SHARE = 8  # drafts get one part in so many of a budget for prefill


@dataclass(frozen=True)
class SchedulerConfig:
    max_waiting: int = 64  # turns; one more is refused with 429
    prefill_chunk: int = 512  # tokens per step when nobody decodes, and at most
    prefill_chunk_busy: int = 128  # tokens per step while others decode, until speeds are measured
    max_step_s: float = 0.25  # of a step while others decode; 0: chunks stay as they are


@dataclass(frozen=True)
class Scheduled:
    sequence: Sequence
    n_tokens: int
    draft: tuple[int, ...] = ()  # guesses of what follows the sequence's last token

    def chunk(self) -> Chunk:
        sequence, start = self.sequence, self.sequence.n_rows
        stop = start + self.n_tokens
        n_logits = int(stop == len(sequence.tokens)) + len(self.draft)
        ids = [*sequence.tokens[start:stop], *self.draft]
        return Chunk(sequence.seq_id, ids, start, n_logits)


class Asking(Hashable, Protocol):
    """A turn, as the queue sees it. Higher priorities go first."""

    @property
    def asks_for(self) -> Hashable:
        """The agent."""
        ...

    @property
    def priority(self) -> int: ...


T = TypeVar("T", bound=Asking)


@dataclass(eq=False)
class _Place:
    stamp: int  # order within a priority
    since: float  # waiting counts from here
    passed: int = 0  # turns that overtook it while it did not fit


class Waiting(Generic[T]):
    """Turns that are not in the engine.

    Of one agent only the first counts, and the others begin to wait anew when it is placed: so
    agents take turns, however many turns one of them has queued. Waiting raises the priority, and
    a turn that does not fit is overtaken a few times only: nobody starves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._places: dict[T, _Place] = {}
        self._last = 0  # stamps given
        self._first = 0
        self.changes = 0  # of who waits, and what for

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._places))

    def __contains__(self, turn: object) -> bool:
        return turn in self._places

    def append(self, turn: T) -> None:
        self._places[turn] = _Place(self._stamp(), self._clock())
        self.changes += 1

    def put_back(self, turn: T) -> None:
        """A turn that had to leave the engine: it is the first of its priority."""
        self._first -= 1
        self._places[turn] = _Place(self._first, self._clock())
        self.changes += 1

    def remove(self, turn: T) -> None:
        """The turn ends without having been placed."""
        del self._places[turn]
        self.changes += 1

    def order(self) -> list[T]:
        """The first turn of every agent; those to be placed first come first."""
        now, heads = self._clock(), dict[Hashable, T]()
        for turn in sorted(self._places, key=lambda t: self._places[t].stamp):
            heads.setdefault(turn.asks_for, turn)
        return sorted(heads.values(), key=lambda turn: self._rank(turn, now))

    def place(self, turn: T, overtaken: Collection[T] = ()) -> None:
        """The turn goes to the engine, past those that did not fit."""
        del self._places[turn]
        self.changes += 1
        for other in overtaken:
            self._places[other].passed += 1
        now = self._clock()
        for other, place in self._places.items():
            if other.asks_for == turn.asks_for and place.stamp > 0:
                place.stamp, place.since = self._stamp(), now

    def holds_back(self, turn: T) -> bool:
        """Whether a turn that does not fit has been overtaken often enough."""
        return self._places[turn].passed >= _MAX_PASSED

    def _rank(self, turn: T, now: float) -> tuple[int, int]:
        place = self._places[turn]
        return -turn.priority - int((now - place.since) / _AGING_S), place.stamp

    def _stamp(self) -> int:
        self._last += 1
        return self._last


class Scheduler(Generic[T]):
    """waiting: turns (T) not in the engine; running: sequences in it, higher priorities first."""

    def __init__(
        self,
        config: SchedulerConfig,
        rates: Rates | None = None,
        clock: Callable[[], float] = time.monotonic,
        tile: int = 0,
    ) -> None:
        """`rates` are told what steps take; `tile`: the engine's."""
        self.config, self._rates = config, rates or Rates()
        self.waiting: Waiting[T] = Waiting(clock)
        self.running: list[Sequence] = []
        self.pace = Pace(config.max_step_s, config.prefill_chunk_busy, config.prefill_chunk, tile)

    def check_room(self, arriving: int = 0) -> None:
        """Raises Overloaded when the queue, with the turns on their way to it, is full."""
        waiting = len(self.waiting) + arriving
        if waiting >= self.config.max_waiting:
            raise Overloaded(f"{waiting} turns are waiting already", self._retry_after())

    def _retry_after(self) -> float:
        """Seconds until there probably is room: what a turn took of late, waiting included, in
        which as many leave the queue as run at once, or more. `queue_seconds` would be the time
        until the whole queue is empty, one turn after another."""
        turn_s = self._rates.turn_s
        return _RETRY_S if turn_s is None else min(max(turn_s, _LEAST_RETRY_S), _MOST_RETRY_S)

    def start(self, sequence: Sequence) -> None:
        """The sequence takes part in steps from now on."""
        self.running.append(sequence)
        self.running.sort(key=lambda s: -s.priority)  # stable: the older one first

    def active(self, without: Collection[Sequence] = ()) -> tuple[list[Sequence], list[Sequence]]:
        """(sequences that decode, that are prefilled) in the next step; `without` sit it out."""
        out = {id(s) for s in without}
        active = [s for s in self.running if not s.paused and id(s) not in out]
        return [s for s in active if not s.is_prefill], [s for s in active if s.is_prefill]

    def draft_room(self, decodes: int, prefills: int) -> int:
        """Drafted tokens that so many sequences' step has room for."""
        if prefills:
            return self.pace.chunk(decodes) // _DRAFT_SHARE
        return max(0, self.config.prefill_chunk - decodes)

    def schedule(
        self, without: Collection[Sequence] = (), drafts: Mapping[int, list[int]] | None = None
    ) -> list[Scheduled]:
        """The next step's chunks; empty when nothing can run. `without` sit it out; `drafts` are by
        id(sequence), of sequences that decode.

        The first prefill is sure of half the budget; short ones need not wait for its end.
        """
        drafts = drafts or {}
        decodes, prefills = self.active(without)
        steps = [Scheduled(s, 1, tuple(drafts.get(id(s), ()))) for s in decodes]
        if not prefills:
            return steps
        budget = self.pace.chunk(len(steps)) if steps else self.config.prefill_chunk
        budget = max(1, budget - sum(len(entry.draft) for entry in steps))
        missing = {id(s): s.next_stop - s.n_rows for s in prefills}
        first = prefills[0]
        shares = {id(first): min(-(-budget // 2), missing[id(first)])}
        budget -= shares[id(first)]
        for sequence in sorted(prefills, key=lambda s: (-s.priority, missing[id(s)])):
            share = shares.get(id(sequence), 0)
            more = min(budget, missing[id(sequence)] - share)
            shares[id(sequence)] = share + more
            budget -= more
        return steps + [Scheduled(s, shares[id(s)]) for s in prefills if shares[id(s)]]

    def measure(self, scheduled: list[Scheduled], seconds: float, taken: int = 0) -> None:
        """A step of these chunks took so long; its decodes yielded `taken` tokens, or one each."""
        prefilled = sum(s.n_tokens for s in scheduled if s.n_tokens > 1)
        drafted = sum(len(s.draft) for s in scheduled)
        decoded = sum(s.n_tokens == 1 for s in scheduled)
        if prefilled:
            depth = sum(
                s.n_tokens * (s.sequence.n_rows + s.n_tokens / 2)
                for s in scheduled
                if s.n_tokens > 1
            )
            self._rates.prefill(prefilled, seconds, depth / prefilled)
        else:
            self._rates.decode(seconds * decoded / max(taken, decoded))
        if prefilled or not drafted:
            self.pace.measure(prefilled + drafted if prefilled else 0, decoded, seconds)

    def queue_seconds(self, n_seq_max: int) -> float:
        """Estimate of the time until a turn that arrives now could begin."""
        rates = self._rates.filled()
        missing = sum(len(s.tokens) - s.n_rows for s in self.running if s.is_prefill)
        turns = len(self.waiting) + (len(self.running) >= n_seq_max)
        return missing / rates.prefill_tokens_per_s + turns * rates.turn_s
