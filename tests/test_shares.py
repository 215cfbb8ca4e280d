"""Cells in common are counted once: the same numbers as an engine that counts every reference."""

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.branches import Branch
from actors.engines.base import Chunk
from actors.engines.fake_engine import FakeEngine
from actors.residency import Residency

N_SEQS, N_CELLS = 5, 120
ops = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "fork", "resume", "cut", "grow", "park", "free", "evict"]),
        st.integers(0, N_SEQS - 1),
        st.integers(0, 60),
        st.integers(0, 60),
    ),
    max_size=60,
)


class Model:
    """Residency on a FakeEngine: every busy sequence fills what it has reserved."""

    def __init__(self) -> None:
        self.engine = FakeEngine(N_SEQS, n_ctx=N_CELLS, n_cells=N_CELLS)
        self.residency = Residency(self.engine)
        self.filled = 0  # makes the tokens of different sequences differ

    def fill(self, seq_id: int) -> None:
        missing = self.residency.reserved(seq_id) - self.engine.n_rows(seq_id)
        if missing > 0:
            self.filled += 1
            ids = [self.filled % 250] * missing
            self.engine.step([Chunk(seq_id, ids, self.engine.n_rows(seq_id), 0)])

    def do(self, op: str, seq_id: int, a: int, b: int) -> None:
        engine, residency = self.engine, self.residency
        busy = residency.branch(seq_id) is not None and not residency.is_idle(seq_id)
        n_rows = engine.n_rows(seq_id)
        if op == "acquire":
            got = residency.acquire(Branch(0), a + 1)
            if got is not None:
                self.fill(got)
        elif op == "fork" and n_rows:
            n = min(n_rows, 1 + a)
            got = residency.fork(seq_id, Branch(0), n + b, n)
            if got is not None:
                assert engine.n_rows(got) == n
                self.fill(got)
        elif op == "resume" and residency.is_idle(seq_id):
            keep = min(n_rows, a)
            if residency.resume(seq_id, keep + b, keep):
                assert engine.n_rows(seq_id) == keep
                self.fill(seq_id)
        elif op == "cut" and busy and n_rows:
            residency.truncate(seq_id, min(n_rows, a))
        elif op == "grow" and busy:
            if residency.grow(seq_id, n_rows + b):
                self.fill(seq_id)
        elif op == "park" and busy:
            residency.park(seq_id)
        elif op == "free" and residency.branch(seq_id) is not None:
            residency.free(seq_id)
        elif op == "evict":
            residency.evict_idle()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ops)
def test_cells_used_is_what_the_engine_uses(steps: list[tuple[str, int, int, int]]) -> None:
    """Never more than there are (the engine would refuse a step), never less than it holds; and the
    same once nothing is reserved beyond the rows."""
    model = Model()
    for step in steps:
        model.do(*step)
        assert model.engine.cells_used <= model.residency.cells_used <= N_CELLS
    for seq_id in list(model.residency._busy):
        model.residency.park(seq_id)
    assert model.residency.cells_used == model.engine.cells_used
    model.residency.evict_idle()
    assert model.residency.cells_used == model.engine.cells_used == 0
    assert not any(model.residency._shares._spans.values())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_what_fits_when_shared_is_not_refused(own: list[int]) -> None:
    """Idle forks of one prefix that take the cells to the last one."""
    prefix = N_CELLS - sum(own)
    if prefix < 1:
        return
    model = Model()
    first = model.residency.acquire(Branch(0), prefix)
    assert first is not None
    model.fill(first)
    for n in own:
        got = model.residency.fork(first, Branch(1), prefix + n, prefix)
        assert got is not None
        model.fill(got)
    assert model.residency.cells_used == model.engine.cells_used == N_CELLS
    assert model.residency.evictions == 0
    assert model.residency.acquire(Branch(2), 1) is None


def test_cells_that_a_cut_gives_up_are_not_saved() -> None:
    """One that parts early from what it shares needs cells of its own for the rest."""
    model = Model()
    residency, b = model.residency, Branch(1)
    source = residency.acquire(Branch(0), 60)
    assert source is not None
    model.fill(source)
    fork = residency.fork(source, b, 60, 60)
    assert fork is not None
    residency.park(fork)
    assert residency.cells_used == 60
    assert not residency.resume(fork, 71, 10)
    assert residency.find(b) == fork
    assert residency.resume(fork, 70, 10)
    model.fill(fork)
    assert residency.cells_used == model.engine.cells_used == N_CELLS
