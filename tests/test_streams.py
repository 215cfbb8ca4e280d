"""Turns that share a stream: each gets its own items, whatever becomes of the others."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from actors.carrier import Carried, Carriers
from actors.errors import EngineFault
from actors.turn import (
    Alive,
    SamplingParams,
    StreamItem,
    Tokens,
    TurnFinished,
    TurnRequest,
    is_last,
)
from cluster.remote import ReplicaLost
from cluster.streams import Streams
from storage.card import AgentId
from tests.fake_cluster import Handle, lost

LIFE = "life-1"


class Replica:
    """Its turns say what a test has them say; None ends one."""

    def __init__(self) -> None:
        self.says: dict[str, asyncio.Queue[list[StreamItem] | Exception | None]] = {}
        self.carried: list[str] = []
        self.boarded: list[tuple[str, bool]] = []
        self.cancelled: list[str] = []  # by whom their streams were left
        self.told: list[tuple[str, int]] = []  # calls to cancel
        self.lists: list[list[Carried]] = []
        self.attended: list[str] = []
        self.dies = asyncio.Event()
        self.carriers = Carriers(self.run_turn)

    def queue(self, turn: str) -> "asyncio.Queue[list[StreamItem] | Exception | None]":
        return self.says.setdefault(turn, asyncio.Queue())

    def say(self, turn: str, *items: StreamItem) -> None:
        self.queue(turn).put_nowait(list(items))

    async def run_turn(self, request: TurnRequest) -> AsyncGenerator[list[StreamItem], None]:
        ended = False
        try:
            while (items := await self.queue(request.id).get()) is not None:
                if isinstance(items, Exception):
                    ended = True
                    raise items
                yield items
            ended = True
        finally:
            if not ended:
                self.cancelled.append(request.id)

    async def carry(self, name: str, request: TurnRequest) -> AsyncGenerator[list[Carried], None]:
        self.carried.append(request.id)
        async with aclosing(self.carriers.carry(name, request)) as lists:
            async for carried in lists:
                if self.dies.is_set():
                    raise lost()
                self.lists.append(carried)
                yield carried

    async def board(self, name: str, request: TurnRequest) -> bool:
        took = self.carriers.board(name, request)
        self.boarded.append((request.id, took))
        return took

    def attend(self, name: str) -> None:
        self.attended.append(name)
        self.carriers.attend(name)

    def cancel(self, turn_id: str, attempt: int) -> None:
        self.told.append((turn_id, attempt))


class Reader:
    """Reads a turn to its end, in the background."""

    def __init__(self, streams: Streams, replica: Replica, turn: str, timeout: float = 5.0) -> None:
        self.items: list[StreamItem] = []
        self.request = TurnRequest(turn, AgentId("t", turn), (), SamplingParams(), attempt=1)
        self._lists = streams.run_turn(Handle(replica), LIFE, self.request, timeout)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with aclosing(self._lists) as lists:
            async for items in lists:
                self.items += items
                if is_last(items):
                    return


def tokens(index: int) -> Tokens:
    return Tokens(1, index, (index,), str(index))


def last(index: int) -> TurnFinished:
    return TurnFinished(1, index, "", "stop")


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)


def run(test: Callable[[Streams, Replica], Awaitable[None]]) -> None:
    async def go() -> None:
        await test(Streams(5.0), Replica())

    asyncio.run(go())


async def two(streams: Streams, replica: Replica) -> tuple[Reader, Reader]:
    """Turns a and b on one stream."""
    a = Reader(streams, replica, "a")
    replica.say("a", tokens(0))
    await until(lambda: a.items)
    b = Reader(streams, replica, "b")
    replica.say("b", tokens(0))
    await until(lambda: b.items)
    assert (replica.carried, replica.boarded) == (["a"], [("b", True)])
    return a, b


def test_turns_that_run_side_by_side_share_a_stream_which_ends_with_the_last() -> None:
    async def go(streams: Streams, replica: Replica) -> None:
        a, b = await two(streams, replica)
        replica.say("a", last(1))
        replica.queue("a").put_nowait(None)
        await a.task
        replica.say("b", tokens(1))
        replica.say("b", last(2), Alive(1))
        replica.queue("b").put_nowait(None)
        await b.task
        assert a.items == [tokens(0), last(1)]
        assert b.items == [tokens(0), tokens(1), last(2), Alive(1)]
        await until(lambda: not streams._open)
        assert not replica.carriers._open
        assert replica.told == replica.cancelled == []
        c = Reader(streams, replica, "c")
        replica.say("c", last(0))
        replica.queue("c").put_nowait(None)
        await c.task
        assert replica.carried == ["a", "c"]

    run(go)


def test_what_turns_say_at_one_moment_leaves_as_one_list() -> None:
    async def go(streams: Streams, replica: Replica) -> None:
        await two(streams, replica)
        n = len(replica.lists)
        replica.say("a", tokens(1))
        replica.say("b", tokens(1))
        await until(lambda: len(replica.lists) > n)
        assert replica.lists[n:] == [[(("a", 1), [tokens(1)]), (("b", 1), [tokens(1)])]]

    run(go)


@pytest.mark.parametrize("ends", ["breaks", "stops"])
def test_a_turn_that_fails_does_not_disturb_the_others(ends: str) -> None:
    async def go(streams: Streams, replica: Replica) -> None:
        a, b = await two(streams, replica)
        if ends == "breaks":
            replica.queue("a").put_nowait(EngineFault("a bug"))
            with pytest.raises(EngineFault):
                await a.task
            assert replica.told == [("a", 1)]
        else:  # its stream ends without a last item
            replica.queue("a").put_nowait(None)
            await a.task
        replica.say("b", last(1))
        await b.task
        assert b.items == [tokens(0), last(1)]

    run(go)


def test_a_replica_that_dies_is_lost_to_all_its_turns() -> None:
    async def go(streams: Streams, replica: Replica) -> None:
        readers = await two(streams, replica)
        replica.dies.set()
        replica.say("a", tokens(1))
        for reader in readers:
            with pytest.raises(ReplicaLost, match="ActorDiedError"):
                await reader.task
        assert sorted(replica.cancelled) == ["a", "b"]
        await until(lambda: not streams._open)

    run(go)


def test_a_reader_that_leaves_has_its_own_turn_cancelled() -> None:
    async def go(streams: Streams, replica: Replica) -> None:
        a, b = await two(streams, replica)
        a.task.cancel()
        await asyncio.wait([a.task])
        assert replica.told == [("a", 1)]
        assert list(streams._open[LIFE]._turns) == [("b", 1)], "nothing gathers for it"
        replica.say("a", tokens(1))
        replica.say("b", last(1))
        await b.task
        assert b.items == [tokens(0), last(1)]

    run(go)


def test_a_stream_that_is_closed_cancels_all_its_turns() -> None:
    async def go(streams: Streams, replica: Replica) -> None:
        request = TurnRequest("a", AgentId("t", "a"), (), SamplingParams(), attempt=1)
        carrying = replica.carriers.carry("stream", request)
        assert replica.carriers.board("stream", replace(request, id="b")) is False, "not open yet"
        replica.say("a", tokens(0))
        await anext(carrying)
        assert replica.carriers.board("stream", replace(request, id="b"))
        replica.say("b", tokens(0))
        await anext(carrying)
        await carrying.aclose()
        await until(lambda: sorted(replica.cancelled) == ["a", "b"])
        assert replica.carriers.board("stream", replace(request, id="c")) is False

    run(go)


@pytest.mark.parametrize("attended", [True, False])
def test_a_stream_that_nobody_attends_is_given_up(
    attended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ingress died, or is cut off: Ray takes the items, and drops them."""
    monkeypatch.setattr("actors.carrier._ABANDONED_S", 0.3)
    monkeypatch.setattr("cluster.streams._ATTEND_S", 0.05 if attended else 60.0)

    async def go(streams: Streams, replica: Replica) -> None:
        await two(streams, replica)
        for _ in range(20):
            replica.say("a", Alive(1))
            await asyncio.sleep(0.03)
        assert sorted(replica.cancelled) == ([] if attended else ["a", "b"])
        assert bool(replica.attended) is attended

    run(go)


def test_the_silence_of_one_turn_is_not_the_others() -> None:
    async def go(streams: Streams, replica: Replica) -> None:
        a = Reader(streams, replica, "a", timeout=0.2)
        replica.say("a", tokens(0))
        await until(lambda: a.items)
        b = Reader(streams, replica, "b")
        for index in range(6):
            replica.say("b", tokens(index))
            await asyncio.sleep(0.05)
        with pytest.raises(ReplicaLost, match="no sign of life"):
            await a.task
        replica.say("b", last(6))
        await b.task
        assert len(b.items) == 7

    run(go)


@pytest.mark.parametrize("any_attempt", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_turn_that_is_cancelled_before_its_call_comes_does_not_begin(
    first: bool, any_attempt: bool
) -> None:
    async def go(_: Streams, replica: Replica) -> None:
        request = TurnRequest("b", AgentId("t", "b"), (), SamplingParams(), attempt=1)
        replica.carriers.cancel("b", None if any_attempt else 1)
        if first:
            lists = [items async for items in replica.carriers.carry("stream", request)]
        else:
            a = replace(request, id="a")
            carrying = replica.carriers.carry("stream", a)
            replica.say("a", tokens(0))
            lists = [await anext(carrying)]
            assert replica.carriers.board("stream", request)
            lists.append(await anext(carrying))
            await carrying.aclose()
        assert lists[-1] == [(("b", 1), None)]
        assert "b" not in replica.says, "it was never run"
        again = replace(request, id="c", attempt=1)
        replica.say("c", last(0))
        replica.queue("c").put_nowait(None)
        carrying = replica.carriers.carry("next", again)
        assert (await anext(carrying))[0][1] == [last(0)]
        await carrying.aclose()

    run(go)


def test_what_breaks_a_turn_can_be_sent_whatever_it_is() -> None:
    class Bug(Exception):
        def __reduce__(self) -> str:
            raise TypeError("it cannot be pickled")

    async def go(streams: Streams, replica: Replica) -> None:
        a, b = await two(streams, replica)
        replica.queue("a").put_nowait(Bug("of a"))
        with pytest.raises(RuntimeError, match="Bug: of a"):
            await a.task
        replica.say("b", last(1))
        await b.task

    run(go)


@pytest.mark.parametrize("why", ["it has ended", "it is old"])
def test_a_stream_that_takes_no_more_turns_makes_room_for_the_next(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go(streams: Streams, replica: Replica) -> None:
        a, b = await two(streams, replica)
        if why == "it is old":
            monkeypatch.setattr("cluster.streams._BOARDING_S", 0.0)
        else:  # the replica knows, the ingress does not yet
            monkeypatch.setattr(replica.carriers, "board", lambda *_: False)
        c = Reader(streams, replica, "c")
        for turn, reader in (("c", c), ("a", a), ("b", b)):
            replica.say(turn, last(1))
            replica.queue(turn).put_nowait(None)
            await reader.task
        assert replica.carried == ["a", "c"]
        assert c.items == [last(1)]

    run(go)
