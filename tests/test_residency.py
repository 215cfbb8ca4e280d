"""Who sits in the engine's sequences: reservations, the oldest idle one leaves, no leaks."""

import random
import sys
import threading
import time

import pytest

from actors.engines.base import Chunk
from actors.engines.fake_engine import FakeEngine
from actors.memory import Branch
from actors.residency import Residency


def engine_of(
    n_seq_max: int = 3, n_cells: int = 300, *, idle_rows_cost: bool = False
) -> FakeEngine:
    engine = FakeEngine(n_seq_max, n_ctx=n_cells, n_cells=n_cells)
    engine.idle_rows_cost = idle_rows_cost
    return engine


def fill(engine: FakeEngine, seq_id: int, n: int) -> None:
    engine.step([Chunk(seq_id, [65] * n, engine.n_rows(seq_id), 0)])


def parked(residency: Residency, engine: FakeEngine, number: int, rows: int) -> Branch:
    """A branch that sits idle with `rows` rows."""
    branch = Branch(number)
    seq_id = residency.acquire(branch, rows)
    assert seq_id is not None
    fill(engine, seq_id, rows)
    residency.park(seq_id)
    return branch


def test_the_least_recently_used_leaves() -> None:
    engine = engine_of()
    residency = Residency(engine)
    a, b, c = (parked(residency, engine, i, 50) for i in range(3))
    held = residency.find(a)
    assert held is not None
    assert residency.resume(held, 60)
    residency.park(held)
    d = parked(residency, engine, 3, 50)
    assert residency.find(b) is None
    assert None not in (residency.find(a), residency.find(c), residency.find(d))
    assert residency.evictions == 1


def test_idle_rows_leave_when_they_have_cost_one_alone_as_much_as_their_return() -> None:
    engine = engine_of(idle_rows_cost=True)
    residency = Residency(engine)
    a = parked(residency, engine, 0, 50)
    assert residency.acquire(Branch(2), 50) is not None
    residency.charge(40)
    b = parked(residency, engine, 1, 50)
    residency.charge(23)
    assert residency.find(a) is not None
    residency.charge(1)
    assert residency.find(a) is None
    assert residency.find(b) is not None
    residency.charge(1000)
    assert (residency.n_idle, residency.evictions, residency.cells_used) == (0, 2, 50)


def test_beside_others_idle_rows_stay() -> None:
    engine = engine_of(idle_rows_cost=True)
    residency = Residency(engine)
    a = parked(residency, engine, 0, 50)
    assert residency.acquire(Branch(1), 50) is not None
    residency.make_way()
    assert residency.acquire(Branch(2), 50) is not None
    residency.charge(1000)
    assert residency.find(a) is not None


def test_a_turn_that_begins_alone_finds_the_cells_empty_but_for_its_own() -> None:
    engine = engine_of(idle_rows_cost=True)
    residency = Residency(engine)
    a, b, c = (parked(residency, engine, i, 50) for i in range(3))
    residency.make_way(residency.find(b), None)
    assert [residency.find(x) is not None for x in (a, b, c)] == [False, True, False]
    assert (residency.evictions, residency.cells_used) == (2, 50)


def test_idle_rows_stay_where_they_cost_nothing() -> None:
    engine = engine_of()
    residency = Residency(engine)
    a = parked(residency, engine, 0, 50)
    residency.make_way()
    assert residency.acquire(Branch(1), 50) is not None
    residency.charge(1000)
    assert residency.find(a) is not None


def test_cells_that_are_reserved_are_not_given_twice() -> None:
    engine = engine_of()
    residency = Residency(engine)
    first = residency.acquire(Branch(0), 200)
    assert first is not None
    assert residency.cells_used == 200
    assert residency.acquire(Branch(1), 101) is None
    assert residency.acquire(Branch(1), 100) is not None
    assert residency.cells_used == 300


def test_idle_rows_leave_for_a_reservation() -> None:
    engine = engine_of()
    residency = Residency(engine)
    old = parked(residency, engine, 0, 150)
    young = parked(residency, engine, 1, 100)
    seq_id = residency.acquire(Branch(2), 200)
    assert seq_id is not None
    assert residency.find(old) is None
    assert residency.find(young) is not None
    assert engine.n_rows(seq_id) == 0


def test_the_source_of_a_fork_stays() -> None:
    engine = engine_of(n_seq_max=2)
    residency = Residency(engine)
    a = parked(residency, engine, 0, 50)
    b = parked(residency, engine, 1, 50)
    held = residency.find(a)
    assert held is not None
    seq_id = residency.fork(held, Branch(2), 100, 40)
    assert seq_id not in (None, held)
    assert residency.find(a) == held
    assert residency.find(b) is None


def test_the_cells_of_a_fork_count_once() -> None:
    engine = engine_of()
    residency = Residency(engine)
    a = parked(residency, engine, 0, 200)
    held = residency.find(a)
    assert held is not None
    seq_id = residency.fork(held, Branch(1), 250, 150)  # 200 + 250 - 150
    assert seq_id not in (None, held)
    assert residency.cells_used == residency._engine.n_cells == 300
    assert residency.find(a) == held
    assert residency.evictions == 0


def test_a_source_without_room_beside_it_gives_up_its_place() -> None:
    engine = engine_of()
    residency = Residency(engine)
    a = parked(residency, engine, 0, 200)
    held = residency.find(a)
    assert held is not None
    b = Branch(1)
    assert residency.fork(held, b, 251, 150) == held
    assert residency.find(a) is None
    assert residency.branch(held) is b
    assert engine.n_rows(held) == 150
    assert residency.cells_used == 251
    assert residency.evictions == 1


def test_nobody_leaves_for_what_cannot_fit_anyway() -> None:
    engine = engine_of()
    residency = Residency(engine)
    a = parked(residency, engine, 0, 50)
    assert residency.acquire(Branch(1), 200) is not None
    assert residency.acquire(Branch(2), 150) is None
    assert residency.find(a) is not None
    b = parked(residency, engine, 3, 20)
    held = residency.find(b)
    assert held is not None
    assert not residency.resume(held, 101)
    assert residency.find(a) is not None
    assert residency.evictions == 0


def test_no_place_beside_a_busy_source() -> None:
    engine = engine_of(n_seq_max=1)
    residency = Residency(engine)
    seq_id = residency.acquire(Branch(0), 100)
    assert seq_id is not None
    fill(engine, seq_id, 50)
    assert residency.fork(seq_id, Branch(1), 60, 50) is None
    assert engine.n_rows(seq_id) == 50


def test_resume_that_does_not_fit_leaves_it_idle() -> None:
    engine = engine_of()
    residency = Residency(engine)
    a = parked(residency, engine, 0, 50)
    assert residency.acquire(Branch(1), 200) is not None
    held = residency.find(a)
    assert held is not None
    assert not residency.resume(held, 101)
    assert residency.find(a) == held
    assert engine.n_rows(held) == 50
    assert residency.resume(held, 100)
    assert residency.find(a) is None


def test_busy_sequences_are_never_evicted() -> None:
    engine = engine_of(n_seq_max=2)
    residency = Residency(engine)
    for number in range(2):
        assert residency.acquire(Branch(number), 10) is not None
    assert residency.acquire(Branch(2), 10) is None
    assert residency.evictions == 0


def test_a_busy_one_grows_and_idle_ones_leave_for_it() -> None:
    engine = engine_of()
    residency = Residency(engine)
    idle = parked(residency, engine, 0, 100)
    seq_id = residency.acquire(Branch(1), 150)
    assert seq_id is not None
    assert residency.grow(seq_id, 200)
    assert residency.find(idle) is not None
    assert residency.grow(seq_id, 201)
    assert residency.find(idle) is None
    assert residency.reserved(seq_id) == residency.cells_used == 201
    assert residency.grow(seq_id, 50)
    assert residency.reserved(seq_id) == 201


def test_growth_that_does_not_fit_changes_nothing() -> None:
    engine = engine_of()
    residency = Residency(engine)
    idle = parked(residency, engine, 0, 50)
    first, second = residency.acquire(Branch(1), 100), residency.acquire(Branch(2), 100)
    assert first is not None
    assert second is not None
    assert not residency.grow(first, 201)
    assert residency.find(idle) is not None
    assert residency.reserved(first) == 100
    assert residency.grow(first, 200)


def test_drop_frees_an_idle_branch_only() -> None:
    engine = engine_of()
    residency = Residency(engine)
    a = parked(residency, engine, 0, 50)
    residency.drop(a)
    residency.drop(a)
    residency.drop(Branch(9))
    assert residency.find(a) is None
    assert residency.cells_used == 0
    assert sum(engine.n_rows(i) for i in range(3)) == 0


def test_evict_idle_empties_all_but_the_busy() -> None:
    engine = engine_of()
    residency = Residency(engine)
    parked(residency, engine, 0, 50)
    parked(residency, engine, 1, 50)
    busy = residency.acquire(Branch(2), 60)
    assert busy is not None
    fill(engine, busy, 20)
    assert residency.evict_idle() == 2
    assert residency.n_idle == 0
    assert residency.cells_used == 60
    assert engine.n_rows(busy) == 20


@pytest.mark.parametrize("seed", range(5))
def test_random_use_never_gives_one_place_twice(seed: int) -> None:
    rng = random.Random(seed)
    engine = engine_of(n_seq_max=4)
    residency = Residency(engine)
    branches = [Branch(i) for i in range(7)]
    busy: dict[int, Branch] = {}
    for _ in range(400):
        branch = rng.choice(branches)
        held = residency.find(branch)
        if branch in busy.values():
            seq_id = next(i for i, b in busy.items() if b is branch)
            del busy[seq_id]
            if rng.random() < 0.3:
                residency.free(seq_id)
            else:
                residency.park(seq_id)
        elif held is not None:
            cells = engine.n_rows(held) + rng.randrange(1, 40)
            if rng.random() < 0.2:
                residency.drop(branch)
            elif cells <= 300 and residency.resume(held, cells):
                busy[held] = branch
        else:
            n = rng.randrange(1, 150)
            seq_id = residency.acquire(branch, n)
            if seq_id is not None:
                assert engine.n_rows(seq_id) == 0
                assert seq_id not in busy
                busy[seq_id] = branch
                fill(engine, seq_id, n)
        assert residency.cells_used <= 300
        assert residency.n_idle + len(busy) <= 4
    for seq_id in busy:
        residency.free(seq_id)
    residency.evict_idle()
    assert residency.cells_used == 0
    places = [residency.acquire(Branch(i), 1) for i in range(5)]
    assert sorted(x for x in places if x is not None) == [0, 1, 2, 3]


@pytest.mark.slow
def test_reports_read_while_sequences_come_and_go() -> None:
    residency = Residency(engine := engine_of(16, 4000))
    before, stop = sys.getswitchinterval(), threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for number in range(12):
                parked(residency, engine, number, 1)
            residency.evict_idle()

    thread = threading.Thread(target=churn)
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        nobody, until = Branch(99), time.monotonic() + 2.0
        while time.monotonic() < until:
            assert residency.find(nobody) is None
            assert 0 <= residency.cells_used <= 4000
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
