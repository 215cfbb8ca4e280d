"""Steps of a real model: who is cancelled is gone after two, and an arrival stalls nobody."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.engines.base import Chunk, Engine, Logits
from actors.loop import LoopConfig, ReplicaLoop
from actors.scheduler import SchedulerConfig
from bench.texts import context
from tests.loops import WAIT, make_loop, start, user
from tests.test_admission import all_free

pytestmark = pytest.mark.model

MakeLoop = Callable[..., ReplicaLoop]
BOUND = 0.4  # seconds of a step beside others' decoding
LEAST = 16  # prompt tokens of such a step, however slow the machine


@pytest.fixture(scope="module")
def engine(smollm2_gguf: Path) -> Iterator[Engine]:
    from actors.engines.llama_engine import LlamaEngine

    made = LlamaEngine(smollm2_gguf, n_seq_max=3, n_ctx=2048, n_cells=4096, n_threads=2)
    close = made.close
    made.close = lambda: None  # type: ignore[method-assign]  # outlives the loops
    yield made
    close()


@pytest.fixture
def steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[int, int], float]]:
    """Of every step: the tokens of each sequence, and what it took in seconds."""
    seen: list[tuple[dict[int, int], float]] = []
    step = engine.step

    def watched(chunks: Sequence[Chunk]) -> dict[int, Logits]:
        began = time.perf_counter()
        logits = step(chunks)
        sizes = {chunk.seq_id: len(chunk.token_ids) for chunk in chunks}
        seen.append((sizes, time.perf_counter() - began))
        return logits

    monkeypatch.setattr(engine, "step", watched)
    return seen


@pytest.fixture
def loop(engine: Engine, tmp_path: Path) -> Iterator[ReplicaLoop]:
    for seq_id in range(engine.n_seq_max):
        engine.truncate(seq_id, 0)
    made = make_loop(engine, tmp_path, loop=LoopConfig(SchedulerConfig(max_step_s=BOUND)))
    yield made
    made.close()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_cancelled_turn_frees_its_cells_within_two_steps(
    loop: ReplicaLoop, steps: list[tuple[dict[int, int], float]], phase: str
) -> None:
    options = {"n": 400, "ignore_eos": True}
    other = start(loop, [user("Tell me a story.")], session="b", turn_id="other", **options)
    other.take(3)
    text = context(1, 1200 if phase == "prefill" else 40)
    stream = start(loop, [user(text)], **options)
    if phase == "decode":
        stream.take(3)
    else:
        next(iter(stream))
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((len(steps), len(loop.residency._busy)))
        if seen[-1][0] < seen[1][0] + 4:
            loop.call(look)

    loop.call(lambda: seen.append((len(steps), len(loop.residency._busy)))).result(WAIT)
    loop.cancel("turn")
    loop.call(look)
    assert stream.result().reason == "cancelled"
    assert len(stream.answer.ids) == 0 if phase == "prefill" else len(stream.answer.ids) < 400
    other.take(len(other.answer.ids) + 30)
    began = seen[1][0]  # when the cancel arrived
    assert seen[0][1] == 2
    assert all(busy == 1 for at, busy in seen if at >= began + 2)
    assert max(at for at, _ in seen) >= began + 2
    loop.cancel("other")
    other.result()
    all_free(loop)


def test_an_arrival_does_not_stall_the_others_longer_than_the_bound(
    loop: ReplicaLoop, steps: list[tuple[dict[int, int], float]]
) -> None:
    """Whoever decodes is in every step, and steps with an arrival's prompt keep to the bound, but
    for what else the machine does."""
    running = start(loop, [user(context(1, 80))], n=900, ignore_eos=True, turn_id="running")
    running.take(20)
    began = len(steps)
    arrivals = [start(loop, [user(context(i, 250))], session=f"s{i}", n=2) for i in (2, 3)]
    for stream in arrivals:
        assert stream.result().last is not None
    mixed = [(sizes, took) for sizes, took in steps[began:] if max(sizes.values()) > 1]
    prompts = [sum(n for n in sizes.values() if n > 1) for sizes, _ in mixed]
    taken = np.array([took for _, took in mixed])
    print(
        f"{len(mixed)} steps of {min(prompts)} to {max(prompts)} prompt tokens: "
        f"median {np.median(taken):.3f} s, most {taken.max():.3f} s"
    )
    assert all(1 in sizes.values() for sizes, _ in mixed)
    chosen = taken[np.array(prompts) > LEAST]
    if len(chosen):
        assert np.median(chosen) < 1.5 * BOUND
        assert np.mean(chosen > 3 * BOUND) < 0.2
    loop.cancel("running")
    running.result()
    all_free(loop)
