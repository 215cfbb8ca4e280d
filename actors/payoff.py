"""Whether drafts pay, and how many: from measured times of steps and acceptance. Pure; no clock.

A step of d sequences with x drafted tokens takes T(d, x), and yields one token for each sequence
plus one for each draft accepted. Where T rises as fast as x, as on a CPU that several sequences
keep busy, drafts lose. What has not been measured is believed to cost nothing more, is tried, a few
more at a time, and is known then; what did not pay is tried again rarely.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_GAIN = 1.05  # expected tokens/s, against none: less is noise
_LOSS = 0.9  # what no sequence may fall below, for the sake of the others
_COMPARE_EVERY = 32  # steps with drafts; then one with none, with one more, or with one fewer
_PROBE_EVERY, _PROBE_AT_MOST = 64, 4096  # steps without; doubled as long as it does not pay
_FIRST = 4  # drafts of a first trial; then twice as many as have been measured
_KEPT = 5  # of the last times; the median counts, so that one slow step decides nothing

Drafted = tuple[float, int]  # (chance that it is accepted, index of its sequence)


@dataclass(frozen=True)
class Offer:
    """A sequence of the next step: up to `most` drafted tokens, each right with `rate` if those
    before it are. `hope` is what a trial reckons with, where only drafting can tell."""

    rate: float
    most: int
    hope: float = 0.0


class StepTimes:
    """Seconds of a step of d sequences with x drafted tokens."""

    def __init__(self) -> None:
        self._times: dict[int, dict[int, deque[float]]] = {}

    def measure(self, d: int, x: int, seconds: float) -> None:
        self._times.setdefault(d, {}).setdefault(x, deque(maxlen=_KEPT)).append(seconds)

    def reach(self, d: int) -> int:
        """Drafted tokens that may be tried next, at most."""
        return max(_FIRST, 2 * max(self._times.get(d, {0: ()})))

    def of(self, d: int, x: int) -> float | None:
        """Between measured points a line, beyond them the last; None: nothing is known of d."""
        known = self._times.get(d)
        if known is None or 0 not in known:
            return None
        at = sorted(known)
        right = bisect_right(at, x)
        below = at[right - 1]
        low = _median(known[below])
        if below == x or right == len(at):
            return low
        high = _median(known[at[right]])
        return low + (high - low) * (x - below) / (at[right] - below)


class Payoff:
    """Chooses the number of drafted tokens of a step."""

    def __init__(self, max_step_s: float) -> None:
        """max_step_s: of a step in which more than one sequence decodes; 0: any."""
        self.times = StepTimes()
        self.draft_s = 0.0  # of a drafter, for one more token
        self._max_step_s = max_step_s
        self._steps = 0  # since the last that went against the choice
        self._compared = 0
        self._probe_every = _PROBE_EVERY

    def measure(self, d: int, x: int, seconds: float) -> None:
        self.times.measure(d, x, seconds)

    def choose(self, offers: Sequence[Offer]) -> list[int]:
        """Drafted tokens for each; now and then against its own judgement, to measure again."""
        d = len(offers)
        if self.times.of(d, 0) is None or not any(o.most for o in offers):
            return [0] * d
        self._steps += 1
        likely = _likely(offers)
        x = self._best(d, likely)
        if x:
            self._probe_every = _PROBE_EVERY
            if self._steps >= _COMPARE_EVERY:
                self._steps, self._compared = 0, self._compared + 1
                x = (0, x + 1, 0, x - 1)[self._compared % 4]
        elif self._steps >= self._probe_every:
            likely = _one_alone(_likely(offers, trial=True))
            x = self._best(d, likely, trial=True)
            if x:
                self._steps, self._probe_every = 0, min(2 * self._probe_every, _PROBE_AT_MOST)
        return _spread(d, likely[:x])

    def best(self, offers: Sequence[Offer]) -> list[int]:
        """What maximises expected tokens/s; all 0 where that gains too little, or costs one of them
        too much."""
        likely = _likely(offers)
        return _spread(len(offers), likely[: self._best(len(offers), likely)])

    def _best(self, d: int, likely: Sequence[Drafted], *, trial: bool = False) -> int:
        """How many of the likeliest; in a trial as if drafts cost nothing."""
        base = self.times.of(d, 0)
        assert base is not None
        counts, expected, gained = [0] * d, [1.0] * d, float(d)
        best, least = 0, _GAIN * d / base
        for x, (chance, i) in enumerate(likely[: self.times.reach(d)], start=1):
            counts[i] += 1
            expected[i] += chance
            gained += chance
            seconds = base if trial else self._seconds(d, x, max(counts))
            if d > 1 and self._max_step_s and seconds > self._max_step_s:
                break
            fair = min(expected) * base >= _LOSS * seconds
            if fair and gained / seconds > least:
                best, least = x, gained / seconds
        return best

    def _seconds(self, d: int, x: int, depth: int) -> float:
        seconds = self.times.of(d, x)
        assert seconds is not None
        return seconds + depth * self.draft_s


def _likely(offers: Sequence[Offer], *, trial: bool = False) -> list[Drafted]:
    """All drafts on offer, the likeliest first; of one sequence in their order."""
    rates = [max(o.rate, o.hope) if trial else o.rate for o in offers]
    drafts = [(-(rates[i] ** (j + 1)), j, i) for i, o in enumerate(offers) for j in range(o.most)]
    return [(-chance, i) for chance, _, i in sorted(drafts)]


def _one_alone(likely: Sequence[Drafted]) -> list[Drafted]:
    return [entry for entry in likely if entry[1] == likely[0][1]]


def _spread(d: int, drafts: Sequence[Drafted]) -> list[int]:
    """So many of each sequence."""
    counts = [0] * d
    for _, i in drafts:
        counts[i] += 1
    return counts


def _median(times: deque[float]) -> float:
    return sorted(times)[(len(times) - 1) // 2]
