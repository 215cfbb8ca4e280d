"""How many threads compute: fewer while other programs use the cores.

The threads of a step go side by side, and wait for each other after every operation. Where one of
them has to share its core, all are as slow as that: beside one busy program, two threads on two
cores decode at an eighth of their rate, and one alone at half of it. So when threads had to wait
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
_LOOK_S = 0.5  # of computing between two looks
_CROWDED = 0.9  # a thread fewer computes 1/n less: waits of about as much are not worth it
_NOISE = 0.1  # of a core: nobody waits less than that
_ROOM = 0.6  # of what is too much: so much may be expected of one more
_HOLD_S, _MOST_HOLD_S = 1.0, 60.0  # after a thread has left
_SOON_S = 10.0  # a thread that leaves so soon after one came: it came too early


@dataclass(frozen=True)
class Load:
    """Seconds since some time. threads: of every thread of this process, on a core and waiting for
    one; own: of processor time, all: that of all programs."""

    at: float
    threads: dict[str, tuple[float, float]]
    own: float
    all: float


def load() -> Load | None:
    """None where the system does not tell."""
    try:
        threads = {task.name: _schedstat(task) for task in Path("/proc/self/task").iterdir()}
        ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = map(int, ticks[:8])
    except (OSError, ValueError):
        return None
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return Load(time.monotonic(), threads, time.process_time(), busy)


def _schedstat(task: Path) -> tuple[float, float]:
    try:
        ran, waited, _ = (task / "schedstat").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        if task.exists():
            raise
        return 0.0, 0.0  # it has ended since
    return int(ran) / 1e9, int(waited) / 1e9


class Threads:
    """`most` threads, or, unless `fixed`, fewer, of `cores`; `use(n)` makes the next steps take n.
    compute_s: seconds of steps so far."""

    def __init__(
        self,
        most: int,
        use: Callable[[int], None],
        fixed: bool = False,
        *,
        look: Callable[[], Load | None] = load,
        cores: int = os.cpu_count() or 1,
    ) -> None:
        self.n, self.compute_s = most, 0.0
        self._most, self._use, self._look, self._cores = most, use, look, cores
        self._before = look() if most > 1 and not fixed else None
        self._looked = 0.0  # at so many seconds of steps
        self._came, self._not_before, self._hold_s = -_SOON_S, 0.0, _HOLD_S

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a step."""
        began = time.perf_counter()
        yield
        self.compute_s += time.perf_counter() - began
        if self._before is not None and self.compute_s - self._looked >= _LOOK_S:
            self._adapt(self._before)

    def _adapt(self, before: Load) -> None:
        now, computed = self._look(), self.compute_s - self._looked
        self._before, self._looked = now, self.compute_s
        if now is None:
            return
        if self.n > 1 and _waited(before, now, self.n, computed) > _too_much(self.n):
            self._one_fewer(now.at)
        elif self.n < self._most and now.at >= self._not_before:
            others = (now.all - before.all - (now.own - before.own)) / (now.at - before.at)
            if others + self.n + 1 - self._cores < _ROOM * _too_much(self.n + 1):
                self._came = now.at
                self._change(self.n + 1)

    def _one_fewer(self, at: float) -> None:
        soon = at - self._came < _SOON_S
        self._hold_s = min(2 * self._hold_s, _MOST_HOLD_S) if soon else _HOLD_S
        self._not_before = at + self._hold_s
        self._change(self.n - 1)

    def _change(self, n: int) -> None:
        logger.info("other programs use the cores: %d of %d threads compute", n, self._most)
        self.n = n
        self._use(n)


def _waited(before: Load, now: Load, n: int, computed: float) -> float:
    """How many of the n threads that compute had to wait for a core, on average."""
    none = (0.0, 0.0)
    spent = []
    for name, (ran, waited) in now.threads.items():
        had_run, had_waited = before.threads.get(name, none)
        spent.append((ran - had_run + waited - had_waited, waited - had_waited))
    return sum(waited for _, waited in sorted(spent)[-n:]) / computed


def _too_much(n: int) -> float:
    """Of n threads, waiting."""
    return max(_CROWDED / n, _NOISE)
