"""kvferry bench mlx: the MLX engine on cells of q4, in this process, without a cluster.

    batch      one token for each of four agents in one step, against four steps of one agent
    restore    256 tokens of stored codes into the engine, against their prefill
    attention  of one layer, 256 tokens of a prompt behind 1,024 rows in codes: keys taken as codes,
               or decoded to floats first, as BatchQuantizedKVCache does where that is faster

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
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from actors.engines.base import Chunk, Engine
from actors.models import open_engine, served_name
from bench.texts import context
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from storage.codec import Tensors, get_codec

AGENTS, TOKENS = 4, 256
_BEHIND, _HEADS_PER_KEY = 1024, 3
_RESTORE_SPEEDUP = 20  # wanted, of models that are not tiny
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
    on_codes, decoded = _attention(engine, runs)
    report = {
        "model": served_name(replica.model),
        "device": engine.device,
        "prefill_s": prefill,
        "restore_s": restore,
        "restore_speedup": prefill / restore,
        "one_by_one_s": alone,
        "batch_s": together,
        "batch_speedup": alone / together,
        "attention_codes_s": on_codes,
        "attention_decoded_s": decoded,
        "attention_speedup": on_codes / decoded,
    }
    engine.close()
    _print(report)
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


def _attention(engine: Engine, runs: int) -> tuple[float, float]:
    """Seconds of a prompt's attention in one layer, keys in codes and keys decoded first."""
    import mlx.core as mx

    from actors.engines.mlx_cache import BatchQuantizedKVCache

    class OnCodes(BatchQuantizedKVCache):
        decode_from = 1 << 30

    class Decoded(BatchQuantizedKVCache):
        decode_from = 1

    spec, codec = engine.key.spec, get_codec("q4")
    layer = next(x for x in spec.layers if x.kind != "sliding")
    latent = 32 * (layer.key_dim // 64) if layer.kind == "latent" else 0
    found: dict[type, list[float]] = {OnCodes: [], Decoded: []}

    def rows(n: int, n_heads: int, dim: int) -> mx.array:
        return mx.random.normal((1, n_heads, n, dim))

    def values(n: int) -> mx.array | None:
        return None if latent else rows(n, layer.n_kv_heads, layer.value_dim)

    queries = rows(TOKENS, _HEADS_PER_KEY * layer.n_kv_heads, layer.key_dim)
    for _ in range(runs):
        for kind, seconds in found.items():
            cache = kind(codec.keys, codec.values, latent=latent)
            cache.update_and_fetch(rows(_BEHIND, layer.n_kv_heads, layer.key_dim), values(_BEHIND))
            keys, mask = rows(TOKENS, layer.n_kv_heads, layer.key_dim), cache.make_mask(TOKENS)
            mx.eval(cache.fields, queries, keys)
            seconds.append(
                _seconds(
                    lambda c=cache, k=keys, m=mask: mx.eval(  # type: ignore[misc]
                        c.attend(queries, k, values(TOKENS), 0.125, m)
                    )
                )
            )
    return min(found[OnCodes]), min(found[Decoded])


def _print(report: dict[str, Any]) -> None:
    title = f"{report['model']}, {report['device']}, q4 cells"
    table = Table(title, *(Column(x, justify="right") for x in ("", "")))

    def add(label: str, name: str, against: str = "", digits: int = 0) -> None:
        times = (
            f"{report[against]:.{2 if report[against] < 10 else 0}f}x faster" if against else "1"
        )
        table.add_row(label, f"{1000 * report[name]:.{digits}f} ms", times)

    add(f"prefill of {TOKENS} tokens", "prefill_s")
    add("restore of the same", "restore_s", "restore_speedup", 1)
    add(f"a token for each of {AGENTS}, one by one", "one_by_one_s")
    add("the same in one step", "batch_s", "batch_speedup")
    add(f"a layer's attention, {TOKENS} tokens, keys in codes", "attention_codes_s")
    add("the same, keys decoded first", "attention_decoded_s", "attention_speedup")
    console.print(table)
    if report["restore_speedup"] < _RESTORE_SPEEDUP:
        console.print(f"restore is less than {_RESTORE_SPEEDUP}x faster than prefill")
    _print_mac()
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
