"""The actor's face of a replica, without Ray: signs of life, and their end."""

import asyncio
import itertools
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from actors.config import ReplicaConfig
from actors.errors import EngineFault
from actors.outbox import Outbox
from actors.replica import ModelReplica
from actors.turn import (
    Alive,
    Progress,
    SamplingParams,
    StreamItem,
    Tokens,
    TurnFailed,
    TurnFinished,
    TurnRequest,
)
from storage.card import AgentId


@pytest.fixture
def replica(tmp_path: Path) -> ModelReplica:
    config = ReplicaConfig(model="fake://", store=f"file://{tmp_path}/store", slots=2, n_ctx=512)
    return ModelReplica(config, "n")


def hold(replica: ModelReplica) -> threading.Event:
    """The engine's next step does not end before the event is set."""
    gate, engine = threading.Event(), replica._loop.engine
    step = engine.step

    def held(chunks):  # type: ignore[no-untyped-def]
        gate.wait(20)
        return step(chunks)

    engine.step = held  # type: ignore[method-assign]
    return gate


REQUEST = TurnRequest(
    "t",
    AgentId("default", "a"),
    ({"role": "user", "content": "hello"},),
    SamplingParams(4, 0.0, ignore_eos=True),
)


async def items(replica: ModelReplica, request: TurnRequest = REQUEST) -> list[StreamItem]:
    return [item async for batch in replica.run_turn(request) for item in batch]


def test_the_cells_of_a_draft_model_are_reported(replica: ModelReplica) -> None:
    config = replace(replica._config, speculation="draft", draft_model="fake://")
    drafting = ModelReplica(config, "drafting")
    assert drafting.info().kv_bytes == 2 * replica.info().kv_bytes > 0
    for made in (drafting, replica):
        made.close()


def test_a_long_step_is_no_silence(replica: ModelReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life come from a thread that no step holds up."""
    monkeypatch.setattr("actors.replica._BEAT_S", 0.02)
    gate = hold(replica)
    threading.Timer(0.3, gate.set).start()
    got = asyncio.run(items(replica))
    assert sum(isinstance(item, Alive) for item in got) >= 5
    assert isinstance(got[-1], TurnFinished)
    replica.close()


def test_a_step_that_does_not_end_is_a_fault(
    replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.replica._BEAT_S", 0.02)
    gate = hold(replica)
    replica._loop._step_timeout_s = 0.4  # more than an idle loop's nap
    last = asyncio.run(items(replica))[-1]
    assert isinstance(last, TurnFailed)
    assert isinstance(last.error, EngineFault)
    with pytest.raises(EngineFault, match="stuck"):
        asyncio.run(replica.status())
    gate.set()
    replica.close()


def test_tokens_wait_for_company_but_not_the_first() -> None:
    async def take() -> list[list[StreamItem]]:
        box, lists = Outbox(lambda: 1e6), []
        last = TurnFinished(1, 4, "", "stop")

        def speak() -> None:
            for n in range(4):
                box.put(Tokens(1, n, (n,), "x"))
                time.sleep(0.02)
            box.put(last)

        began = time.monotonic()
        threading.Thread(target=speak).start()
        lists.append(await box.take())
        assert time.monotonic() - began < 0.1
        while last not in lists[-1]:
            lists.append(await asyncio.wait_for(box.take(), 5))
        return lists

    lists = asyncio.run(take())
    assert [len(items) for items in lists] == [1, 4]  # the end calls for no patience


def test_tokens_that_wait_do_leave() -> None:
    async def take() -> None:
        box = Outbox(lambda: 0.05)
        for n in range(3):
            box.put(Tokens(1, n, (n,), "x"))
            assert len(await asyncio.wait_for(box.take(), 5)) == 1

    asyncio.run(take())


def test_tokens_of_all_turns_leave_together() -> None:
    async def left(box: Outbox, began: float) -> float:
        """When its second token leaves; the first came `began` seconds from here."""
        await asyncio.sleep(began)
        for n in range(2):
            box.put(Tokens(1, n, (n,), "x"))
            assert len(await asyncio.wait_for(box.take(), 5)) == 1
        return asyncio.get_running_loop().time()

    async def both() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0.4 - loop.time() % 0.4)  # a moment that is shared: both begin after it
        return await asyncio.gather(*(left(Outbox(lambda: 0.4), began) for began in (0.01, 0.2)))

    one, other = asyncio.run(both())
    assert abs(one - other) < 0.1


def test_progress_is_told_into_silence_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.outbox._PROGRESS_S", 0.2)

    async def take() -> list[StreamItem]:
        box = Outbox(lambda: 0.05)
        await asyncio.sleep(0.25)
        box.put(Progress(1, 60, 300))
        got = await asyncio.wait_for(box.take(), 5)
        box.put(Progress(1, 120, 300))  # of the next step
        box.put(Tokens(1, 0, (0,), "x"))
        return got + await asyncio.wait_for(box.take(), 5)

    assert asyncio.run(take()) == [Progress(1, 60, 300), Tokens(1, 0, (0,), "x")]


def test_a_turn_that_speaks_does_not_beat(
    replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every list costs the processes between here and the client some milliseconds."""
    monkeypatch.setattr("actors.replica._BEAT_S", 0.3)
    monkeypatch.setattr("actors.replica.interval", lambda *_: 0.05)
    step = replica._loop.engine.step

    def slowly(chunks):  # type: ignore[no-untyped-def]
        time.sleep(0.04)
        return step(chunks)

    replica._loop.engine.step = slowly  # type: ignore[method-assign]
    request = replace(REQUEST, sampling=replace(REQUEST.sampling, max_tokens=20))
    got = asyncio.run(asyncio.wait_for(items(replica, request), 20))
    assert sum(isinstance(item, Tokens) for item in got) == 20  # in 0.8 s
    assert not any(isinstance(item, Alive) for item in got)
    replica.close()


def test_a_beat_after_the_last_item_does_not_keep_the_turn_open(
    replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both may come while the caller is busy with the batch before."""
    monkeypatch.setattr("actors.replica._BEAT_S", 0.1)

    gate = hold(replica)

    async def slowly() -> list[StreamItem]:
        batches = []
        async for batch in replica.run_turn(REQUEST):
            batches.append(batch)
            gate.set()
            await asyncio.sleep(0.35)
        return batches[-1]

    last = asyncio.run(asyncio.wait_for(slowly(), 10))
    assert any(isinstance(item, TurnFinished) for item in last)
    assert isinstance(last[-1], Alive)  # else this test shows nothing
    replica.close()


def test_a_dead_loop_does_not_beat(replica: ModelReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.replica._BEAT_S", 0.02)
    replica._loop.close()
    last = asyncio.run(asyncio.wait_for(items(replica), 10))[-1]
    assert isinstance(last, TurnFailed)


def test_the_end_of_an_attempt_leaves_the_next_one_alone(replica: ModelReplica) -> None:
    """Both are here where the turn is placed on the replica that was given up."""
    gate = hold(replica)

    async def run() -> list[list[StreamItem]]:
        first = asyncio.create_task(items(replica, replace(REQUEST, attempt=1)))
        await asyncio.sleep(0.2)
        await replica.cancel("t", 1)
        second = asyncio.create_task(items(replica, replace(REQUEST, attempt=2)))
        await asyncio.sleep(0.2)
        gate.set()
        return await asyncio.wait_for(asyncio.gather(first, second), 20)

    first, second = asyncio.run(run())
    assert isinstance(first[-1], TurnFinished)
    assert isinstance(second[-1], TurnFinished)
    assert (first[-1].reason, second[-1].reason) == ("cancelled", "length")
    replica.close()


def test_the_vocabulary_is_read_before_the_first_turn(replica: ModelReplica) -> None:
    """For as long as that takes there would be no signs of life."""
    prepare = replica._loop._admission._prepare
    assert prepare._grammars._tokenizer is not None
    replica.close()


def test_a_status_that_waits_for_the_disk_holds_up_no_beat(
    replica: ModelReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.replica._BEAT_S", 0.02)
    monkeypatch.setattr("actors.replica.local_status", lambda memory: time.sleep(0.5))
    gate = hold(replica)
    threading.Timer(0.6, gate.set).start()

    async def run() -> list[float]:
        seen: list[float] = []
        status = None
        async for _ in replica.run_turn(REQUEST):
            seen.append(time.monotonic())
            status = status or asyncio.create_task(replica.status())
        assert status is not None
        await status
        return seen

    seen = asyncio.run(run())
    assert max(b - a for a, b in itertools.pairwise(seen)) < 0.3
    replica.close()
