"""Fewer threads compute while other programs use the cores; and come back."""

import os
import subprocess
import sys
import threading
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
    """Cores on which `others` programs compute, and a team of threads whose steps take 0.1 s and
    follow each other. Threads of the team without a core of their own wait half of their time."""

    def __init__(self, cores: int, most: int) -> None:
        self.cores, self.others = cores, 0.0
        self.at = self.own = self.all = 0.0
        self.ran = {str(i): [0.0, 0.0] for i in range(most)}
        self.changes: list[int] = []
        self.blind = False
        self.threads = Threads(most, self.changes.append, self.look, lambda: self.at)
        self.threads.adapt()

    def look(self) -> Load | None:
        threads = {name: (ran, waited) for name, (ran, waited) in self.ran.items()}
        return None if self.blind else Load(self.at, threads, self.own, self.all, self.cores)

    def step(self) -> None:
        with self.threads.computing():
            n = self.threads.n
            waits = left = min(n, max(0.0, self.others + n - self.cores)) * 0.05
            for thread in list(self.ran.values())[:n]:
                thread[1] += (waited := min(0.1, left))
                thread[0] += 0.1 - waited
                left -= waited
            used = n * 0.1 - waits
            self.own += used
            self.all += used + min(self.others * 0.1, self.cores * 0.1 - used)
            self.at += 0.1

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


@pytest.mark.parametrize("cores", [2, 4, 8, 16])
def test_a_burst_costs_no_thread_for_good_beside_a_cluster(cores: int) -> None:
    machine = Machine(cores, most=cores)
    machine.others = 2.0
    assert machine.run(10.0) < cores
    machine.others = 0.15
    assert machine.run(60.0) == cores


def test_what_happens_between_turns_is_of_no_interest() -> None:
    """A start, in which everybody wants the cores."""
    machine = Machine(cores=2, most=2)
    for _ in range(20):
        machine.at += 1.0
        machine.all += 2.0
        for thread in machine.ran.values():
            thread[1] += 0.9
        machine.run(0.8)
    assert machine.changes == []


def test_waits_of_threads_that_do_not_compute_do_not_count() -> None:
    machine = Machine(cores=2, most=2)
    machine.ran["a persister"] = [0.0, 0.0]
    for _ in range(100):
        machine.ran["a persister"][1] += 0.06
        machine.step()
    assert machine.changes == []


def test_a_look_that_fails_is_not_the_last() -> None:
    machine = Machine(cores=2, most=2)
    machine.others = 1.0
    assert machine.run(2.0) == 1
    machine.blind = True
    machine.run(2.0)
    machine.others, machine.blind = 0.1, False
    assert machine.run(4.0) == 2


def test_a_system_that_does_not_tell_keeps_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_threads, "Path", lambda _: Path("/nowhere"))
    assert load() is None
    clock = iter(range(1000)).__next__
    threads = Threads(2, pytest.fail, load, clock)
    threads.adapt()
    for _ in range(10):
        with threads.computing():
            pass
    assert (threads.n, threads.compute_s) == (2, 10.0)


def test_the_number_is_fixed_until_it_may_adapt() -> None:
    threads = Threads(2, pytest.fail, lambda: pytest.fail("looked"))
    with threads.computing():
        time.sleep(0.01)
    assert threads.compute_s >= 0.01


def test_what_linux_tells_of_this_process() -> None:
    if (before := load()) is None:
        pytest.skip("not told here")
    deadline = time.process_time() + 0.2
    while time.process_time() < deadline:
        pass
    now = load()
    assert now is not None
    me = str(threading.get_native_id())
    assert now.own - before.own >= 0.2
    assert now.threads[me][0] - before.threads[me][0] > 0.1
    assert now.all - before.all >= 0.15  # in ticks of 10 ms


@contextmanager
def busy(n: int) -> Iterator[None]:
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.skipif(load() is None or CORES < 2, reason="needs Linux and two cores")
def test_a_real_engine_makes_room_for_real_programs(smollm2_gguf: Path) -> None:
    llama_engine = pytest.importorskip("actors.engines.llama_engine")
    from actors.engines.base import Chunk

    engine = llama_engine.LlamaEngine(
        smollm2_gguf, n_seq_max=1, n_ctx=512, n_cells=512, n_threads=CORES
    )
    engine.threads.adapt()

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
            assert computes_with(range(1, CORES), 30.0)
        assert computes_with(range(CORES, CORES + 1), 60.0)
    finally:
        engine.close()
