"""An agent's memory from the node's disk into the engine, and back: time, bytes, memory.

Rows are made up: where they come from does not matter here, and 4,096 tokens need no prefill. The
restore is the served one (ReplicaLoop), from the submission of a turn until its rows are loaded.
"""

from __future__ import annotations

import queue
import secrets
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from actors.branches import AgentMemory, Branch
from actors.engines.base import Engine
from actors.loop import LoopConfig, ReplicaLoop
from actors.memory import Memory, MemoryConfig
from actors.turn import Resume, SamplingParams, StreamItem, TurnFailed, TurnRequest, TurnStarted
from bench.rates import MachineRates, sample_rows, timed
from storage.card import AgentId, Owner
from storage.codec import decode_rows, encode_rows, get_codec, tensor_bytes
from storage.spec import KVRows
from storage.store import CacheStore
from storage.tiers import Tiers

_WAIT_S = 120.0
_AGENT = AgentId("default", "bench")


class RestoreFailed(Exception):
    """A figure would not mean what it says."""


@dataclass(frozen=True)
class RestoreFigures:
    n_rows: int
    seconds: list[float]
    floor: dict[str, float]  # step -> seconds, each at its own measured rate
    stored_bytes: int
    f16_bytes: int
    peak_bytes: int  # of memory that a restore takes besides what stays
    block_f16_bytes: int

    @property
    def over_floor(self) -> float:
        return median(self.seconds) / sum(self.floor.values())


@dataclass(frozen=True)
class TurnEnd:
    """Bytes written at the end of a turn, and what may be written."""

    new_rows: int
    sealed: bool
    written: int
    allowed: float


class Bench:
    """One agent with made-up rows on a replica without a cluster."""

    def __init__(self, engine: Engine, folder: Path, codec: str) -> None:
        self.folder, self.codec, self.engine = folder, get_codec(codec), engine
        self.spec = engine.key.spec
        # Prompts are given as ids here: a base model, without a template, will do.
        engine.vocab.chat_template = engine.vocab.chat_template or "{{ messages }}"
        store = CacheStore(f"file://{folder}")
        tiers = Tiers(store, self.spec, self.codec, 0)  # no pool: every read is from the disk
        memory = Memory(
            store, engine.key, self.codec, tiers, Owner("bench", "1"), MemoryConfig(), {}
        )
        self.loop = ReplicaLoop(engine, memory, LoopConfig(), "bench")

    def close(self) -> None:
        self.loop.close()

    def fill(self, n_rows: int) -> tuple[AgentMemory, Branch]:
        """An agent that holds n_rows rows."""
        memory = self.loop.memory.open(_AGENT)
        branch = Branch(0)
        memory.branches = [branch]
        self.append(memory, branch, n_rows)
        return memory, branch

    def append(self, memory: AgentMemory, branch: Branch, n_rows: int) -> None:
        """As a turn's end does it: new rows block by block, then a card."""
        start, size = len(branch.tokens), self.spec.block_tokens
        vocab = self.engine.vocab.size
        branch.tokens += [(7 * i + 11) % vocab for i in range(start, start + n_rows)]
        while start < len(branch.tokens):
            stop = min(len(branch.tokens), (start // size + 1) * size)
            rows = sample_rows(self.spec, stop - start, seed=start)
            self.loop.memory.rows.append(memory, branch, start, stop, rows)
            start = stop
        if self.spec.window:
            first = self.loop.memory.rows.windows.first_needed(branch, start)
            sliding = sample_rows(self.spec, start - first, seed=start)
            self.loop.memory.rows.checkpoint(memory, branch, first, sliding)
        self.loop.memory.commits.later(memory)
        self.loop.memory.commits.settle().result(_WAIT_S)

    def restore_s(self, branch: Branch) -> float:
        """Submit a turn that continues the agent; seconds until its rows are in the engine."""
        tokens, rows = list(branch.tokens), branch.rows
        self.loop.call(self.loop.residency.evict_idle).result(_WAIT_S)
        items: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()
        resume = Resume((*tokens, 1), ())
        request = TurnRequest(
            secrets.token_hex(4), _AGENT, (), SamplingParams(1, 0.0), resume=resume
        )
        began = time.perf_counter()
        self.loop.submit(request, items.put)
        seconds = 0.0
        while True:
            item = items.get(timeout=_WAIT_S)
            if isinstance(item, TurnStarted):
                seconds = time.perf_counter() - began
                if item.cached_tokens != rows:
                    raise RestoreFailed(f"{item.cached_tokens} of {rows} rows came back")
            elif isinstance(item, TurnFailed):
                raise RestoreFailed(str(item.error))
            elif seconds:
                break
        self.settle()
        return seconds

    def settle(self) -> None:
        while self.loop.call(lambda: self.loop.draining).result(_WAIT_S):
            time.sleep(0.005)
        self.loop.memory.commits.settle().result(_WAIT_S)


def restore(
    engine: Engine, folder: Path, codec: str, n_rows: int, runs: int, rates: MachineRates
) -> RestoreFigures:
    """Measure; raises RestoreFailed when rows are missing or wrong."""
    block = sample_rows(engine.key.spec, engine.key.spec.block_tokens)
    steps = _steps(engine, codec, block)
    with _bench(engine, folder, codec) as bench:
        memory, branch = bench.fill(n_rows)
        assert memory.card is not None
        stored = memory.card.bytes_stored
        bench.restore_s(branch)
        seconds = [bench.restore_s(branch) for _ in range(runs)]
        peak = _peak(bench, branch)
    n_blocks = n_rows / engine.key.spec.block_tokens
    return RestoreFigures(
        n_rows=n_rows,
        seconds=seconds,
        floor={
            "page cache": stored / rates.page_cache,
            "checksum": stored / rates.checksums["sha256"],
            **{step: n_blocks * s for step, s in steps.items()},
        },
        stored_bytes=stored,
        f16_bytes=n_rows * engine.key.spec.f16_row_bytes,
        peak_bytes=peak,
        block_f16_bytes=sum(g.k.nbytes + g.v.nbytes for g in block),
    )


@contextmanager
def _bench(engine: Engine, folder: Path, codec: str) -> Iterator[Bench]:
    bench = Bench(engine, folder, codec)
    try:
        yield bench
    finally:
        bench.close()


def _peak(bench: Bench, branch: Branch) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        bench.restore_s(branch)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _steps(engine: Engine, codec_name: str, block: KVRows) -> dict[str, float]:
    """Seconds per block of what a restore does with the bytes, each step by itself."""
    spec, codec = engine.key.spec, get_codec(codec_name)
    tensors = encode_rows(spec, codec, block)
    rows = decode_rows(spec, codec, tensors)
    loads = []
    for _ in range(6):
        began = time.perf_counter()
        engine.load(0, 0, rows)
        loads.append(time.perf_counter() - began)
        exported = engine.export(0, 0, spec.block_tokens)
        same = all(np.array_equal(a.k, b.k) for a, b in zip(exported, rows, strict=True))
        engine.truncate(0, 0)
        if not same:
            raise RestoreFailed("the engine does not give back the rows it took")
    return {
        "decode": timed(lambda: decode_rows(spec, codec, tensors)),
        "engine": median(loads[1:]),
    }


def turn_ends(engine: Engine, folder: Path, codec: str, sizes: list[int]) -> list[TurnEnd]:
    """Turns of some lengths after 1,000 tokens: what each writes."""
    ends = []
    with _bench(engine, folder, codec) as bench:
        memory, branch = bench.fill(1000)
        spec = bench.spec
        some = sample_rows(spec, 64)
        parts = [encode_rows(spec, bench.codec, some, part) for part in ("full", "sliding")]
        row_bytes = sum(map(tensor_bytes, parts)) / 64
        for n in sizes:
            before = _files(folder)
            bench.append(memory, branch, n)
            after = _files(folder)
            held = len(branch.tokens)
            blocks = held // spec.block_tokens - (held - n) // spec.block_tokens
            written = sum(size for name, size in after.items() if name not in before)
            sealed = blocks * spec.block_tokens * row_bytes * 1.01 + blocks * 8192
            allowed = 1.1 * n * row_bytes + 16384 + 8 * held + sealed
            ends.append(TurnEnd(n, blocks > 0, written, allowed))
    return ends


def _files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in folder.rglob("*.safetensors")}
