"""What a step costs besides llama_decode: eight agents decode in the replica's own loop.

In this process, without a cluster: batch building, sampling, text, the round's bookkeeping, and
what other threads of the process keep the interpreter for.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.config import ReplicaConfig
from actors.models import open_engine
from actors.turn import Resume, SamplingParams, StreamItem, Tokens, TurnFailed, TurnRequest
from bench.restore import Bench
from bench.texts import context
from storage.card import AgentId

_WAIT_S = 300.0
_PROMPT, _REPLY = 64, 96  # tokens
SAMPLING = {
    "greedy": SamplingParams(temperature=0, ignore_eos=True),
    "temperature 0.7, top-p 0.95": SamplingParams(temperature=0.7, top_p=0.95, ignore_eos=True),
}


class OverheadFailed(Exception):
    """A turn did not run to its end."""


@dataclass(frozen=True)
class Overhead:
    """While all agents decode; seconds are of a step."""

    sampling: str
    agents: int
    steps: int
    step_s: float
    compute_s: float  # in llama_decode

    @property
    def share(self) -> float:
        """Of a step's time, outside llama_decode."""
        return 1 - self.compute_s / self.step_s

    @property
    def tokens_per_s(self) -> float:
        return self.agents / self.step_s


def overheads(config: ReplicaConfig, agents: int) -> list[Overhead]:
    """One for every way of sampling. Raises OverheadFailed, ModelUnavailable."""
    config = replace(config, slots=agents, n_ctx=_PROMPT + _REPLY + 16, cells=0)
    return [_overhead(config, name, params) for name, params in SAMPLING.items()]


def _overhead(config: ReplicaConfig, name: str, params: SamplingParams) -> Overhead:
    engine: Any = open_engine(config)
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as folder:
        bench = Bench(engine, Path(folder), config.codec)

        def look() -> tuple[int, float, float]:
            spent = bench.loop.overhead
            return spent.steps, spent.engine_s + spent.outside_s, engine.threads.compute_s

        try:
            window = _Window(config.slots, lambda: bench.loop.call(look).result(_WAIT_S))
            for number in range(config.slots):
                ids = engine.vocab.tokenize(context(number, 2 * _PROMPT))[:_PROMPT]
                sampling = replace(params, max_tokens=_REPLY, seed=number)
                bench.loop.submit(_turn(number, ids, sampling), window.sink(number))
            began, ended = window.wait()
        finally:
            bench.close()
    steps = ended[0] - began[0]
    if steps < 2:
        raise OverheadFailed("the agents never decoded together")
    step_s, compute_s = (ended[1] - began[1]) / steps, (ended[2] - began[2]) / steps
    return Overhead(name, config.slots, steps, step_s, compute_s)


def _turn(number: int, ids: list[int], sampling: SamplingParams) -> TurnRequest:
    agent = AgentId("default", f"overhead-{number}")
    return TurnRequest(f"turn-{number}", agent, (), sampling, resume=Resume(tuple(ids), ()))


class _Window:
    """From the first moment at which every agent has two tokens until the first has nearly all."""

    def __init__(self, agents: int, look: Callable[[], tuple[int, float, float]]) -> None:
        self._tokens, self._look = [0] * agents, look
        self._all, self._end = threading.Event(), threading.Event()
        self._failure: Exception | None = None

    def sink(self, number: int) -> Callable[[StreamItem], None]:
        def take(item: StreamItem) -> None:
            if isinstance(item, TurnFailed):
                self._failure = item.error
                self._all.set()
                self._end.set()
            if isinstance(item, Tokens):
                self._tokens[number] += len(item.ids)
                if min(self._tokens) >= 2:
                    self._all.set()
                if self._tokens[number] >= _REPLY - 1:
                    self._end.set()

        return take

    def wait(self) -> tuple[tuple[int, float, float], tuple[int, float, float]]:
        if not self._all.wait(_WAIT_S):
            raise OverheadFailed(f"not all agents decode after {_WAIT_S:.0f} s")
        began = self._look()
        if not self._end.wait(_WAIT_S):
            raise OverheadFailed(f"no agent is done after {_WAIT_S:.0f} s")
        ended = self._look()
        if self._failure is not None:
            raise OverheadFailed(f"a turn failed: {self._failure}")
        return began, ended
