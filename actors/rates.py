"""Measured speeds of one replica, smoothed exponentially: what placement reckons with."""

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

    def prefill(self, tokens: int, seconds: float) -> None:
        if tokens >= 32:  # shorter ones measure the fixed cost of a step
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, tokens / seconds)

    def decode(self, seconds: float) -> None:
        self.decode_step_s = _smooth(self.decode_step_s, seconds)

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


_GUESS = KnownRates(200.0, 0.02, 10_000.0, 2.0)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)
