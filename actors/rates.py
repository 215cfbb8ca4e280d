"""Measured speeds of one replica, smoothed exponentially: what placement and chunks reckon with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from storage.links import Line

_SMOOTHING = 0.2
_UNTILED = 2.0  # times as long takes a token in a step of fewer than a tile (llama.cpp, behind 4K)
_DEPTHS = 256.0  # tokens between shallow and deep prefills, for the difference to be believed


@dataclass
class Rates:
    """None until measured; `filled` gives numbers."""

    prefill_tokens_per_s: float | None = None  # with nothing before them
    decode_step_s: float | None = None
    restore_tokens_per_s: float | None = None  # from RAM into the engine
    turn_s: float | None = None
    depth_s: float | None = None  # that prefilling a token takes longer per token before it
    expected: tuple[str, ...] = ()  # rates of a profile, which the first measurement replaces

    def __post_init__(self) -> None:
        self._prefills = Line(_DEPTHS, flat=True)  # seconds of a token by tokens before it

    def expect(self, prefill_tokens_per_s: float, decode_step_s: float) -> None:
        """What was measured before there was any work."""
        self.prefill_tokens_per_s, self.decode_step_s = prefill_tokens_per_s, decode_step_s
        self.expected = ("decode_step_s",)

    def prefill(self, tokens: int, seconds: float, depth: float = 0.0) -> None:
        """`depth`: tokens before the middle one, on average."""
        if tokens < 32:  # shorter ones measure the fixed cost of a step
            return
        self._prefills.measure(depth, seconds / tokens, tokens)
        fit = self._prefills.fit()
        assert fit is not None
        self.prefill_tokens_per_s, self.depth_s = 1.0 / max(fit[0], 1e-9), fit[1]

    def decode(self, seconds: float) -> None:
        self._measured("decode_step_s", seconds)

    def _measured(self, name: str, value: float) -> None:
        old = None if name in self.expected else getattr(self, name)
        self.expected = tuple(entry for entry in self.expected if entry != name)
        setattr(self, name, _smooth(old, value))

    def restore(self, tokens: int, seconds: float, *, from_ram: bool = True) -> None:
        """What came from elsewhere was waited for, too: it counts only where it was faster."""
        rate, known = tokens / max(seconds, 1e-6), self.restore_tokens_per_s
        if from_ram or known is None or rate > known:
            self.restore_tokens_per_s = _smooth(known, rate)

    def turn(self, seconds: float) -> None:
        self.turn_s = _smooth(self.turn_s, seconds)

    def again_s(self, start: int, stop: int, tile: int = 0) -> float:
        """Estimate of what computing these tokens once more takes; where only decoding was measured
        yet, one by one. `tile`: see Engine.tile."""
        if self.prefill_tokens_per_s is None and self.decode_step_s is not None:
            return (stop - start) * self.decode_step_s
        seconds = self.filled().prefill_s(start, stop)
        return seconds * _UNTILED if stop - start < tile else seconds

    def filled(self, peers: Sequence[Rates] = ()) -> KnownRates:
        """Every rate as a number: its own, else the mean of the peers', else a guess."""
        return fill([self, *peers])[0]


@dataclass(frozen=True)
class KnownRates:
    prefill_tokens_per_s: float
    decode_step_s: float
    restore_tokens_per_s: float
    turn_s: float
    depth_s: float = 0.0

    def prefill_s(self, start: float, stop: float) -> float:
        """Seconds to prefill tokens start..stop of a prompt."""
        flat = (stop - start) / self.prefill_tokens_per_s
        return flat + self.depth_s * ((stop * stop - start * start) / 2.0)


def fill(measured: Sequence[Rates]) -> list[KnownRates]:
    """Numbers for all: what one has not measured is the mean of those who have, else a guess."""
    columns = []
    for name, guess in vars(_GUESS).items():
        own = [getattr(rates, name) for rates in measured]
        if None in own:
            told = [value for value in own if value is not None]
            mean = fsum(told) / len(told) if told else guess
            own = [mean if value is None else value for value in own]
        columns.append(own)
    return [KnownRates(*row) for row in zip(*columns, strict=True)]


class Pace:
    """How many prompt tokens fit into a step beside the others' decoding.

    A step that decodes takes `decode_s`, every prompt token in it some time more: another one in
    steps of at least `tile` tokens, where the engine computes those in another way (0: it does
    not). What takes longer than before counts at once, what takes less slowly: the bound matters
    more than the speed.
    """

    _LEAST = 16  # tokens: a prefill goes on even where decoding alone takes the whole bound
    _HOPE, _MOST_HOPE = 0.995, 0.75  # a way not taken is held faster, step by step: it is tried

    def __init__(self, max_step_s: float, start: int, most: int, tile: int = 0) -> None:
        self._max_step_s, self._start, self._most = max_step_s, start, most
        self._tile = tile or sys.maxsize
        self.decode_s: float | None = None
        self._token_s: dict[bool, float] = {}  # in steps of `tile` tokens or more; in shorter ones
        self._hope = {True: 1.0, False: 1.0}

    def measure(self, prefilled: int, decoded: int, seconds: float) -> None:
        """A step of so many prompt tokens and so many decodes."""
        if not prefilled:
            self.decode_s = _cautious(self.decode_s, seconds)
        elif prefilled >= self._LEAST:  # fewer measure the fixed cost of a step
            alone = self.decode_s or 0.0 if decoded else 0.0
            tiled = prefilled + decoded >= self._tile
            took = max(seconds - alone, 0.0) / prefilled
            self._token_s[tiled] = _cautious(self._token_s.get(tiled), took)
            self._hope[tiled] = 1.0
            self._hope[not tiled] = max(self._hope[not tiled] * self._HOPE, self._MOST_HOPE)

    def chunk(self, decoding: int = 1) -> int:
        """Prompt tokens of the next step, in which so many others decode."""
        if not self._max_step_s or not self._token_s:
            return self._start
        least = min(self._LEAST, self._most)
        short = min(max(least, self._fits(False)), self._tile - 1 - decoding)
        tiled = self._fits(True)
        if short < least:  # those that decode fill a tile, or nearly
            return max(least, tiled)
        if tiled + decoding < self._tile:
            return short
        return max(short, tiled, key=lambda n: self._tokens_per_s(n, tiled=n == tiled))

    def _fits(self, tiled: bool) -> int:
        room = self._max_step_s - (self.decode_s or 0.0)
        return min(int(room / max(self._cost_s(tiled), 1e-9)), self._most)

    def _tokens_per_s(self, n: int, tiled: bool) -> float:
        return n / ((self.decode_s or 0.0) + n * self._cost_s(tiled) + 1e-9)

    def _cost_s(self, tiled: bool) -> float:
        """Of a prompt token; a way that was never taken may be a little faster than the other."""
        known = self._token_s.get(tiled)
        return self._token_s[not tiled] * 0.9 if known is None else known * self._hope[tiled]


@dataclass
class Overhead:
    """Where the time of rounds with a step went."""

    steps: int = 0
    engine_s: float = 0.0  # in engine.step
    outside_s: float = 0.0

    def step(self, seconds: float) -> None:
        self.steps += 1
        self.engine_s += seconds

    @property
    def share(self) -> float:
        """Of the whole time; 0 before the first step."""
        return self.outside_s / max(self.engine_s + self.outside_s, 1e-9)


_GUESS = KnownRates(200.0, 0.02, 10_000.0, 2.0)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)


def _cautious(old: float | None, new: float) -> float:
    return new if old is None else old + (0.5 if new > old else _SMOOTHING) * (new - old)
