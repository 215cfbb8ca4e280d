"""Measured speeds of one replica, smoothed exponentially: what placement and chunks reckon with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

_SMOOTHING = 0.2


@dataclass
class Rates:
    """None until measured; `filled` gives numbers."""

    prefill_tokens_per_s: float | None = None
    decode_step_s: float | None = None
    restore_tokens_per_s: float | None = None
    turn_s: float | None = None
    expected: tuple[str, ...] = ()  # rates of a profile, which the first measurement replaces

    def expect(self, prefill_tokens_per_s: float, decode_step_s: float) -> None:
        """What was measured before there was any work."""
        self.prefill_tokens_per_s, self.decode_step_s = prefill_tokens_per_s, decode_step_s
        self.expected = ("prefill_tokens_per_s", "decode_step_s")

    def prefill(self, tokens: int, seconds: float) -> None:
        if tokens >= 32:  # shorter ones measure the fixed cost of a step
            self._measured("prefill_tokens_per_s", tokens / seconds)

    def decode(self, seconds: float) -> None:
        self._measured("decode_step_s", seconds)

    def _measured(self, name: str, value: float) -> None:
        old = None if name in self.expected else getattr(self, name)
        self.expected = tuple(entry for entry in self.expected if entry != name)
        setattr(self, name, _smooth(old, value))

    def restore(self, tokens: int, seconds: float) -> None:
        self.restore_tokens_per_s = _smooth(self.restore_tokens_per_s, tokens / max(seconds, 1e-6))

    def turn(self, seconds: float) -> None:
        self.turn_s = _smooth(self.turn_s, seconds)

    def filled(self, peers: Sequence[Rates] = ()) -> KnownRates:
        """Every rate as a number: its own, else the mean of the peers', else a guess."""
        values = {}
        for entry in fields(KnownRates):
            own = getattr(self, entry.name)
            others = [x for peer in peers if (x := getattr(peer, entry.name)) is not None]
            mean = sum(others) / len(others) if others else getattr(_GUESS, entry.name)
            values[entry.name] = mean if own is None else own
        return KnownRates(**values)


@dataclass(frozen=True)
class KnownRates:
    prefill_tokens_per_s: float
    decode_step_s: float
    restore_tokens_per_s: float
    turn_s: float


class Pace:
    """How many prompt tokens fit into a step beside the others' decoding.

    A step that decodes takes `decode_s`, every prompt token in it `token_s` more. What takes longer
    than before counts at once, what takes less slowly: the bound matters more than the speed.
    """

    _LEAST = 16  # tokens: a prefill goes on even where decoding alone takes the whole bound

    def __init__(self, max_step_s: float, start: int, most: int) -> None:
        self._max_step_s, self._start, self._most = max_step_s, start, most
        self.token_s: float | None = None
        self.decode_s: float | None = None

    def measure(self, prefilled: int, decoded: int, seconds: float) -> None:
        """A step of so many prompt tokens and so many decodes."""
        if not prefilled:
            self.decode_s = _cautious(self.decode_s, seconds)
        elif prefilled >= self._LEAST:  # fewer measure the fixed cost of a step
            alone = self.decode_s or 0.0 if decoded else 0.0
            self.token_s = _cautious(self.token_s, max(seconds - alone, 0.0) / prefilled)

    def chunk(self) -> int:
        """Prompt tokens of the next step in which others decode."""
        if not self._max_step_s or self.token_s is None:
            return self._start
        room = self._max_step_s - (self.decode_s or 0.0)
        fits = int(room / max(self.token_s, 1e-9))
        return max(min(self._LEAST, self._most), min(fits, self._most))


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
