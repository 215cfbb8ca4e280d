"""How fast bytes come over a link: each read measures, none is made for it but the first.

A link is one way from where rows are stored to this process: the node's own disk, the shared store,
a peer. Called by `tiers`; thread-safe. Knows nothing of who reckons with the rates.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from storage.files import Files

PROBE_BYTES = 1 << 20
_SMOOTHING = 0.05
_LEAST_BYTES = 1024  # a read of less says nothing about the link
_MOST_TIMES = 8.0  # as slow as expected, a read counts: a host that was cut off is no slow link
_PROBES = 3


@dataclass(frozen=True)
class LinkRate:
    """A read of n bytes takes fixed_s + n / bytes_per_s."""

    fixed_s: float
    bytes_per_s: float


def peer_link(node: str) -> str:
    """The name of the link to a node's local tier; "disk" and "store" are the others'."""
    return f"peer {node}"


class Line:
    """y = intercept + slope * x through measured points, later ones counting more; neither part is
    negative. Where all x are nearly the same the slope stays what it was: at first nothing
    (`flat`), or the intercept is. What is large errs by more than what is small, and counts
    less."""

    def __init__(self, spread: float, *, flat: bool) -> None:
        """`spread`: the standard deviation of x from which on a slope is believed."""
        self._spread, self._flat = spread, flat
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of w, w x, w y, w x x, w x y
        self._slope: float | None = None
        self._least = math.inf  # y, of late

    def measure(self, x: float, y: float, weight: float = 1.0) -> None:
        self._least = min(y, self._least * (1.0 + _SMOOTHING / 2))
        weight /= self._expected(x, y) ** 2 if self._flat else (x + self._spread) ** 2
        point = (weight, weight * x, weight * y, weight * x * x, weight * x * y)
        kept = 1.0 - _SMOOTHING
        self._sums = tuple(  # type: ignore[assignment]
            kept * total + new for total, new in zip(self._sums, point, strict=True)
        )
        w, wx, wy, wxx, wxy = self._sums
        variance = wxx / w - (wx / w) ** 2
        # With little weight on what is large, the spread looks smaller than it is.
        if variance > self._spread**2 / (1.0 if self._flat else 4.0):
            self._slope = max(0.0, (wxy / w - wx * wy / w**2) / variance)

    def _expected(self, x: float, y: float) -> float:
        """What the line says of x, where y is not far from it. To weigh a point by its own y would
        draw the line down: of two that err as much, the lower one would count more."""
        fit = self.fit()
        return min(max(fit[0] + fit[1] * x, y / 2), y * 2) if fit is not None else y

    def fit(self) -> tuple[float, float] | None:
        """(intercept, slope); None before the first measurement."""
        w, wx, wy, _, _ = self._sums
        if not w:
            return None
        x, y = wx / w, wy / w
        steepest = y / x if x > 0 else 0.0
        slope = self._slope
        if slope is None:
            slope = 0.0 if self._flat else steepest
        # Nothing was faster than a fixed cost; and what is flat at first does not begin at nothing.
        low, high = (self._least / 2, y) if self._flat else (0.0, self._least)
        intercept = min(max(y - slope * x, low), high)
        return intercept, (y - intercept) / x if x > 0 else slope


class Link:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._line = Line(PROBE_BYTES / 16, flat=False)
        self._last_end = float("-inf")

    @property
    def rate(self) -> LinkRate | None:
        """None until measured."""
        with self._lock:
            fit = self._line.fit()
        return None if fit is None else LinkRate(fit[0], 1.0 / max(fit[1], 1e-12))

    def seconds(self, size: int) -> float:
        """How long a read of so many bytes takes; 0 until measured."""
        rate = self.rate
        return 0.0 if rate is None else rate.fixed_s + size / rate.bytes_per_s

    def timed(self, read: Callable[[], bytes | None]) -> bytes | None:
        """What `read` returns. Where several read at once, each counts from the end of the one
        before: what the link carries is shared by them, and adds up."""
        began = self._clock()
        raw = read()
        ended = self._clock()
        if raw is None or len(raw) < _LEAST_BYTES:
            return raw
        with self._lock:
            took = max(1e-6, ended - max(began, self._last_end))
            if (fit := self._line.fit()) is not None:
                took = min(took, _MOST_TIMES * (fit[0] + fit[1] * len(raw)))
            self._line.measure(len(raw), took)
            self._last_end = max(self._last_end, ended)
        return raw

    def probe(self, read: Callable[[], bytes]) -> None:
        """The first measurement: the fastest of some reads, for what it says decides whether the
        link is used, and so measured again."""
        times, size = list[float](), 0
        for _ in range(_PROBES):
            began = self._clock()
            size = len(read())
            times.append(self._clock() - began)
        with self._lock:
            self._line.measure(size, max(1e-6, min(times)))


def probe_link(link: Link, files: Files) -> None:
    """Write a file of 1 MB and read it back. Raises StoreUnavailable."""
    path = files.path("probe", secrets.token_hex(16))
    with files.translated():
        files.create(path, secrets.token_bytes(PROBE_BYTES))
        try:
            link.probe(lambda: files.read(path))
        finally:
            files.remove(path)
