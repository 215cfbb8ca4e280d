"""Measured speeds of one replica, smoothed exponentially: what placement reckons with."""

from __future__ import annotations

from dataclasses import dataclass

_SMOOTHING = 0.2


@dataclass
class Rates:
    """Starting values are a slow guess; the first measurements replace them quickly."""

    prefill_tokens_per_s: float = 200.0
    decode_step_s: float = 0.05
    restore_tokens_per_s: float = 10_000.0
    turn_s: float = 2.0

    def prefill(self, tokens: int, seconds: float) -> None:
        if tokens >= 32:  # shorter ones measure the fixed cost of a step
            self.prefill_tokens_per_s = _smooth(self.prefill_tokens_per_s, tokens / seconds)

    def decode(self, seconds: float) -> None:
        self.decode_step_s = _smooth(self.decode_step_s, seconds)

    def restore(self, tokens: int, seconds: float) -> None:
        self.restore_tokens_per_s = _smooth(self.restore_tokens_per_s, tokens / max(seconds, 1e-6))

    def turn(self, seconds: float) -> None:
        self.turn_s = _smooth(self.turn_s, seconds)


def _smooth(old: float, new: float) -> float:
    return old + _SMOOTHING * (new - old)
