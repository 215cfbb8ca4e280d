"""Turns to place: a Mooncake trace, or random sessions. Used by `simulator`; pure."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ConfigError

BLOCK = 512  # tokens of a block of a trace


@dataclass(frozen=True)
class Turn:
    at: float
    session: int
    tokens: int  # of the prompt
    reply: int
    known: int  # tokens of the prompt that the session has seen before
    system: int  # id of the first block: the system prompt
    shared: int  # tokens of it that other sessions have, too


def mooncake(path: Path) -> list[Turn]:
    """Turns of a Mooncake trace: one JSON object a line, with timestamp (ms), input_length,
    output_length, hash_ids of blocks of 512 tokens. Raises ConfigError."""
    requests: list[tuple[float, int, int, list[int]]] = []
    try:
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            ids = [int(i) for i in entry["hash_ids"]]
            length, reply = int(entry["input_length"]), int(entry["output_length"])
            requests.append((float(entry["timestamp"]) / 1000.0, length, reply, ids))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--trace {path}: no Mooncake trace: {error!r}") from error
    if not requests or not all(ids and length for _, length, _, ids in requests):
        raise ConfigError(f"--trace {path}: no Mooncake trace: it has no requests, or empty ones")
    return list(_sessions(sorted(requests, key=lambda request: request[0])))


def _sessions(requests: Sequence[tuple[float, int, int, list[int]]]) -> Iterator[Turn]:
    """A request that repeats all but the end of an earlier one goes on with its session."""
    seen = Counter(i for _, _, _, ids in requests for i in ids)
    lines: dict[int, list[int]] = {}  # session -> blocks of its latest request
    of_block: dict[int, int] = {}
    for at, length, reply, ids in requests:
        session, known = len(lines), 0
        last = next((n for n in range(len(ids) - 1, -1, -1) if ids[n] in of_block), None)
        if last is not None:
            found = of_block[ids[last]]
            if last + 1 >= max(2, len(lines[found]) - 1):
                session, known = found, min(length, BLOCK * (last + 1))
        shared = next((n for n, i in enumerate(ids) if seen[i] < seen[ids[0]]), len(ids))
        shared = shared if seen[ids[0]] > 1 else 0
        lines[session] = ids
        of_block.update(dict.fromkeys(ids, session))
        yield Turn(at, session, length, reply, known, ids[0], min(BLOCK * shared, length))


def synthetic(n: int, seed: int) -> list[Turn]:
    """Sessions of a few turns under some system prompts, at random times."""
    draw, turns = random.Random(seed), list[Turn]()
    systems = [(number, BLOCK * draw.randint(1, 8)) for number in range(12)]
    session = 0
    while len(turns) < n:
        system, shared = draw.choice(systems)
        at, tokens, known = draw.uniform(0, n), shared + draw.randint(100, 16_000), 0
        for _ in range(draw.randint(1, 8)):
            reply = draw.randint(10, 300)
            turns.append(Turn(at, session, tokens, reply, known, system, shared))
            known = tokens + reply
            tokens, at = known + draw.randint(20, 3000), at + draw.expovariate(1 / 40)
        session += 1
    return sorted(turns, key=lambda turn: turn.at)[:n]
