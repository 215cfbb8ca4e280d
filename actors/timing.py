"""How fast an engine is, on noise: prefill behind a context, decode alone and of all slots.

Rows of the context are loaded, not computed: what they hold does not change how long attention to
them takes. Knows the Engine protocol only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from actors.engines.base import Chunk, Engine
from actors.tuning import Figures
from storage.spec import GroupRows, KVRows

_MAX_BATCH = 8  # sequences; more slots tell little more
_DEPTH, _PREFILL, _STEPS = 1024, 512, 8  # tokens before, tokens at once, decode steps
_LEAST = 32  # tokens; fewer measure the fixed cost of a step
_PROBE = 8


@dataclass(frozen=True)
class Workload:
    """Every measurement of one search has the same."""

    depth: int  # rows before what is measured
    prefill: int  # tokens in one step
    steps: int  # of decode, twice
    batch: int

    @property
    def cells(self) -> int:
        """Tokens of all sequences, in whole blocks of 256 cells."""
        tokens = self.batch * (self.depth + self.steps) + self.prefill + self.steps
        return -(-tokens // 256) * 256


def largest(slots: int, n_ctx: int) -> Workload:
    """The most that is ever measured: of these cells an engine is opened."""
    return _fitted(_PREFILL, _STEPS, slots, n_ctx)


def plan(
    engine: Engine,
    slots: int,
    n_ctx: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Workload | None:
    """A workload that takes about so many seconds on this engine; it has to be empty, and is. None
    where a few tokens take longer already."""
    ids = _ids(engine, _PROBE)

    def step(n_tokens: int) -> float:
        began = clock()
        engine.step([Chunk(0, ids[:n_tokens], engine.n_rows(0), 1)])
        return clock() - began

    step(1)  # the first one allocates
    step_s = step(1)
    token_s = step(_PROBE) / _PROBE
    engine.truncate(0, 0)
    if step_s + _PROBE * token_s > seconds:
        return None
    prefill = _LEAST
    while prefill < _PREFILL and 2 * prefill * token_s < 0.6 * seconds:
        prefill *= 2
    batch = min(slots, _MAX_BATCH)
    steps = int(0.4 * seconds / ((1 + batch / 2) * max(step_s, 1e-9)))
    return _fitted(prefill, max(2, min(_STEPS, steps)), slots, min(n_ctx, engine.n_ctx))


def _fitted(prefill: int, steps: int, slots: int, n_ctx: int) -> Workload:
    """Within the tokens one sequence may hold; these are 16 at least."""
    depth = min(_DEPTH, n_ctx // 2)
    steps = min(steps, max(1, (n_ctx - depth) // 4))
    prefill = min(prefill, n_ctx - depth - 2 * steps)
    return Workload(depth, prefill, steps, min(slots, _MAX_BATCH))


def noise(engine: Engine, n_rows: int) -> KVRows:
    """Rows 0..n_rows of nothing."""
    rng = np.random.default_rng(1)
    rows = []
    for g in engine.key.spec.groups:
        n = n_rows if g.part == "full" else min(n_rows, engine.window)
        lead = (len(g.layers), n, g.n_kv_heads)
        k, v = (rng.standard_normal((*lead, d), np.float32) for d in (g.key_dim, g.value_dim))
        rows.append(GroupRows(k.astype(np.float16), v.astype(np.float16)))
    return tuple(rows)


def measure(
    engine: Engine,
    workload: Workload,
    rows: KVRows,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Figures:
    """`rows`: of the workload's depth. What takes longer than expected is not repeated after
    `seconds`. The engine has to be empty, and is afterwards. Raises EngineFault."""
    ids, until = _ids(engine, workload.prefill), clock() + seconds

    def step(n_seqs: int, n_tokens: int) -> float:
        chunks = [Chunk(i, ids[:n_tokens], engine.n_rows(i), 1) for i in range(n_seqs)]
        began = clock()
        engine.step(chunks)
        return clock() - began

    def fastest(n_seqs: int) -> float:
        taken = step(n_seqs, 1)
        for _ in range(workload.steps - 1):
            if clock() < until:
                taken = min(taken, step(n_seqs, 1))
        return taken

    try:
        for seq_id in range(workload.batch):
            engine.load(seq_id, 0, rows)
        prefill_s = step(1, workload.prefill)
        alone = fastest(1)
        together = fastest(workload.batch)
    finally:
        for seq_id in range(workload.batch):
            engine.truncate(seq_id, 0)
    return Figures(workload.prefill / max(prefill_s, 1e-9), max(alone, 1e-9), max(together, 1e-9))


def _ids(engine: Engine, n: int) -> list[int]:
    rng = np.random.default_rng(2)
    return [int(x) for x in rng.integers(0, engine.vocab.size, n)]
