"""Which agent leaves a replica that is fuller than another, and when: the rule itself, and the
router's rounds on replicas that only say how full they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import ReplicaConfig
from api.metrics import Metrics
from cluster import rebalance as rebalance_module
from cluster import router as router_module
from cluster.config import ClusterConfig
from cluster.loads import Load, Mobile, extremes, next_move
from cluster.member import Replica, candidate, load
from cluster.nodes import Node
from cluster.placement import PlacementConfig
from cluster.router import PlacementRouter
from storage.card import AgentId
from storage.errors import StoreUnavailable
from tests.fake_cluster import lost
from tests.test_drain import Client, seat
from tests.test_drain import served as served
from tests.test_router import Device, QuietPool

THRESHOLD = PlacementConfig().rebalance
AGENTS = [AgentId("default", f"s{n}") for n in range(12)]

# ---- the rule


def replicas(node: str) -> st.SearchStrategy[Load]:
    return st.builds(
        lambda *turns: Load(node, *turns),
        st.integers(0, 4),
        st.integers(0, 6),
        st.integers(1, 8),
    )


agents = st.lists(
    st.builds(
        Mobile,
        st.sampled_from(AGENTS),
        st.sampled_from([1, 1, 2]),
        st.floats(0, 100),
    ),
    max_size=12,
    unique_by=lambda mobile: mobile.agent,
)


@given(replicas("a"), replicas("b"), agents)
def test_every_move_makes_the_difference_smaller_and_none_is_taken_back(
    a: Load, b: Load, mobiles: list[Mobile]
) -> None:
    loads, moved = {"a": a, "b": b}, set[AgentId]()
    for _ in range(len(mobiles) + 1):
        pair = extremes(list(loads.values()), list(loads.values()), THRESHOLD)
        here = {m for m in mobiles if m.agent not in moved}
        mobile = next_move(*pair, here, THRESHOLD) if pair else None
        if pair is None or mobile is None:
            break
        full, free = pair
        after = full.without(mobile), free.plus(mobile)
        assert 0 <= after[0].pressure - after[1].pressure < full.pressure - free.pressure
        loads = {load.node: load for load in after}
        moved.add(mobile.agent)
        back = next_move(after[1], after[0], [mobile], THRESHOLD)
        assert back is None
    else:
        pytest.fail("it goes on for ever")


def replica(node: str, running: int = 0, waiting: int = 0) -> Load:
    return Load(node, running, waiting, 4)


def test_within_the_threshold_nobody_moves() -> None:
    mobiles = [Mobile(agent) for agent in AGENTS]
    assert next_move(replica("a", 3), replica("b", 1), mobiles, THRESHOLD) is None
    assert next_move(replica("a", 4), replica("b", 1), mobiles, THRESHOLD) is not None


def test_the_last_that_began_goes_first() -> None:
    first, last = Mobile(AGENTS[2], 1, -610.0), Mobile(AGENTS[3], 1, -620.0)
    assert next_move(replica("a", 4), replica("b"), [first, last], THRESHOLD) is last


def test_a_lone_agent_that_would_only_change_places_stays() -> None:
    several = [Mobile(AGENTS[0], 3)]
    assert next_move(replica("a", 3), replica("b"), several, THRESHOLD) is None
    speaks = [Mobile(AGENTS[0])]
    one = replace(replica("a", running=1), slots=1)
    assert next_move(one, replace(replica("b"), slots=1), speaks, THRESHOLD) is None


def test_a_turn_that_waits_for_a_slot_goes_where_there_is_one() -> None:
    mobiles = [Mobile(agent, 1, -n) for n, agent in enumerate(AGENTS[:5])]
    full, free = replica("a", running=4, waiting=1), replica("b", running=3)
    assert full.pressure - free.pressure <= THRESHOLD
    assert next_move(full, free, mobiles, THRESHOLD) is mobiles[-1]
    # Not where the slots are no reason, nor where the other has none.
    queued = replica("a", running=2, waiting=1)
    assert next_move(queued, free, mobiles, THRESHOLD) is None
    assert next_move(full, replica("b", running=4), mobiles, THRESHOLD) is None


def test_turns_press_by_their_slots_and_idle_agents_by_their_cells_on_placement_only() -> None:
    device = Device("a")
    idle = replace(device.status(0.0), n_agents=100, idle=4)

    def pressures(**status: int) -> tuple[float, float]:
        told = replace(idle, **status)
        found = candidate(Replica(Node("a", "", "", True), None, device.info(), told))
        assert found is not None
        return load(device.info(), told).pressure, found.pressure

    assert pressures() == (0.0, 0.0)
    assert pressures(cells_used=4096) == (0.0, 0.25)
    assert pressures(cells_used=4096, cells=8192) == (0.0, 0.5)
    assert pressures(running=2, waiting=1) == (0.75, 0.75)
    assert pressures(running=4, waiting=1) == (1.25, 1.0)


# ---- the router's rounds


class Filled(Device):
    """Agents fill 10 % of its cells each, those that speak one of its ten slots, too."""

    def __init__(self, node: str, speaking: set[AgentId]) -> None:
        super().__init__(node)
        self.speaking = speaking
        self.other = 0  # turns of no agent
        self.lacks = 0  # rows that pre-copy leaves
        self.refuses: set[AgentId] = set()

    def info(self) -> Any:
        return replace(super().info(), slots=10)

    def status(self, since: float) -> Any:
        status = super().status(since)
        return replace(
            status,
            cells=10_000,
            cells_used=1000 * len(self.owns),
            running=len(self.speaking & self.owns.keys()) + self.other,
        )

    async def precopy(self, agent: AgentId, *near: Any) -> Any:
        return replace(await super().precopy(agent, *near), lacks=self.lacks)

    async def adopt(self, agent: AgentId, *near: Any) -> int:
        if agent in self.refuses:
            raise StoreUnavailable("memory://x", "no answer")
        return await super().adopt(agent, *near)


class Pair:
    """A router on a and b, whose clock stands still; agents are asked for once, softly, and speak
    on."""

    def __init__(self, config: ClusterConfig, runner: asyncio.Runner) -> None:
        self.now, self.run = 0.0, runner.run
        self.speaking: set[AgentId] = set()
        self.a, self.b = Filled("a", self.speaking), Filled("b", self.speaking)
        self.run(self._start(config))

    async def _start(self, config: ClusterConfig) -> None:
        self.router = PlacementRouter(config)
        self.router._rebalance._clock = lambda: self.now
        self.pool = self.router._pool
        await seat(self.pool, self.a, self.b)

    def own(self, a: int, b: int, *, speak: bool = True, **options: Any) -> None:
        """The first agents are a's, the next ones b's; the last one began last."""
        self.a.owns = dict.fromkeys(AGENTS[:a], 1)
        self.b.owns = dict.fromkeys(AGENTS[a : a + b], 1)
        self.run(self.pool.refresh_all())
        for agent in AGENTS[: a + b]:
            self.run(self.router.place(agent, 40, 20, turn_id=str(agent), **options))
            self.router.ended(agent, str(agent), None)
        assert (len(self.a.owns), len(self.b.owns)) == (a, b)
        if speak:
            self.speak(*AGENTS[: a + b])

    def speak(self, *agents: AgentId) -> None:
        self.speaking.update(agents)
        for n, agent in enumerate(agents):
            self.router._registry.turn_began(agent, "t", 600.0 + n)

    def look(self, seconds: int) -> tuple[int, int]:
        """Once a second; how many agents each has then."""
        for _ in range(seconds):
            self.now += 1.0
            self.run(self.pool.refresh_all())
            self.run(self.router._rebalance.look())
        return len(self.a.owns), len(self.b.owns)

    @property
    def moves(self) -> dict[str, Any]:
        return self.router._mover.moves.to_json()


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(router_module, "ReplicaPool", QuietPool)
    monkeypatch.setattr(rebalance_module, "_EVERY_S", 3600.0)  # the test says when
    config = ClusterConfig(ReplicaConfig(model="fake://", store=tmp_path.as_uri(), codec="f16"))
    with asyncio.Runner() as runner:
        yield Pair(config, runner)


def test_a_full_replica_and_an_empty_one_come_closer_and_stay_so(pair: Pair) -> None:
    pair.own(a=10, b=1)
    assert pair.look(5) == (10, 1)  # it has to last
    assert pair.look(1) == (8, 3)
    assert pair.look(120) == (8, 3)
    assert pair.moves["by_reason"] == {"rebalance": 2}
    shown = Metrics().render(pair.run(pair.router.cluster())).decode()
    assert 'kvferry_migrations_total{reason="rebalance"} 2.0' in shown


def test_a_difference_that_does_not_last_moves_nobody(pair: Pair) -> None:
    pair.own(a=10, b=1)
    for _ in range(10):
        assert pair.look(3) == (10, 1)
        pair.b.other = 6
        pair.look(1)
        pair.b.other = 0
    assert not pair.a.asked


def test_hard_agents_strangers_and_those_just_put_there_stay(pair: Pair) -> None:
    pair.own(a=10, b=1, affinity="hard")
    assert pair.look(70) == (10, 1)
    strangers = [AgentId("default", f"stranger{n}") for n in range(10)]
    pair.a.owns = dict.fromkeys(strangers, 1)
    pair.speak(*strangers)
    assert pair.look(70) == (10, 1)
    assert not pair.a.asked
    pair.own(a=10, b=1)
    for agent in AGENTS[:10]:
        pair.router._registry.settled(agent, pair.now + 60)
    assert pair.look(55) == (10, 1)


def test_an_agent_that_was_moved_is_left_alone_for_a_while(pair: Pair) -> None:
    pair.own(a=10, b=1)
    pair.look(6)
    gone = [agent for agent in AGENTS[:10] if agent not in pair.a.owns]
    pair.a.owns, pair.b.other = {}, 5  # now b is the fuller one
    pair.b.owns = dict.fromkeys(gone, 2)
    for agent in set(AGENTS) - set(gone):
        pair.router._registry.forget(agent)
    pair.look(30)
    assert set(pair.b.owns) == set(gone)
    pair.look(60)
    assert set(pair.b.owns) < set(gone)


def test_those_that_began_last_go_and_those_that_are_idle_stay(pair: Pair) -> None:
    pair.own(a=10, b=0, speak=False)
    assert pair.look(30) == (10, 0)  # its cells are full, of rows that give way
    pair.speak(*AGENTS[:6])
    assert pair.look(30) == (9, 1)
    assert AGENTS[5] in pair.b.owns


def test_idle_agents_stay_however_many_turns_others_have(pair: Pair) -> None:
    pair.own(a=10, b=0, speak=False)
    pair.a.other = 10
    assert pair.look(30) == (10, 0)


def test_a_turn_whose_end_nobody_told_does_not_speak(pair: Pair) -> None:
    pair.own(a=10, b=0)
    pair.b.refuses = set(AGENTS)
    pair.now = 600.0
    assert pair.look(6) == (10, 0)
    assert pair.moves["failed"] == {"rebalance": 3}  # all but three must be over by now


def test_where_moves_do_not_help_the_replica_rests(pair: Pair) -> None:
    pair.own(a=10, b=1)
    pair.a.status = lambda since: replace(Filled.status(pair.a, since), running=10)  # type: ignore
    assert pair.look(60) == (8, 3)
    pair.speaking -= set(AGENTS) - pair.a.owns.keys()
    assert pair.look(5) == (8, 3)
    assert pair.look(10) == (6, 5)


def test_a_move_that_fails_is_not_tried_at_once_and_the_next_agent_goes(pair: Pair) -> None:
    pair.own(a=10, b=1)
    pair.b.refuses = {AGENTS[9]}
    assert pair.look(6) == (8, 3)
    assert pair.moves["failed"] == {"rebalance": 1}
    assert AGENTS[9] in pair.a.owns
    assert {AGENTS[8], AGENTS[7]} < pair.b.owns.keys()


def test_failed_moves_are_bounded_and_the_replica_does_not_rest(pair: Pair) -> None:
    pair.own(a=10, b=1)
    pair.b.fault = lost()
    assert pair.look(6) == (10, 1)
    assert pair.moves["failed"] == {"rebalance": 4}
    pair.b.fault = None
    assert pair.look(6) == (8, 3)


def test_an_agent_that_is_being_placed_is_passed_over(pair: Pair) -> None:
    pair.own(a=10, b=1)
    lock = pair.router._lock(AGENTS[9])
    pair.run(lock.acquire())
    assert pair.look(6) == (8, 3)
    assert AGENTS[9] in pair.a.owns


def test_nobody_is_frozen_before_pre_copy_is_done(pair: Pair) -> None:
    pair.own(a=10, b=1)
    pair.a.lacks = 30
    assert pair.look(6) == (10, 1)
    assert pair.moves["failed"] == {"rebalance": 4}
    assert pair.a.asked == []


def test_nobody_comes_to_a_node_that_warns_or_is_drained(pair: Pair) -> None:
    pair.own(a=10, b=1)
    pair.router._drains._pressure["b"] = "warn"
    assert pair.look(30) == (10, 1)


def test_it_can_be_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "ReplicaPool", QuietPool)
    config = ClusterConfig(
        ReplicaConfig(model="fake://", store=tmp_path.as_uri(), codec="f16"),
        placement=PlacementConfig(rebalance=0.0),
    )
    with asyncio.Runner() as runner:
        names = [t.get_coro().__qualname__ for t in Pair(config, runner).router._tasks]  # type: ignore
    assert "ReplicaPool.run" in names or "QuietPool.run" in names
    assert "Rebalance.run" not in names


# ---- real replicas


@pytest.mark.slow
def test_a_turn_that_waits_for_the_only_slot_runs_on_a_replica_that_has_become_free(
    tmp_path: Path, served: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All agents are on a, for b was under pressure; the text is that of a turn left alone."""
    monkeypatch.setattr(rebalance_module, "_EVERY_S", 0.05)
    monkeypatch.setattr(rebalance_module, "_LASTS_S", 0.3)
    replica = ReplicaConfig(
        model="fake://?step_delay=0.02", store=tmp_path.as_uri(), codec="f16", n_ctx=512, slots=1,
        pool_bytes=1 << 20,
    )  # fmt: skip

    async def say(client: Client, session: str) -> tuple[str, str]:
        body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 100}
        headers = {"x-session-id": session}
        answer = await client._http.post(
            "/v1/chat/completions", json=body | {"temperature": 0}, headers=headers
        )
        assert answer.status_code == 200, answer.text
        return answer.headers["x-kvferry-node"], answer.json()["choices"][0]["message"]["content"]

    async def press(client: Client, level: str) -> None:
        pressure = "/v1/cluster/nodes/b/pressure"
        answer = await client._http.post(pressure, json={"level": level})
        assert answer.status_code == 200, answer.text

    async def go() -> tuple[list[tuple[str, str]], tuple[str, str], int]:
        client = Client(ClusterConfig(replica))
        for node in ("a", "b"):
            await client.ready(node)
        await press(client, "critical")
        turns = [asyncio.create_task(say(client, f"s{n}")) for n in range(3)]
        while (await client.nodes())["a"]["waiting"] < 2:
            await asyncio.sleep(0.02)
        await press(client, "none")
        spoken = await asyncio.gather(*turns)
        report = await client.ask("GET", "/v1/cluster")
        return spoken, await say(client, "alone"), report["moves"]["by_reason"]["rebalance"]

    spoken, alone, moves = served.run(asyncio.wait_for(go(), 60))
    assert {text for _, text in spoken} == {alone[1]}
    assert "b" in {node for node, _ in spoken}
    assert moves >= 1
