"""kvferry bench residency: cells of float16 against cells of q4_1 (`kv_type`), in this process.

    memory     bytes of one token in the engine's cells
    speed      prefill to each context length, tokens/s; decode behind it, ms of a token
    restore    a block of stored codes into the engine: decoded first, or as it is
    KL         of going on, to an undisturbed run on float16: the same tokens forced on every run

Both engines are open, and take turns, so that what else the machine does meets both; of runs and
tokens the fastest counts, since threads that wait for each other suffer most from company.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table

from actors.engines.base import Chunk, Engine, Logits
from actors.models import open_engine, served_name
from bench.texts import context
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from storage.codec import Tensors, decode_rows, encode_rows, get_codec, slice_rows

_DECODED, _FORCED = 32, 128  # tokens after a context: timed, and compared
_Q4 = get_codec("q4")
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Figures:
    """Of one kind of cells; lists have one entry per run."""

    token_bytes: int
    prefill_per_s: dict[int, list[float]] = field(default_factory=dict)  # by context length
    decode_ms: dict[int, list[float]] = field(default_factory=dict)
    restore_ms: list[float] = field(default_factory=list)  # of one block


def run(config: ClusterConfig, lengths: list[int], runs: int) -> int:
    """Measure and print; the exit code. Raises ModelUnavailable, ConfigError."""
    room = max(lengths) + 2 * _FORCED
    replica = replace(config.replica, codec="q4", slots=1, n_ctx=room, cells=room)
    engines = {name: open_engine(replace(replica, kv_type=name)) for name in ("f16", "q4_1")}
    plain = engines["f16"]
    ids = plain.vocab.tokenize(context(0, 2 * room))[:room]
    if min(lengths) < plain.key.spec.block_tokens or plain.n_ctx < room:
        raise ConfigError(f"--contexts: from {plain.key.spec.block_tokens} to {plain.n_ctx - 256}")
    figures = {name: Figures(x.kv_bytes // x.n_cells) for name, x in engines.items()}
    for length in lengths:
        for _ in range(runs):
            for name, engine in engines.items():
                print(f"{length} tokens, {name} cells", file=sys.stderr, flush=True)
                _speed(engine, ids, length, figures[name])
    kl = _distances(plain, engines["q4_1"], ids, min(lengths), figures, runs)
    for engine in engines.values():
        engine.close()
    _print(figures, kl, served_name(replica.model))
    return 0


def _feed(engine: Engine, ids: Sequence[int]) -> Logits:
    for at in range(0, len(ids), engine.n_batch):
        part = ids[at : at + engine.n_batch]
        logits = engine.step([Chunk(0, part, engine.n_rows(0), int(at + len(part) == len(ids)))])
    last: Logits = logits[0][-1].copy()
    return last


def _speed(engine: Engine, ids: list[int], length: int, figures: Figures) -> None:
    engine.truncate(0, 0)
    began = time.perf_counter()
    _feed(engine, ids[:length])
    prefilled = time.perf_counter()
    seconds = []
    for token in ids[length : length + _DECODED]:
        before = time.perf_counter()
        _feed(engine, [token])
        seconds.append(time.perf_counter() - before)
    engine.truncate(0, 0)
    figures.prefill_per_s.setdefault(length, []).append(length / (prefilled - began))
    figures.decode_ms.setdefault(length, []).append(1000 * min(seconds))


def _forced(engine: Engine, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits after each token."""
    return np.stack([_feed(engine, [token]) for token in ids])


def _distances(
    plain: Engine, quantized: Engine, ids: list[int], n: int, figures: dict[str, Figures], runs: int
) -> dict[str, float]:
    """Mean KL by run: n tokens of context, and 128 more, fed one by one."""
    reply = ids[n : n + _FORCED]
    _feed(plain, ids[:n])
    stored = encode_rows(plain.key.spec, _Q4, plain.export(0, 0, n))
    undisturbed = _forced(plain, reply)
    for _ in range(runs):
        for name, engine in (("f16", plain), ("q4_1", quantized)):
            figures[name].restore_ms += _restore(engine, stored, n)
    parked, resident = _forced(plain, reply), _forced(quantized, reply)
    quantized.truncate(0, 0)
    _feed(quantized, ids[:n])
    computed = _forced(quantized, reply)
    return {
        "stored q4, f16 cells": _kl(undisturbed, parked),
        "stored q4, q4_1 cells": _kl(undisturbed, resident),
        "the second, to the first": _kl(parked, resident),
        "prefilled on q4_1 cells": _kl(undisturbed, computed),
    }


def _restore(engine: Engine, stored: Tensors, n: int) -> list[float]:
    """Fill the engine's sequence; ms of every whole block."""
    spec, taken = engine.key.spec, []
    engine.truncate(0, 0)
    for start in range(0, n, spec.block_tokens):
        piece = slice_rows(stored, start, min(n, start + spec.block_tokens))
        began = time.perf_counter()
        if engine.loads_encoded:
            engine.load_encoded(0, start, piece)
        else:
            engine.load(0, start, decode_rows(spec, _Q4, piece))
        taken.append(1000 * (time.perf_counter() - began))
    return taken[: n // spec.block_tokens]


def _kl(reference: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    p, q = (x - x.max(-1, keepdims=True) for x in map(np.float64, (reference, other)))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return round(float((np.exp(p) * (p - q)).sum(-1).mean()), 4)


def _print(figures: dict[str, Figures], kl: dict[str, float], model: str) -> None:
    table = Table(model, *(Column(f"{name} cells", justify="right") for name in figures), "ratio")
    rows = {"bytes of a token": [float(x.token_bytes) for x in figures.values()]}
    for length in next(iter(figures.values())).prefill_per_s:
        sides = figures.values()
        rows[f"prefill of {length}, tokens/s"] = [max(x.prefill_per_s[length]) for x in sides]
        rows[f"decode behind {length}, ms"] = [min(x.decode_ms[length]) for x in sides]
    rows["restore of a block, ms"] = [median(x.restore_ms) for x in figures.values()]
    for name, (plain, quantized) in rows.items():
        table.add_row(name, f"{plain:.1f}", f"{quantized:.1f}", f"{quantized / plain:.2f}")
    console.print(table)
    for name, value in kl.items():
        console.print(f"KL, {name}: {value:.4f}")
    report = {name: asdict(x) for name, x in figures.items()} | {"kl": kl, "model": model}
    print(json.dumps({"residency": report}))
