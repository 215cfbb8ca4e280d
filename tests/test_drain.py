"""Draining, pressure and rolling restarts, without Ray: the router and its pool on replicas that
only say what they own (`stub`), or on real ones with the fake engine (`served`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.config import ReplicaConfig
from actors.replica import ModelReplica
from api.app import assemble
from api.context import Context
from api.metrics import Metrics
from cluster import notes
from cluster import pool as pool_module
from cluster import router as router_module
from cluster.config import ClusterConfig
from cluster.dispatch import Ask
from cluster.drain import PARALLEL
from cluster.errors import LastNode, NoReplica, UnknownNode
from cluster.member import Replica
from cluster.nodes import Node
from cluster.pool import ReplicaPool
from cluster.router import PlacementRouter
from storage.card import AgentId
from storage.errors import StoreUnavailable
from tests.fake_cluster import Handle, lost
from tests.test_router import Device, QuietPool

AGENTS = [AgentId("default", f"s{n}") for n in range(9)]


class Stub(Device):
    """Counts the migrations that it takes part in at a time."""

    def __init__(self, node: str) -> None:
        super().__init__(node)
        self.refuses: set[AgentId] = set()
        self.running, self.flushed, self.adopting, self.most = 0, 0, 0, 0

    def status(self, since: float) -> Any:
        status = super().status(since)
        return status.__class__(**vars(status) | {"running": self.running})

    async def adopt(self, agent: AgentId, *near: Any) -> int:
        self.adopting += 1
        self.most = max(self.most, self.adopting)
        await asyncio.sleep(0.001)
        self.adopting -= 1
        if agent in self.refuses:
            raise StoreUnavailable("memory://x", "no answer")
        return await super().adopt(agent, *near)

    def flush(self) -> None:
        self.flushed += 1


class StubPool(QuietPool):
    killed: list[str]

    def _kill(self, replica: Replica) -> None:
        vars(self).setdefault("killed", []).append(replica.node.id)


async def seat(pool: QuietPool, *devices: Any) -> None:
    """They are the pool's replicas, each on a node of its name."""
    for device in devices:
        node = Node(device.node, f"ray-{device.node}", "127.0.0.1", True)
        pool.nodes[node.id] = node
        pool.replicas[node.id] = Replica(node, Handle(device), device.info(), healthy=True)
    await pool.refresh_all()


class Stubs:
    """A router on a and b; a owns nine agents."""

    def __init__(self, config: ClusterConfig, runner: asyncio.Runner) -> None:
        self.a, self.b = Stub("a"), Stub("b")
        self.a.owns = dict.fromkeys(AGENTS, 1)
        self.run = runner.run
        self.run(self._start(config))

    async def _start(self, config: ClusterConfig) -> None:
        self.router = PlacementRouter(config)
        self.pool = self.router._pool
        await seat(self.pool, self.a, self.b)

    def drained(self, node: str = "a", *, begin: bool = True) -> dict[str, Any]:
        """The state in which the drain ends."""

        async def go() -> dict[str, Any]:
            state = self.router.drain(node) if begin else self.router.drain_progress(node)
            while state["state"] == "draining":
                await asyncio.sleep(0.005)
                state = self.router.drain_progress(node)
            return state

        state: dict[str, Any] = self.run(asyncio.wait_for(go(), 20))
        return state

    def place(self, agent: AgentId, **options: Any) -> str:
        return str(self.run(self.router.place(agent, 40, 20, **options)).node)

    def report(self, node: str) -> dict[str, Any]:
        report = self.run(self.router.cluster())
        return next(n for n in report["nodes"] if n["id"] == node)


@pytest.fixture
def config(tmp_path: Path) -> ClusterConfig:
    store = tmp_path.as_uri()
    replica = ReplicaConfig(
        model="fake://", store=store, codec="f16", n_ctx=512, slots=4, pool_bytes=1 << 20
    )
    return ClusterConfig(replica)


@pytest.fixture
def stub(config: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stubs]:
    monkeypatch.setattr(router_module, "ReplicaPool", StubPool)
    with asyncio.Runner() as runner:
        yield Stubs(config, runner)


# ---- drain


def test_a_drain_moves_every_agent_a_few_at_a_time_and_closes_the_replica(stub: Stubs) -> None:
    state = stub.drained()
    assert (state["state"], state["moved"], state["left"], state["failed"]) == ("drained", 9, 0, [])
    assert set(stub.b.owns) == set(AGENTS)
    assert stub.a.owns == {}
    assert stub.a.asked.count("freeze") == stub.a.asked.count("release") == 9
    assert 1 < stub.b.most <= PARALLEL
    assert (stub.pool.killed, stub.a.flushed, stub.pool.restarts) == (["a"], 1, 0)
    assert stub.report("a")["replica"] == "drained"
    shown = Metrics().render(stub.run(stub.router.cluster())).decode()
    assert 'kvferry_migrations_total{reason="drain"} 9.0' in shown
    assert stub.place(AGENTS[0]) == "b"


def test_a_node_that_is_drained_gets_no_turns_however_busy_the_others_are(stub: Stubs) -> None:
    stub.a.running, stub.b.queue_s = 1, 100.0  # a one-off turn keeps a from being closed
    stub.run(stub.pool.refresh_all())
    stub.run(asyncio.sleep(0))

    async def begin() -> None:
        stub.router.drain("a")

    stub.run(begin())
    assert stub.place(AgentId("default", "new")) == "b"
    assert stub.place(AGENTS[3]) == "b"  # moved for its turn, or by the drain
    assert stub.place(AGENTS[4], affinity="hard") == "b"
    assert stub.place(AGENTS[5], persist=False) == "b"
    assert "release" in stub.a.asked
    with pytest.raises(NoReplica, match="draining"):
        stub.run(stub.router.migrate(AGENTS[3], "a"))
    stub.a.running = 0
    assert stub.drained(begin=False)["state"] == "drained"


def test_a_drain_waits_for_the_turns_that_run(stub: Stubs) -> None:
    async def go() -> dict[str, Any]:
        stub.a.running = 1
        stub.router.drain("a")
        await asyncio.sleep(0.4)
        return stub.router.drain_progress("a")

    state = stub.run(go())
    assert (state["state"], state["left"], state["running"]) == ("draining", 0, 1)
    stub.a.running = 0
    assert stub.drained(begin=False)["state"] == "drained"


def test_an_agent_that_cannot_leave_is_listed_and_keeps_the_replica(stub: Stubs) -> None:
    stub.b.refuses = {AGENTS[2]}
    state = stub.drained()
    assert (state["state"], state["moved"]) == ("stuck", 8)
    (failed,) = state["failed"]
    assert failed["agent"] == "s2"
    assert "b could not take agent" in failed["error"]
    assert "a" in stub.pool.replicas
    assert stub.report("a")["drain"]["failed"] == state["failed"]
    assert AGENTS[2] in stub.a.owns
    stub.b.refuses = set()
    state = stub.drained()  # asked again, those that are left are tried again
    assert (state["state"], state["moved"], stub.pool.killed) == ("drained", 1, ["a"])


def test_unknown_nodes_and_the_last_one_are_refused(stub: Stubs) -> None:
    async def go(node: str) -> None:
        stub.router.drain(node)

    with pytest.raises(UnknownNode, match=r"'c'.*there are: a, b$"):
        stub.run(go("c"))
    stub.drained()
    with pytest.raises(LastNode, match="agents of b"):
        stub.run(go("b"))
    assert stub.place(AGENTS[0]) == "b"
    stub.pool.replicas["b"].healthy = False


def test_a_drained_node_is_held_until_it_rejoins(stub: Stubs) -> None:
    stub.drained()
    assert stub.pool.held == {"a"}

    async def back() -> dict[str, Any]:
        return stub.router.undrain("a")

    assert stub.run(back()) == {"node": "a", "state": "open"}
    assert stub.pool.held == set()


def test_a_drain_that_is_taken_back_stops(stub: Stubs) -> None:
    async def go() -> int:
        stub.a.running = 1
        stub.router.drain("a")
        await asyncio.sleep(0)
        stub.router.undrain("a")
        await asyncio.sleep(0.3)
        return len(stub.a.owns)

    assert stub.run(go()) == 9
    assert "a" in stub.pool.replicas
    assert stub.place(AGENTS[0]) == "a"


# ---- a router that dies meanwhile


@pytest.fixture
def note(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the head holds."""
    held: dict[str, Any] = {}

    def write(note: dict[str, Any]) -> None:
        held.clear()
        held.update(json.loads(json.dumps(note)))

    monkeypatch.setattr(notes, "read", lambda: dict(held))
    monkeypatch.setattr(notes, "write", write)
    return held


def next_router(stub: Stubs, config: ClusterConfig, *, found: bool = True) -> None:
    """It knows what the note and the replicas say. `found`: those are there at once."""

    async def start() -> None:
        before = stub.pool
        stub.router = PlacementRouter(config)
        stub.pool = stub.router._pool
        for name, node in before.nodes.items():
            stub.pool.nodes[name] = node
            if found and name in before.replicas:
                device = {"a": stub.a, "b": stub.b}[name]
                handle = Handle(device)
                stub.pool.replicas[name] = Replica(node, handle, device.info(), healthy=True)
        await stub.pool.refresh_all()

    stub.run(start())


def test_a_drained_node_stays_drained(
    note: dict[str, Any], stub: Stubs, config: ClusterConfig
) -> None:
    stub.drained()
    next_router(stub, config)
    assert stub.pool.held == {"a"}
    assert stub.report("a")["replica"] == "drained"
    with pytest.raises(NoReplica, match="drained"):
        stub.router._drains.check_open("a")

    async def back() -> dict[str, Any]:
        return stub.router.undrain("a")

    stub.run(back())
    next_router(stub, config)
    assert stub.pool.held == set()
    assert stub.router._drains.progress("a")["state"] == "open"


def test_a_drain_goes_on_with_the_next_router(
    note: dict[str, Any], stub: Stubs, config: ClusterConfig
) -> None:
    async def begin() -> None:
        stub.a.running = 1  # it cannot end yet
        stub.router.drain("a")
        await asyncio.sleep(0)
        drain = stub.router._drains._drains["a"]
        assert drain.task is not None
        drain.task.cancel()  # with its router

    stub.run(begin())
    next_router(stub, config)
    assert stub.place(AGENTS[0]) == "b"
    stub.a.running = 0
    assert stub.drained(begin=False)["state"] == "drained"
    assert stub.pool.killed == ["a"]
    assert stub.a.owns == {}


def test_pressure_is_known_to_the_next_router(
    note: dict[str, Any], stub: Stubs, config: ClusterConfig
) -> None:
    pressed(stub, "critical")
    stub.drained(begin=False)
    next_router(stub, config)
    assert stub.report("a")["pressure"] == "critical"
    assert stub.place(AGENTS[0]) == "b"
    assert pressed(stub, "none")["state"] == "open"


def test_agents_of_a_node_that_dies_while_it_is_drained_are_left_to_the_store(stub: Stubs) -> None:
    async def go() -> None:
        stub.a.running = 1
        stub.router.drain("a")
        await asyncio.sleep(0)
        stub.pool._remove(stub.pool.replicas["a"], "killed")

    stub.run(go())
    assert stub.drained(begin=False)["state"] == "drained"
    assert stub.pool.held == {"a"}
    assert stub.place(AGENTS[0]) == "b"


# ---- pressure


def pressed(stub: Stubs, level: Any, node: str = "a") -> dict[str, Any]:
    async def go() -> dict[str, Any]:
        return stub.router.pressed(node, level)

    told: dict[str, Any] = stub.run(go())
    return told


def test_a_node_that_warns_costs_more_until_it_does_not(stub: Stubs) -> None:
    def extra() -> float:
        stub.run(stub.pool.refresh_all())
        entries = stub.router.explain(Ask(AgentId("default", "new"), 40, 20))["estimates"]
        return float(next(e["extra_s"] for e in entries if e["node"] == "b"))

    before = extra()
    assert pressed(stub, "warn", "b")["pressure"] == "warn"
    assert extra() > before
    assert stub.report("b")["pressure"] == "warn"
    pressed(stub, "none", "b")
    assert extra() == before


def test_a_soft_agent_leaves_a_node_that_warns_at_its_next_turn(stub: Stubs) -> None:
    pressed(stub, "warn")
    stub.run(stub.pool.refresh_all())
    assert stub.place(AGENTS[0], affinity="hard") == "a"
    assert stub.a.asked == []
    stub.router.ended(AGENTS[0], "", 80)
    assert stub.place(AGENTS[0]) == "b"
    assert stub.place(AGENTS[1]) == "b"
    assert set(stub.b.owns) == set(AGENTS[:2])
    assert len(stub.a.owns) == 7  # the others stay until their turns


def test_critical_pressure_empties_a_node_and_takes_it_back(stub: Stubs) -> None:
    assert pressed(stub, "critical")["state"] == "draining"
    state = stub.drained(begin=False)
    assert (state["state"], state["moved"], state["release"]) == ("drained", 9, False)
    assert "a" in stub.pool.replicas
    assert stub.place(AgentId("default", "new")) == "b"
    assert pressed(stub, "none")["state"] == "open"
    stub.b.queue_s = 100.0
    stub.run(stub.pool.refresh_all())
    assert stub.place(AgentId("default", "another")) == "a"


def test_critical_pressure_on_the_last_node_waits_for_another_to_open(
    note: dict[str, Any], stub: Stubs, config: ClusterConfig
) -> None:
    pressed(stub, "critical")
    stub.drained(begin=False)
    told = pressed(stub, "critical", "b")
    assert (told["state"], told["pressure"]) == ("open", "critical")
    assert told["error"] == "no other node could take the agents of b"
    assert stub.report("b")["pressure"] == "critical"
    assert stub.place(AGENTS[0]) == "b"  # it serves on
    next_router(stub, config)
    stub.run(stub.pool.refresh_all())
    assert stub.report("b")["drain"] is None
    assert pressed(stub, "none")["state"] == "open"
    stub.run(stub.pool.refresh_all())
    state = stub.drained("b", begin=False)
    assert (state["state"], state["release"], state["moved"]) == ("drained", False, 9)
    assert stub.place(AGENTS[0]) == "a"


def test_two_nodes_under_critical_pressure_do_not_relieve_each_other(stub: Stubs) -> None:
    stub.pool.replicas["b"].healthy = False
    assert pressed(stub, "critical")["state"] == "open"  # nobody is there
    told = pressed(stub, "critical", "b")
    assert (told["state"], told["error"]) == ("open", "no other node could take the agents of b")
    stub.pool.replicas["b"].healthy = True
    stub.run(stub.pool.refresh_all())
    assert stub.report("a")["drain"] is stub.report("b")["drain"] is None
    with pytest.raises(LastNode):
        stub.router.drain("b")
    pressed(stub, "none", "b")
    stub.run(stub.pool.refresh_all())
    assert stub.drained(begin=False)["state"] == "drained"
    assert len(stub.b.owns) == 9


def test_a_level_that_falls_meanwhile_empties_nobody(stub: Stubs) -> None:
    pressed(stub, "critical")
    stub.drained(begin=False)
    pressed(stub, "critical", "b")
    assert "error" not in pressed(stub, "warn", "b")
    pressed(stub, "none")
    stub.run(stub.pool.refresh_all())
    assert stub.report("b")["drain"] is None


def test_pressure_does_not_end_an_operators_drain(stub: Stubs) -> None:
    stub.drained()
    assert pressed(stub, "none")["state"] == "drained"


# ---- real replicas, over HTTP


class InProcess(ReplicaPool):
    """Follows the nodes that the test says; its replicas are no actors."""

    def _start(self, node: Node) -> Any:
        handle = Handle(ModelReplica(self.config, node.id))
        STARTED.append((node.id, handle))
        return handle

    def _kill(self, replica: Replica) -> None:
        target, replica.actor._target = replica.actor._target, Dead()
        target.close()


class Dead:
    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            raise lost()

        return call


STARTED: list[tuple[str, Handle]] = []


def entry(name: str) -> dict[str, Any]:
    return {
        "NodeID": f"ray-{name}", "Alive": True, "NodeManagerHostname": name, "Labels": {},
        "NodeManagerAddress": "127.0.0.1", "Resources": {pool_module.DEVICE: 1.0},
    }  # fmt: skip


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.Runner]:
    monkeypatch.setattr(router_module, "ReplicaPool", InProcess)
    monkeypatch.setattr("cluster.pool.ray.nodes", lambda: [entry("a"), entry("b")])
    monkeypatch.setattr(pool_module, "_TICK_S", 0.05)
    STARTED.clear()
    with asyncio.Runner() as runner:
        yield runner
    for _, handle in STARTED:
        if not isinstance(handle._target, Dead):
            handle._target.close()


class Client:
    def __init__(self, config: ClusterConfig) -> None:
        app = assemble(Context(config, Handle(PlacementRouter(config))))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://kvferry", timeout=30)

    async def ask(self, method: str, path: str, status: int = 200) -> Any:
        answer = await self._http.request(method, path)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def chat(self, session: str, messages: list[dict[str, str]]) -> str:
        body = {"messages": messages, "temperature": 0, "max_tokens": 24}
        headers = {"x-session-id": session}
        answer = await self._http.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    async def nodes(self) -> dict[str, Any]:
        report = await self.ask("GET", "/v1/cluster")
        return {node["id"]: node for node in report["nodes"]}

    async def ready(self, node: str) -> None:
        while (await self.nodes()).get(node, {}).get("replica") != "ready":
            await asyncio.sleep(0.05)

    async def drained(self, node: str) -> dict[str, Any]:
        path = f"/v1/cluster/nodes/{node}/drain"
        state: dict[str, Any] = await self.ask("POST", path, 202)
        while state["state"] == "draining":
            await asyncio.sleep(0.02)
            state = await self.ask("GET", path)
        return state


async def conversation(client: Client, session: str, stop: asyncio.Event) -> list[str]:
    """Turns of one agent, each on top of the last, until told to stop."""
    messages: list[dict[str, str]] = []
    replies = []
    while not stop.is_set():
        if len(messages) >= 12:  # its context is bounded
            messages.clear()
        messages.append({"role": "user", "content": f"Go on, {session}."})
        replies.append(await client.chat(session, messages))
        messages.append({"role": "assistant", "content": replies[-1]})
    return replies


@pytest.mark.slow
def test_a_rolling_restart_fails_no_request_and_changes_no_text(
    config: ClusterConfig, served: asyncio.Runner
) -> None:
    async def go() -> tuple[list[list[str]], int]:
        client, stop = Client(config), asyncio.Event()
        for node in ("a", "b"):
            await client.ready(node)
        lives = {n: node["pid"] for n, node in (await client.nodes()).items()}
        assert set(lives) == {"a", "b"}
        talks = [asyncio.create_task(conversation(client, f"s{n}", stop)) for n in range(5)]
        await asyncio.sleep(0.5)
        for node in ("a", "b"):
            state = await client.drained(node)
            assert state["state"] == "drained", state
            await client.ask("DELETE", f"/v1/cluster/nodes/{node}/drain")
            await client.ready(node)
        stop.set()
        replies = await asyncio.gather(*talks)
        return replies, len(STARTED)

    replies, lives = served.run(asyncio.wait_for(go(), 90))
    assert lives == 4
    assert min(len(each) for each in replies) >= 2
    for each in replies:  # the same prompt is answered alike, wherever and after whatever
        for n, reply in enumerate(each):
            assert reply == each[n % 6]


def test_the_hooks_over_http(config: ClusterConfig, served: asyncio.Runner) -> None:
    async def go() -> None:
        client = Client(config)
        for node in ("a", "b"):
            await client.ready(node)
        error = await client.ask("POST", "/v1/cluster/nodes/nowhere/drain", 404)
        assert error["error"]["code"] == "node_not_found"
        assert (await client.drained("a"))["state"] == "drained"
        assert (await client.nodes())["a"]["replica"] == "drained"
        error = await client.ask("POST", "/v1/cluster/nodes/b/drain", 409)
        assert error["error"]["code"] == "last_node"
        await asyncio.sleep(0.2)
        assert len(STARTED) == 2
        bad = await client._http.post("/v1/cluster/nodes/b/pressure", json={"level": "low"})
        assert bad.status_code == 400
        good = await client._http.post("/v1/cluster/nodes/b/pressure", json={"level": "warn"})
        assert good.json() == {"node": "b", "state": "open", "pressure": "warn"}

    served.run(asyncio.wait_for(go(), 60))
