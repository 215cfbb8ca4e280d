"""A placement may say how many stored rows to load: the rest is prefilled, and nothing is lost."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.engines.fake_engine import FakeEngine
from actors.loop import ReplicaLoop
from actors.turn import SamplingParams, TurnRequest
from tests.loops import Answer, Stream, agent_id, assistant, evict, make_loop, memory_of, run, user

LONG = "Tell me about the sea, the wind and the old harbour of the town. " * 20


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[ReplicaLoop]:
    made = make_loop(FakeEngine(4, n_ctx=4096), tmp_path)
    yield made
    made.close()


def limited(loop: ReplicaLoop, messages: list[dict[str, str]], limit: int | None) -> Answer:
    request = TurnRequest(
        "again", agent_id(), tuple(messages), SamplingParams(20, 0.0), restore_tokens=limit
    )
    stream = Stream(request)
    loop.submit(request, stream)
    return stream.result()


@pytest.mark.parametrize(("limit", "cached"), [(0, 0), (256, 256), (300, 300), (None, "all")])
def test_rows_beyond_the_limit_are_prefilled_and_stay_stored(
    loop: ReplicaLoop, limit: int | None, cached: int | str
) -> None:
    first = run(loop, [user(LONG)])
    evict(loop, pool=True)
    stored = memory_of(loop).branches[0].rows
    again = [user(LONG), assistant(first.text), user("And then?")]
    answer = limited(loop, again, limit)
    assert answer.cached == (stored if cached == "all" else cached)
    assert answer.cache == ("cold" if limit == 0 else "warm")
    evict(loop, pool=True)
    (branch,) = memory_of(loop).branches
    assert branch.rows > stored
    assert not loop.memory.faults
    more = [*again, assistant(answer.text), user("Go on.")]
    final = run(loop, more)
    assert final.cached == branch.rows
    fresh = run(loop, more, session="fresh")
    assert final.ids == fresh.ids


def test_rows_in_ram_are_loaded_whatever_the_limit(loop: ReplicaLoop) -> None:
    first = run(loop, [user(LONG)])
    evict(loop)
    again = [user(LONG), assistant(first.text), user("And then?")]
    assert limited(loop, again, 256).cached > 256
