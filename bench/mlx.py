"""kvferry bench mlx: the MLX engine on cells of q4, in this process, without a cluster.

    batch      one token for each of four agents in one step, against four steps of one agent
    restore    256 tokens of stored codes into the engine, against their prefill

On a CPU only the ratios count: MLX's kernels there are for correctness. What the same engine does
on Apple silicon has to be measured there; the commands for it are printed, and its rows say that
they were not measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

from rich.console import Console
from rich.table import Column, Table

from actors.engines.base import Chunk, Engine
from actors.models import open_engine, served_name
from bench.texts import context
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from storage.codec import Tensors

AGENTS, TOKENS = 4, 256
_CELLS = AGENTS * (TOKENS + 256)
# What one Mac was measured with (arXiv 2603.04428), as MLX models of the hub
MAC_MODELS = {
    "Gemma 3 12B": "hf://mlx-community/gemma-3-text-12b-it-4bit",
    "DeepSeek-Coder-V2-Lite": "hf://mlx-community/DeepSeek-Coder-V2-Lite-Instruct-4bit-mlx",
    "Llama 3.1 8B": "hf://mlx-community/Meta-Llama-3.1-8B-Instruct-4bit",
}
MAC_CONTEXTS = (1024, 4096, 8192, 16384, 32768)
console = Console(highlight=False, soft_wrap=True)


def run(config: ClusterConfig, runs: int) -> int:
    """Measure and print; the exit code. Raises ModelUnavailable, ConfigError."""
    replica = replace(
        config.replica, engine="mlx", codec="q4", kv_type="q4", slots=AGENTS, cells=_CELLS
    )
    engine = open_engine(replica)
    ids = engine.vocab.tokenize(context(0, 2 * TOKENS))[:TOKENS]
    if engine.n_ctx < TOKENS + 2 * runs + 2:
        raise ConfigError(f"--runs {runs}: the model holds {engine.n_ctx} tokens")
    prefill = _prefill(engine, ids)
    stored = engine.export_encoded(0, 0, TOKENS)
    restore = median(_restore(engine, stored) for _ in range(runs))
    alone, together = _decode(engine, stored, runs)
    device = engine.device
    engine.close()
    _print(served_name(replica.model), device, prefill, restore, alone, together)
    return 0


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _prefill(engine: Engine, ids: Sequence[int]) -> float:
    """Seconds, with the first token's logits; the rows stay in sequence 0."""
    engine.step([Chunk(1, ids[:8], 0, 1)])  # what is set up once is not timed
    engine.truncate(1, 0)
    return _seconds(lambda: engine.step([Chunk(0, ids, 0, 1)]))


def _restore(engine: Engine, stored: Tensors) -> float:
    engine.truncate(0, 0)
    return _seconds(lambda: engine.load_encoded(0, 0, stored))


def _decode(engine: Engine, stored: Tensors, runs: int) -> tuple[float, float]:
    """Seconds of a token for each agent: one agent after the other, and all in a step. Both take
    turns, so that what else the machine does meets both."""
    for seq_id in range(AGENTS):
        engine.truncate(seq_id, 0)
        engine.load_encoded(seq_id, 0, stored)

    def chunk(seq_id: int) -> Chunk:
        return Chunk(seq_id, [5], engine.n_rows(seq_id), 1)

    def one_by_one() -> None:
        for seq_id in range(AGENTS):
            engine.step([chunk(seq_id)])

    def at_once() -> None:
        engine.step([chunk(seq_id) for seq_id in range(AGENTS)])

    alone, together = [], []
    for _ in range(runs):
        engine.step([chunk(0)])  # every batch is taken apart and put together outside the clock
        one_by_one()
        alone.append(_seconds(one_by_one))
        at_once()
        together.append(_seconds(at_once))
    return min(alone), min(together)


def _print(
    model: str, device: str, prefill: float, restore: float, alone: float, together: float
) -> None:
    table = Table(f"{model}, {device}, q4 cells", *(Column(x, justify="right") for x in ("", "")))
    table.add_row(f"prefill of {TOKENS} tokens", f"{1000 * prefill:.0f} ms", "1")
    ratio = prefill / restore
    table.add_row("restore of the same", f"{1000 * restore:.1f} ms", f"{ratio:.0f}x faster")
    table.add_row(f"a token for each of {AGENTS}, one by one", f"{1000 * alone:.0f} ms", "1")
    batch = alone / together
    table.add_row("the same in one step", f"{1000 * together:.0f} ms", f"{batch:.2f}x faster")
    console.print(table)
    _print_mac()
    report = {
        "model": model,
        "device": device,
        "prefill_s": prefill,
        "restore_s": restore,
        "restore_speedup": ratio,
        "one_by_one_s": alone,
        "batch_s": together,
        "batch_speedup": batch,
    }
    print(json.dumps({"mlx": report}))


def _print_mac() -> None:
    contexts = [f"{n // 1024}K" for n in MAC_CONTEXTS]
    table = Table("TTFT on a Mac, ms, cold / warm / hot", *contexts)
    for name in MAC_MODELS:
        table.add_row(name, *["not measured here"] * len(contexts))
    console.print(table)
    console.print("On a Mac, for each model:")
    lengths = ",".join(map(str, MAC_CONTEXTS))
    for reference in MAC_MODELS.values():
        console.print(
            f"  KVFERRY_ENGINE=mlx KVFERRY_KV_TYPE=q4 KVFERRY_N_CTX=40960 KVFERRY_SLOTS=2 "
            f"kvferry bench ttft --nodes 1 --model {reference} --contexts {lengths}"
        )
        console.print(f"  kvferry bench mlx --model {reference}")
