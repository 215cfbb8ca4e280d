"""The replica pool without Ray: who may join, what is held back, and replicas that keep dying."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest

from actors.config import ReplicaConfig
from actors.engines.fake_engine import FakeEngine
from actors.rates import Rates
from actors.report import ReplicaInfo, ReplicaStatus, versions
from cluster import pool as pool_module
from cluster.dispatch import Dispatch
from cluster.drain import Drains
from cluster.errors import ClusterError
from cluster.member import Refused, Replica
from cluster.nodes import Node
from cluster.placement import PlacementConfig
from cluster.pool import ReplicaPool
from cluster.views import nodes_json
from tests.fake_cluster import Handle, lost

KEY = FakeEngine().key
VERSIONS = {"python": "3.11", "ray": "2.60.0", "kvferry": "0.1.0"}


def info(node: str, **changes: Any) -> ReplicaInfo:
    base = ReplicaInfo(node, "life", 1, 1, "fake", "none", 512, 4, "f16", KEY, 0)
    return replace(base, versions=VERSIONS, **changes)


class Device:
    """A replica; `dies`: it is ready, and gone at its first report. `fault`: what its reports
    raise; `silent`: they do not come until it is set."""

    def __init__(self, node: str, dies: bool = False, **changes: Any) -> None:
        self._info, self._dies = info(node, **changes), dies
        self.fault: Exception | None = None
        self.silent: asyncio.Event | None = None

    def info(self) -> ReplicaInfo:
        return self._info

    async def status(self, since: float) -> ReplicaStatus:
        if self._dies:
            raise lost()
        if self.fault is not None:
            raise self.fault
        if self.silent is not None:
            await self.silent.wait()
        return ReplicaStatus(0.0, 0, 0, 0, 0.0, Rates(), 0, 0, 0, ())

    def flush(self) -> None:
        """Nothing is kept."""


class Pool(ReplicaPool):
    """On the nodes a and b, with a clock of its own."""

    wait: Callable[[Coroutine[Any, Any, None]], None]

    def prepare(self) -> None:
        self.now, self.killed, self.started = 1000.0, 0, 0
        self.clock = lambda: self.now
        self.devices = {name: Device(name) for name in ("a", "b")}

    def _start(self, node: Node) -> Any:
        self.started += 1
        return Handle(self.devices[node.id])

    def _kill(self, replica: Replica) -> None:
        self.killed += 1

    async def settle(self) -> None:
        """Start what is due, and let every watcher come as far as it can."""
        await self._tick()
        await asyncio.sleep(0.05)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    def entry(name: str) -> dict[str, Any]:
        return {
            "NodeID": f"ray-{name}", "Alive": True, "NodeManagerHostname": name,
            "NodeManagerAddress": "127.0.0.1", "Resources": {pool_module.DEVICE: 1.0},
        }  # fmt: skip

    monkeypatch.setattr("cluster.pool.ray.nodes", lambda: [entry("a"), entry("b")])
    monkeypatch.setattr(pool_module, "_TICK_S", 0.01)
    made = Pool(ReplicaConfig(), lambda r: None, lambda n: None, versions=VERSIONS)
    made.prepare()
    with asyncio.Runner() as runner:
        made.wait = runner.run
        yield made
        made.replicas.clear()  # their watchers end
        runner.run(asyncio.sleep(0.1))


def ready(pool: ReplicaPool) -> list[str]:
    return sorted(replica.node.id for replica in pool.healthy())


# ---- joining


def test_replicas_that_fit_join(pool: Pool) -> None:
    pool.wait(pool.settle())
    assert ready(pool) == ["a", "b"]
    assert pool.errors() == {}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"key": replace(KEY, weights="0" * 64)}, "weights: "),
        ({"key": replace(KEY, tokenizer="0" * 64)}, "tokenizer: "),
        ({"codec": "q4"}, "codec: q4 != f16"),
        ({"versions": VERSIONS | {"ray": "2.9"}}, "ray 2.9 there, 2.60.0 here"),
        ({"versions": VERSIONS | {"kvferry": "0.0.9"}}, "kvferry 0.0.9 there, 0.1.0 here"),
        ({"versions": {}}, "python unknown there, 3.11 here"),
    ],
)
def test_one_that_does_not_fit_is_refused_with_the_reason(
    pool: Pool, changes: dict[str, Any], says: str
) -> None:
    async def go() -> None:
        pool.devices["b"] = Device("b")
        pool.devices["b"]._info = replace(info("b"), **changes)
        await pool.settle()

    pool.wait(go())
    assert ready(pool) == ["a"]
    assert pool.errors()["b"].startswith("refused: ")
    assert says in pool.errors()["b"]
    assert pool.killed == 1


def test_a_node_that_is_refused_is_seldom_tried_again_and_never_crash_looping(pool: Pool) -> None:
    async def go() -> None:
        pool.devices["b"]._info = info("b", codec="q4")
        for _ in range(8):
            await pool.settle()
            assert pool.refused() == {"b"}
            assert pool.errors()["b"] == "refused: codec: q4 != f16"
            pool.now += 70.0
        assert pool.started == 2  # a's, and b's once
        pool.now += 50.0
        await pool.settle()
        assert pool.started == 3
        pool.devices["b"] = Device("b")
        pool.rejoin("b")  # an operator knows that it fits now
        await pool.settle()

    pool.wait(go())
    assert ready(pool) == ["a", "b"]
    assert (pool.refused(), pool.errors()) == (set(), {})


def test_a_refused_node_that_joins_anew_is_tried_at_once(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        pool.devices["b"]._info = info("b", codec="q4")
        await pool.settle()
        shown = nodes_json(pool, Drains(pool, Dispatch(PlacementConfig()), *nothing))[1]
        assert (shown["id"], shown["replica"]) == ("b", "refused")
        assert shown["error"] == "refused: codec: q4 != f16"
        pool.devices["b"] = Device("b")
        a, b = pool_module.ray.nodes()
        monkeypatch.setattr("cluster.pool.ray.nodes", lambda: [a, b | {"NodeID": "ray-b2"}])
        await pool.settle()

    nothing: Any = (None, None)
    pool.wait(go())
    assert ready(pool) == ["a", "b"]


OTHER = replace(KEY, weights="0" * 64)


def test_who_did_not_fit_to_a_replica_that_is_gone_is_tried_at_once(pool: Pool) -> None:
    """A rolling upgrade: b has the new model first, then a."""

    async def go() -> None:
        pool.devices["a"]._info = info("a", incarnation="a1")
        pool.devices["b"]._info = info("b", incarnation="b1", key=OTHER)
        await pool.settle()
        assert (ready(pool), pool.refused()) == (["a"], {"b"})
        await pool.release("a")
        await pool.settle()
        assert (ready(pool), pool.refused()) == (["b"], set())
        pool.devices["a"]._info = info("a", incarnation="a2", key=OTHER)
        pool.rejoin("a")
        await pool.settle()

    pool.wait(go())
    assert ready(pool) == ["a", "b"]
    assert pool.errors() == {}


def test_one_with_other_versions_waits_whoever_leaves(pool: Pool) -> None:
    async def go() -> None:
        wrong = replace(info("b", key=OTHER), versions=VERSIONS | {"ray": "2.9"})
        pool.devices["b"]._info = wrong
        await pool.settle()
        await pool.release("a")
        await pool.settle()

    pool.wait(go())
    assert pool.refused() == {"b"}
    assert pool.started == 2


def test_the_model_is_that_of_the_replicas_that_are_there(pool: Pool) -> None:
    other = info("b", key=replace(KEY, weights="0" * 64))
    pool.check(other)  # nobody is there yet
    pool.wait(pool.settle())
    with pytest.raises(Refused, match="that of a"):
        pool.check(other)
    pool.replicas.clear()
    pool.check(other)
    assert issubclass(Refused, ClusterError)


def test_versions_are_those_of_this_process() -> None:
    found = versions()
    assert found.keys() == {"python", "ray", "kvferry"}
    assert "none" not in found.values()


# ---- dying


def deaths(pool: Pool, n: int, every: float) -> None:
    async def go() -> None:
        for _ in range(n):
            await pool.settle()
            assert "a" not in pool.replicas
            pool.now += every

    pool.wait(go())


def test_replicas_that_keep_dying_are_crash_looping(pool: Pool) -> None:
    pool.devices["a"] = Device("a", dies=True)
    deaths(pool, 4, 31.0)
    assert "crash looping" not in pool.errors()["a"]
    deaths(pool, 1, 0.0)
    assert pool.errors()["a"].startswith("crash looping, 5 times in 10 min: ActorDiedError")
    started = pool.started
    pool.now += 29.0
    pool.wait(pool.settle())  # b only: a waits for the longest delay
    assert "a" not in pool.replicas
    pool.devices["a"] = Device("a")
    pool.now += 2.0
    pool.wait(pool.settle())
    assert pool.started > started
    assert "a" in ready(pool)
    assert "a" not in pool.errors()


def test_deaths_that_are_far_apart_are_no_loop(pool: Pool) -> None:
    pool.devices["a"] = Device("a", dies=True)
    deaths(pool, 8, 200.0)
    assert "crash looping" not in pool.errors()["a"]


def test_a_death_after_a_long_life_does_not_count(pool: Pool) -> None:
    async def go() -> None:
        for _ in range(8):
            await pool.settle()
            assert "a" in ready(pool)
            pool.now += 20.0
            pool._remove(pool.replicas["a"], "killed")
            pool.now += 1.0

    pool.wait(go())
    assert pool.errors()["a"] == "killed"


def test_a_fault_that_nobody_foresaw_replaces_the_replica(
    pool: Pool, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        await pool.settle()
        pool.devices["a"].fault = KeyError("a report that cannot be made")
        await asyncio.sleep(0.05)
        assert ready(pool) == ["b"]
        assert "KeyError" in pool.errors()["a"]
        pool.devices["a"] = Device("a")
        pool.now += 31.0
        await pool.settle()

    pool.wait(go())
    assert ready(pool) == ["a", "b"]
    assert "a report that cannot be made" in caplog.text


def test_a_report_of_a_replica_that_was_removed_counts_no_more(pool: Pool) -> None:
    reported: list[Replica] = []

    async def go() -> None:
        await pool.settle()
        device, replica = pool.devices["a"], pool.replicas["a"]
        device.silent = asyncio.Event()
        late = asyncio.create_task(pool.refresh(replica))
        await asyncio.sleep(0.05)
        pool._remove(replica, "its node left")
        pool.on_status = reported.append
        device.silent.set()
        await late
        assert not replica.healthy
        assert replica not in reported
        assert replica.watcher is not None
        await asyncio.wait_for(replica.watcher, 1.0)

    pool.wait(go())


# ---- held


def test_a_node_that_was_released_gets_no_replica_until_it_rejoins(pool: Pool) -> None:
    async def go() -> None:
        await pool.settle()
        await pool.release("a")
        await pool.settle()
        assert ready(pool) == ["b"]
        assert (pool.killed, pool.restarts) == (1, 0)
        pool.rejoin("a")
        await pool.settle()
        assert ready(pool) == ["a", "b"]

    pool.wait(go())
