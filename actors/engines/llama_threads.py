"""How many threads compute: fewer while others use the cores.

The threads of a step go side by side, and wait for each other after every operation. Where one of
them has to share its core, all are as slow as that: beside one busy program, two threads on two
cores decode at an eighth of their rate, and one alone at three fifths. So when threads had to wait
for a core, one fewer computes, and when the others have left room, one more. Linux tells both
(/proc/PID/task/*/schedstat, /proc/stat); elsewhere the number stays.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)
_LOOK_S = 0.5  # between two looks, while step follows step
_GAP_S = 0.05  # without a step: what threads waited for then is of no interest
_CROWDED = 0.9  # a thread fewer computes 1/n less: waits of about as much are not worth it
_LEAST = 0.25  # of a core: waits that are always borne
_ROOM = 0.5  # of a core: so much the others may take of the last one
_HOLD_S, _MOST_HOLD_S = 1.0, 60.0  # after a thread has left
_SOON_S = 10.0  # a thread that leaves so soon after one came: it came too early


@dataclass(frozen=True)
class Load:
    """Seconds since some time. threads: of every thread of this process, on a core and waiting for
    one; own: of processor time, all: that of all programs on the `cores` this process may use."""

    at: float
    threads: dict[str, tuple[float, float]]
    own: float
    all: float
    cores: int


def load() -> Load | None:
    """None where the system does not tell."""
    try:
        cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = [[int(x) for x in line[1:8]] for line in lines if line[0] in cores]
        threads = {task.name: _schedstat(task) for task in Path("/proc/self/task").iterdir()}
    except (AttributeError, OSError, ValueError, IndexError):
        return None
    busy = sum(
        user + nice + system + irq + soft for user, nice, system, _idle, _io, irq, soft in ticks
    )
    found = {name: times for name, times in threads.items() if times is not None}
    busy_s = busy / os.sysconf("SC_CLK_TCK")
    return Load(time.monotonic(), found, time.process_time(), busy_s, len(cores))


def _schedstat(task: Path) -> tuple[float, float] | None:
    """None of a thread that has ended. Raises FileNotFoundError where Linux keeps none."""
    try:
        ran, waited, _ = (task / "schedstat").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        if task.exists():
            raise
        return None
    return int(ran) / 1e9, int(waited) / 1e9


class Threads:
    """`most` threads; after `adapt` fewer, where others use the cores. `use(n)` makes the next
    steps take n. compute_s: seconds of steps so far."""

    def __init__(
        self,
        most: int,
        use: Callable[[int], None],
        look: Callable[[], Load | None] = load,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.n, self.compute_s = most, 0.0
        self._most, self._use, self._look, self._clock = most, use, look, clock
        self._adapts = False
        self._before: Load | None = None  # of the stretch of steps that is under way
        self._looked = self._ended = clock()
        self._came, self._not_before, self._hold_s = -_SOON_S, 0.0, _HOLD_S

    def adapt(self) -> None:
        """From now on the number follows what others do, where the system tells."""
        self._adapts = self._most > 1 and self._look() is not None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a step."""
        began = self._clock()
        if began - self._ended > _GAP_S:
            self._looked, self._before = began, None
        yield
        self._ended = self._clock()
        self.compute_s += self._ended - began
        if self._adapts and self._ended - self._looked >= _LOOK_S:
            before, self._before = self._before, self._look()
            self._looked = self._ended
            if before is not None and self._before is not None:
                self._judge(before, self._before)

    def _judge(self, before: Load, now: Load) -> None:
        seconds = now.at - before.at
        if self.n > 1 and _waited(before, now, self.n) / seconds > max(_CROWDED / self.n, _LEAST):
            soon = now.at - self._came < _SOON_S
            self._hold_s = min(2 * self._hold_s, _MOST_HOLD_S) if soon else _HOLD_S
            self._not_before = now.at + self._hold_s
            self._change(self.n - 1, "others use the cores")
        elif self.n < self._most and now.at >= self._not_before:
            others = (now.all - before.all - (now.own - before.own)) / seconds
            if others + self.n + 1 - now.cores < _ROOM:
                self._came = now.at
                self._change(self.n + 1, "others have left room")

    def _change(self, n: int, why: str) -> None:
        logger.info("%s: %d of %d threads compute", why, n, self._most)
        self.n = n
        self._use(n)


def _waited(before: Load, now: Load, n: int) -> float:
    """Seconds that the n threads of the steps waited for a core: those that never sleep."""
    spent = []
    for name, (ran, waited) in now.threads.items():
        had_run, had_waited = before.threads.get(name, (0.0, 0.0))
        spent.append((ran - had_run + waited - had_waited, waited - had_waited))
    return sum(waited for _, waited in sorted(spent)[-n:])
