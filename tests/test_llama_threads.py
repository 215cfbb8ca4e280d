"""Fewer threads compute while other programs use the cores; and come back."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from actors.engines import llama_threads
from actors.engines.llama_threads import Load, Threads, load

CORES = os.cpu_count() or 1


class Machine:
    """Cores on which `others` programs compute, and a team of n threads whose step takes 0.1 s.
    Each of the team that has no core of its own waits half of its time."""

    def __init__(self, cores: int, most: int) -> None:
        self.cores, self.others = cores, 0.0
        self.at = self.own = self.all = 0.0
        self.ran = [[0.0, 0.0] for _ in range(most)]
        self.changes: list[int] = []
        self.threads = Threads(most, self.changes.append, look=self.look, cores=cores)

    def look(self) -> Load | None:
        return Load(
            self.at, {str(i): (a, b) for i, (a, b) in enumerate(self.ran)}, self.own, self.all
        )

    def step(self) -> None:
        n = self.threads.n
        waits = min(n, max(0.0, self.others + n - self.cores)) * 0.05
        for thread in self.ran[:n]:
            own = min(0.1, waits)
            thread[0] += 0.1 - own
            thread[1] += own
            waits -= own
        used = n * 0.1 - min(n, max(0.0, self.others + n - self.cores)) * 0.05
        self.own += used
        self.all += used + min(self.others * 0.1, self.cores * 0.1 - used)
        self.at += 0.1
        self.threads.compute_s += 0.1  # as `computing` counts, on a clock of its own
        with self.threads.computing():
            pass

    def run(self, seconds: float) -> int:
        for _ in range(round(10 * seconds)):
            self.step()
        return self.threads.n


def test_all_threads_compute_on_a_machine_that_does_little_else() -> None:
    machine = Machine(cores=2, most=2)
    machine.others = 0.15  # what a cluster costs that carries a stream
    assert machine.run(10.0) == 2
    assert machine.changes == []


def test_a_thread_leaves_beside_a_busy_program_and_comes_back_after_it() -> None:
    machine = Machine(cores=2, most=2)
    machine.others = 1.0
    assert machine.run(1.2) == 1
    assert machine.run(20.0) == 1
    machine.others = 0.1
    assert machine.run(3.0) == 2
    assert machine.changes == [1, 2]


def test_as_many_leave_as_others_want_cores() -> None:
    machine = Machine(cores=8, most=8)
    machine.others = 3.0
    assert machine.run(10.0) == 5
    machine.others = 0.0
    assert machine.run(20.0) == 8


def test_one_thread_stays() -> None:
    machine = Machine(cores=2, most=2)
    machine.others = 8.0
    assert machine.run(10.0) == 1


def test_a_thread_that_came_too_early_waits_longer_each_time() -> None:
    """A program that computes whenever two threads do, and sleeps otherwise."""
    machine, times = Machine(cores=2, most=2), []
    for _ in range(600):
        machine.others = 1.0 if machine.threads.n == 2 else 0.0
        before = len(machine.changes)
        machine.step()
        if len(machine.changes) > before and machine.threads.n == 1:
            times.append(machine.at)
    gaps = [b - a for a, b in pairwise(times)]
    assert len(gaps) > 3
    assert gaps[1] > 1.5 * gaps[0]
    assert gaps[-1] > 10.0


def test_a_system_that_does_not_tell_keeps_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_threads, "Path", lambda _: Path("/nowhere"))
    assert load() is None
    threads = Threads(2, pytest.fail, look=load, cores=2)
    threads.compute_s = 100.0
    with threads.computing():
        pass
    assert threads.n == 2


def test_fixed_threads_do_not_even_look() -> None:
    threads = Threads(2, pytest.fail, fixed=True, look=lambda: pytest.fail("looked"), cores=2)
    threads.compute_s = 100.0
    with threads.computing():
        pass


def test_steps_are_timed() -> None:
    threads = Threads(1, pytest.fail, cores=1)
    with threads.computing():
        time.sleep(0.02)
    assert 0.02 <= threads.compute_s < 0.2


@contextmanager
def busy(n: int) -> Iterator[None]:
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.mark.skipif(load() is None or CORES < 2, reason="needs Linux and two cores")
def test_a_real_engine_makes_room_for_real_programs(smollm2_gguf: Path) -> None:
    llama_engine = pytest.importorskip("actors.engines.llama_engine")
    from actors.engines.base import Chunk

    engine = llama_engine.LlamaEngine(
        smollm2_gguf, n_seq_max=1, n_ctx=512, n_cells=512, n_threads=CORES, yields=True
    )

    def computes_with(wanted: range, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while engine.threads.n not in wanted and time.monotonic() < deadline:
            n_rows = engine.n_rows(0)
            engine.step([Chunk(0, [n_rows + 1] * 8, n_rows, 1)])
            if n_rows > 400:
                engine.truncate(0, 0)
        return engine.threads.n in wanted

    try:
        with busy(CORES):
            assert computes_with(range(1, CORES), 60.0)
        assert computes_with(range(CORES, CORES + 1), 90.0)
    finally:
        engine.close()
