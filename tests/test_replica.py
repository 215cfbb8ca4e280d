"""The actor's face of a replica, without Ray: signs of life, and their end."""

import asyncio
import threading
import time
from pathlib import Path

import pytest

from actors.config import ReplicaConfig
from actors.errors import EngineFault
from actors.outbox import Outbox
from actors.replica import ModelReplica
from actors.turn import (
    Alive,
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


async def items(replica: ModelReplica) -> list[StreamItem]:
    agent = AgentId("default", "a")
    request = TurnRequest(
        "t", agent, ({"role": "user", "content": "hello"},), SamplingParams(4, 0.0)
    )
    return [item async for batch in replica.run_turn(request) for item in batch]


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
        box, lists = Outbox(lambda: 0.2), []
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
