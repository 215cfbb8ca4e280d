"""The router without Ray: who moves and when, on replicas that only say how busy they are."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.branches import Before
from actors.config import ReplicaConfig
from actors.engines.fake_engine import FakeEngine
from actors.exporter import Held
from actors.handoff import Copied, Frozen
from actors.preload import Fetched
from actors.rates import Rates
from actors.report import AgentReport, LocalStatus, ReplicaInfo, ReplicaStatus
from cluster import recall
from cluster import router as router_module
from cluster.config import ClusterConfig
from cluster.decisions import DecisionLog, Outcome
from cluster.disks import RemoteDisk
from cluster.dispatch import Ask, Dispatch
from cluster.errors import MigrationFailed, NoReplica, UnknownAgent, UnknownNode
from cluster.member import Replica
from cluster.migration import Migration
from cluster.nodes import Node
from cluster.placement import Candidate, PlacementConfig
from cluster.pool import ReplicaPool
from cluster.router import PlacementRouter
from storage.card import AgentId, Owner
from storage.claims import new_card
from storage.errors import StoreUnavailable
from storage.links import LinkRate, peer_link
from storage.spec import CompatibilityKey
from storage.store import CacheStore, LoadedCard
from tests.fake_cluster import Handle, lost

AGENT = AgentId("default", "s")
CARD = new_card(AGENT, FakeEngine().key, "f16", Owner("a", "life"))
STORED = recall.stored_agents
TURN_S = ClusterConfig().http.request_timeout_s


class Device:
    """A replica that runs nothing. It notes what migrations ask of it, and reports the agents it
    owns with 1,000 rows each."""

    def __init__(self, node: str) -> None:
        self.node = node
        self.queue_s = 0.0
        self.owns: dict[AgentId, int] = {}  # epochs
        self.asked: list[str] = []
        self.fault: Exception | None = None  # of the next adopt
        self.silent = ""  # a call that gets no answer
        self.local: LocalStatus | None = None
        self.links: dict[str, LinkRate] = {}
        self.told: list[tuple[Any, ...]] = []  # what precopy and adopt were given besides the agent

    def info(self) -> ReplicaInfo:
        key = FakeEngine().key
        return ReplicaInfo(
            self.node, f"life-{self.node}", 1, 1, "fake", "none", 4096, 4, "f16", key, 0, 100
        )

    def status(self, since: float) -> ReplicaStatus:
        reports = tuple(
            AgentReport(agent, epoch, 1, 1, 1000, 1000, True, 0, 0, 0.0, 1000)
            for agent, epoch in self.owns.items()
        )
        rates = Rates(200.0, 0.02, 10_000.0, 2.0)
        return ReplicaStatus(
            0.0, 0, 0, 0, self.queue_s, rates, 0, 0, len(reports), reports, self.local,
            links=self.links,
        )  # fmt: skip

    async def _hears(self, what: str) -> None:
        if what == self.silent:
            await asyncio.Event().wait()

    async def precopy(self, agent: AgentId, *near: Any) -> Copied:
        self.told.append(near)
        await self._hears("precopy")
        return Copied(0, CARD if near[0] else None)

    async def prefetch(self, agent: AgentId, was: Before) -> Fetched:
        await self._hears("prefetch")
        return Fetched(Held(0, 1000), 1000, 0)

    async def freeze(self, agent: AgentId, held: Held | None, near: bool) -> Frozen:
        self.asked.append("freeze")
        await self._hears("freeze")
        return Frozen(CARD if near else None)

    async def adopt(self, agent: AgentId, *near: Any) -> int:
        self.told.append(near)
        self.asked.append("adopt")
        await self._hears("adopt")
        if self.fault is not None:
            raise self.fault
        self.owns[agent] = 2
        return 2

    def thaw(self, agent: AgentId) -> None:
        self.asked.append("thaw")

    async def release(self, agent: AgentId) -> None:
        self.asked.append("release")
        await self._hears("release")
        del self.owns[agent]


class QuietPool(ReplicaPool):
    """Follows no Ray cluster: a test says which replicas there are."""

    async def run(self) -> None:
        pass


class Cluster:
    """A router on the devices a and b. Agent s is idle on a, both devices are, and the clock
    stands still."""

    def __init__(self, config: ClusterConfig, runner: asyncio.Runner) -> None:
        self.now = 1000.0
        self.a, self.b = Device("a"), Device("b")
        self.a.owns[AGENT] = 1
        self._runner = runner
        runner.run(self._start(config))

    async def _start(self, config: ClusterConfig) -> None:
        self.router = PlacementRouter(config)
        self.replicas = self.router._pool.replicas
        for device in (self.a, self.b):
            node = Node(device.node, f"ray-{device.node}", "127.0.0.1", True)
            self.replicas[node.id] = Replica(node, Handle(device), device.info(), healthy=True)
        await self.router._pool.refresh_all()

    def busy(self, a: float = 0.0, b: float = 0.0) -> None:
        """Both report how many seconds a new turn would wait."""
        self.a.queue_s, self.b.queue_s = a, b
        self._runner.run(self.router._pool.refresh_all())

    def place(self, *, persist: bool = True, avoid: frozenset[str] = frozenset()) -> str:
        """Where a turn of a short message runs that may answer with 20 tokens."""
        work = self.router.place(AGENT, 40, 20, persist=persist, avoid=avoid)
        return self._runner.run(work).node

    def migrate(self, target: str | None, agent: AgentId = AGENT) -> Migration:
        return self._runner.run(self.router.migrate(agent, target))

    @property
    def asked(self) -> tuple[list[str], list[str]]:
        return self.a.asked, self.b.asked


MOVED = (["freeze", "release"], ["adopt"])
UNTOUCHED: tuple[list[str], list[str]] = ([], [])


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    config = ClusterConfig(ReplicaConfig(model="fake://", store=tmp_path.as_uri()))
    monkeypatch.setattr(router_module, "ReplicaPool", QuietPool)
    with asyncio.Runner() as runner:
        made = Cluster(config, runner)
        clock = SimpleNamespace(monotonic=lambda: made.now)
        monkeypatch.setattr(router_module, "time", clock)
        yield made


# ---- from disk to disk

WRITES, FULL = LocalStatus(0, 0, 0, 0, True), LocalStatus(0, 0, 0, 0, False)
FAST, SLOW = LinkRate(0.0, 1e9), LinkRate(0.0, 1e6)


@pytest.mark.parametrize(
    ("a", "b", "links", "near"),
    [
        (WRITES, WRITES, {}, True),
        (WRITES, WRITES, {"store": SLOW, peer_link("a"): FAST}, True),
        (WRITES, WRITES, {"store": FAST, peer_link("a"): SLOW}, False),
        (WRITES, FULL, {}, False),
        (FULL, WRITES, {}, False),
        (None, WRITES, {}, False),
        (WRITES, None, {}, False),
    ],
)
def test_an_agent_comes_from_its_owners_disk_where_that_pays(
    cluster: Cluster,
    a: LocalStatus | None,
    b: LocalStatus | None,
    links: dict[str, LinkRate],
    near: bool,
) -> None:
    cluster.a.local, cluster.b.local, cluster.b.links = a, b, links
    disk: Any = RemoteDisk("a", None)
    cluster.router._pool.disks = {"a": disk}
    cluster.busy()
    cluster.migrate("b")
    assert cluster.a.told == [(near, False)]
    assert cluster.b.told == [(Frozen(CARD), disk) if near else (Frozen(), None)]


# ---- an idle agent


@pytest.mark.parametrize(
    ("wait", "node"), [(0.0, "a"), (0.3, "a"), (0.9, "a"), (1.0, "b"), (30.0, "b")]
)
def test_an_idle_agent_moves_for_a_large_gain_only(
    cluster: Cluster, wait: float, node: str
) -> None:
    """By default: bringing 1,000 rows costs 0.3 s more than staying, and the hysteresis is 0.5 s
    and a quarter of the 0.8 s that the turn takes on b."""
    cluster.busy(a=wait)
    assert cluster.place() == node
    assert cluster.asked == (MOVED if node == "b" else UNTOUCHED)


def test_nobody_moves_for_a_turn_that_has_just_ended(cluster: Cluster) -> None:
    cluster.busy(a=30.0)
    cluster.a.queue_s = 0.0  # since its report
    assert cluster.place() == "a"
    assert cluster.asked == UNTOUCHED


def test_a_silent_owner_delays_its_agents_turn_by_little(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.busy(a=30.0)

    async def silent(since: float) -> ReplicaStatus:
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(cluster.a, "status", silent)
    began = time.monotonic()
    assert cluster.place() == "b"
    assert time.monotonic() - began < 5


def test_an_agent_that_moved_is_at_home_there(cluster: Cluster) -> None:
    cluster.busy(a=30.0)
    assert cluster.place() == "b"
    cluster.router.ended(AGENT, "", 80)
    cluster.busy(b=0.9)
    assert cluster.place() == "b"
    assert cluster.asked == MOVED


def test_a_one_off_goes_where_it_is_cheapest_and_moves_nobody(cluster: Cluster) -> None:
    cluster.busy(a=30.0)
    assert cluster.place(persist=False) == "b"
    assert cluster.asked == UNTOUCHED
    assert cluster.router._registry.location(AGENT).node == "a"


def test_an_agent_that_cannot_move_is_served_by_its_owner(cluster: Cluster) -> None:
    cluster.busy(a=30.0)
    cluster.b.fault = lost()
    assert cluster.place() == "a"
    assert cluster.asked == (["freeze", "thaw"], ["adopt"])


# ---- while a turn runs


def test_a_running_agent_is_not_moved_for_another_turn(cluster: Cluster) -> None:
    assert cluster.place() == "a"
    cluster.busy(a=300.0)
    assert cluster.place() == "a"
    assert cluster.asked == UNTOUCHED


def test_an_agent_may_move_when_its_turn_has_ended(cluster: Cluster) -> None:
    assert cluster.place() == "a"
    cluster.router.ended(AGENT, "", 80)
    cluster.busy(a=30.0)
    assert cluster.place() == "b"
    assert cluster.asked == MOVED


@pytest.mark.parametrize(("passed", "node"), [(TURN_S - 0.1, "a"), (TURN_S, "b")])
def test_a_turn_whose_end_nobody_told_holds_its_agent_as_long_as_turns_may_take(
    cluster: Cluster, passed: float, node: str
) -> None:
    assert cluster.place() == "a"
    cluster.now += passed
    cluster.busy(a=30.0)
    assert cluster.place() == node


def test_a_running_agent_leaves_an_owner_that_failed_the_turn(cluster: Cluster) -> None:
    """Not by a migration: the owner does not answer, and the other one claims the agent."""
    assert cluster.place() == "a"
    assert cluster.place(avoid=frozenset({"life-a"})) == "b"
    assert cluster.asked == UNTOUCHED


def test_a_running_agent_leaves_an_owner_that_is_not_ready(cluster: Cluster) -> None:
    assert cluster.place() == "a"
    cluster.router.suspect("life-a")
    assert cluster.place() == "b"
    assert cluster.asked == UNTOUCHED


def test_where_all_have_failed_the_turn_the_owner_keeps_nobody(cluster: Cluster) -> None:
    assert cluster.place() == "a"
    cluster.busy(a=30.0)
    assert cluster.place(avoid=frozenset({"life-a", "life-b"})) == "b"
    assert cluster.asked == MOVED


def test_an_owner_to_avoid_is_used_when_nothing_else_is_ready(cluster: Cluster) -> None:
    assert cluster.place() == "a"
    cluster.router.suspect("life-b")
    assert cluster.place(avoid=frozenset({"life-a"})) == "a"


# ---- after an operator's migrate


@pytest.mark.parametrize(("passed", "node"), [(0.0, "b"), (59.9, "b"), (60.0, "a")])
def test_an_agent_stays_for_a_minute_where_an_operator_moved_it(
    cluster: Cluster, passed: float, node: str
) -> None:
    done = cluster.migrate("b")
    assert (done.source, done.target, done.epoch) == ("a", "b", 2)
    assert cluster.asked == MOVED
    cluster.now += passed
    cluster.busy(b=30.0)
    assert cluster.place() == node


def test_an_operator_moves_an_agent_whose_turn_runs(cluster: Cluster) -> None:
    assert cluster.place() == "a"
    assert cluster.migrate("b").target == "b"
    cluster.busy(b=30.0)
    assert cluster.place() == "b"  # the turn's next attempt
    assert cluster.asked == MOVED


def test_migrations_are_counted_by_reason(cluster: Cluster) -> None:
    cluster.migrate("b")
    cluster.now += 60.0
    cluster.busy(b=30.0)
    assert cluster.place() == "a"
    cluster.b.fault = lost()
    with pytest.raises(MigrationFailed):
        cluster.migrate("b")
    told = cluster._runner.run(cluster.router.cluster())
    assert told["migrations"] == 2
    assert told["moves"]["by_reason"] == {"operator": 1, "placement": 1}
    assert told["moves"]["failed"] == {"operator": 1}
    assert told["moves"]["freeze_buckets"][-1] == ("+Inf", 2)


def test_a_migration_that_failed_holds_nobody(cluster: Cluster) -> None:
    cluster.b.fault = lost()
    with pytest.raises(MigrationFailed):
        cluster.migrate("b")
    assert cluster.asked == (["freeze", "thaw"], ["adopt"])
    cluster.b.fault = None
    cluster.busy(a=30.0)
    assert cluster.place() == "b"


def test_migrating_where_the_agent_is_asks_nobody(cluster: Cluster) -> None:
    done = cluster.migrate("a")
    assert (done.source, done.target, done.epoch) == ("a", "a", 1)
    assert cluster.asked == UNTOUCHED


def test_an_unknown_target_is_refused_by_name(cluster: Cluster) -> None:
    with pytest.raises(UnknownNode, match=r"'c'.*there are: a, b$"):
        cluster.migrate("c")
    assert cluster.asked == UNTOUCHED


@pytest.mark.parametrize(
    ("silent", "call", "asked"),
    [
        ("a", "precopy", ([], [])),
        ("b", "prefetch", ([], [])),
        ("b", "adopt", (["freeze", "thaw"], ["adopt"])),
    ],
)
def test_a_migration_ends_when_a_host_that_takes_part_falls_silent(
    cluster: Cluster, silent: str, call: str, asked: tuple[list[str], list[str]]
) -> None:
    """Turns of the agent wait for it: they must not wait for its deadlines."""
    device = {"a": cluster.a, "b": cluster.b}[silent]
    device.silent = call

    async def go() -> None:
        moving = asyncio.create_task(cluster.router.migrate(AGENT, "b"))
        await asyncio.sleep(0.05)
        cluster.router.suspect(f"life-{silent}")
        with pytest.raises(MigrationFailed, match=f"{silent} does not answer"):
            await asyncio.wait_for(moving, 2)
        await asyncio.wait_for(cluster.router.place(AGENT, 40, 20), 2)

    cluster._runner.run(go())
    assert cluster.asked[0][: len(asked[0])] == asked[0]
    assert cluster.asked[1][: len(asked[1])] == asked[1]


def test_a_turn_does_not_stay_with_an_owner_that_falls_silent_while_it_leaves(
    cluster: Cluster,
) -> None:
    cluster.busy(a=1000.0)
    cluster.a.silent = "freeze"

    async def go() -> str:
        placing = asyncio.create_task(cluster.router.place(AGENT, 40, 20))
        await asyncio.sleep(0.05)
        cluster.router.suspect("life-a")
        return (await asyncio.wait_for(placing, 2)).node

    assert cluster._runner.run(go()) == "b"


def test_a_migration_whose_source_is_lost_after_the_claim_is_done(cluster: Cluster) -> None:
    cluster.a.silent = "release"

    async def go() -> Migration:
        moving = asyncio.create_task(cluster.router.migrate(AGENT, "b"))
        await asyncio.sleep(0.1)
        cluster.router.suspect("life-a")
        return await asyncio.wait_for(moving, 2)

    assert cluster._runner.run(go()).epoch == 2
    assert cluster.place() == "b"


def test_without_a_target_the_agent_goes_to_the_cheapest_other(cluster: Cluster) -> None:
    cluster.busy(b=30.0)
    assert cluster.migrate(None).target == "b"
    assert cluster.asked == MOVED
    assert cluster.migrate(None).target == "a"


def test_without_a_target_and_another_node_it_is_refused(cluster: Cluster) -> None:
    cluster.router.suspect("life-b")
    with pytest.raises(NoReplica, match="no other node could take agent s"):
        cluster.migrate(None)
    assert cluster.asked == UNTOUCHED


def test_a_target_that_is_not_ready_is_refused(cluster: Cluster) -> None:
    cluster.replicas["b"].healthy = False
    with pytest.raises(NoReplica, match="b is not ready"):
        cluster.migrate("b")
    assert cluster.asked == UNTOUCHED


def test_a_store_that_fails_at_the_start_is_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = FakeEngine().key
    asleep = AgentId("default", "asleep")
    card = (
        CacheStore(tmp_path.as_uri()).claim(new_card(asleep, key, "f16", Owner("a", "life"))).card
    )
    asked: list[CompatibilityKey] = []

    def stored(config: ReplicaConfig, key: CompatibilityKey) -> list[LoadedCard]:
        asked.append(key)
        if len(asked) < 3:
            raise StoreUnavailable(config.store, "no answer")
        return STORED(config, key)

    monkeypatch.setattr(recall, "stored_agents", stored)
    monkeypatch.setattr(recall, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(router_module, "ReplicaPool", QuietPool)
    config = ClusterConfig(ReplicaConfig(model="fake://", store=tmp_path.as_uri(), codec="f16"))

    async def agents() -> list[str]:
        return [record["id"] for record in await cluster.router.agents("default")]

    with asyncio.Runner() as runner:
        cluster = Cluster(config, runner)
        assert runner.run(agents()) == ["s"]  # at once, though the store is gone
        runner.run(asyncio.sleep(0.5))
        assert set(runner.run(agents())) == {"s", card.agent.session}
    assert len(asked) == 3


def test_an_unknown_agent_is_refused(cluster: Cluster) -> None:
    with pytest.raises(UnknownAgent, match="nobody"):
        cluster.migrate("b", AgentId("default", "nobody"))
    assert cluster.asked == UNTOUCHED


# ---- affinity, explanations, the log


def hard(cluster: Cluster, **options: object) -> str:
    work = cluster.router.place(AGENT, 40, 20, affinity="hard", **options)  # type: ignore[arg-type]
    return cluster._runner.run(work).node


def test_hard_affinity_never_moves_while_the_owner_lives(cluster: Cluster) -> None:
    cluster.busy(a=500.0)
    assert hard(cluster) == "a"
    assert hard(cluster, avoid=frozenset({"life-a"})) == "a"
    assert cluster.asked == UNTOUCHED


def test_hard_affinity_waits_for_an_owner_that_is_silent(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.router.suspect("life-a")
    monkeypatch.setattr("cluster.able._PLACE_TIMEOUT_S", 0.1)
    with pytest.raises(NoReplica):
        hard(cluster)
    assert cluster.place() == "b"


def test_hard_affinity_leaves_an_owner_that_is_gone(cluster: Cluster) -> None:
    del cluster.replicas["a"]
    cluster.router._dispatch.lost("a")
    assert hard(cluster) == "b"


def test_an_explanation_changes_nothing_and_says_what_place_does(cluster: Cluster) -> None:
    cluster.busy(a=30.0)
    ask = Ask(AGENT, 40, 20)
    told = cluster.router.explain(ask)
    assert told == cluster.router.explain(ask) | {"at": told["at"]}
    assert (told["node"], told["action"], told["owner"]) == ("b", "migrate", "a")
    assert [entry["node"] for entry in told["estimates"]] == ["b", "a"]
    assert told["estimates"][1]["queue_s"] == 30.0
    assert any("a would take" in reason for reason in told["reasons"])
    assert cluster.asked == UNTOUCHED
    assert cluster.router.decisions("default", 10) == []
    assert cluster.place() == told["node"]


def test_nobody_to_explain(cluster: Cluster) -> None:
    for name in ("a", "b"):
        cluster.router.suspect(f"life-{name}")
    with pytest.raises(NoReplica):
        cluster.router.explain(Ask(AGENT, 40, 20))


def test_decisions_are_logged_with_their_outcomes(cluster: Cluster) -> None:
    work = cluster.router.place(AGENT, 40, 20, turn_id="t1")
    assert cluster._runner.run(work).node == "a"
    (entry,) = cluster.router.decisions("default", 10)
    assert (entry["turn"], entry["action"], entry["outcome"]) == ("t1", "stay", None)
    cluster.router.ended(AGENT, "t1", 80, Outcome(0.25, 1.0, 40, 30, 10, 20))
    (entry,) = cluster.router.decisions("default", 10)
    assert entry["outcome"]["first_token_s"] == 0.25
    assert entry["outcome"]["prefilled_tokens"] == 20
    assert entry["estimates"][0]["prefill_s"] > 0
    assert cluster.router.decisions("acme", 10) == []


def test_a_move_that_failed_is_logged_as_what_it_was(cluster: Cluster) -> None:
    cluster.busy(a=30.0)
    cluster.b.fault = lost()
    assert cluster.place() == "a"
    (entry,) = cluster.router.decisions("default", 10)
    assert (entry["node"], entry["action"]) == ("a", "stay")
    assert any("should have moved to b" in reason for reason in entry["reasons"])


def test_a_full_log_forgets_the_oldest() -> None:
    log, dispatch = DecisionLog(2), Dispatch(PlacementConfig())
    dispatch.reported(Candidate("a", 0.0, Rates(), 0.0, 0))
    for n in range(3):
        ask = Ask(AGENT, 40, 20, f"t{n}")
        log.add(dispatch.decide(ask))
    assert [choice.turn_id for choice in log.latest("default", 10)] == ["t2", "t1"]
    log.ended("t0", Outcome(1, 1, 1, 1, 1, 1))
    assert [choice.outcome for choice in log.latest("default", 10)] == [None, None]
    assert len(log) == 2


def test_a_turn_that_was_promised_counts_as_queued_until_the_next_report(
    cluster: Cluster,
) -> None:
    def queued() -> float:
        estimates = cluster.router.explain(Ask(AGENT, 40, 20))["estimates"]
        return float(next(e["queue_s"] for e in estimates if e["node"] == "a"))

    cluster._runner.run(cluster.router.place(AGENT, 4000, 20))
    assert queued() > 0
    cluster.busy()
    assert queued() == 0


def test_decisions_of_different_agents_do_not_wait_for_each_other(cluster: Cluster) -> None:
    """One agent's migration hangs; another agent's turn is placed meanwhile."""

    async def go() -> str:
        gate = asyncio.Event()

        async def hang(agent: AgentId, was: Before) -> Fetched:
            await gate.wait()
            return Fetched(Held(0, 0), 0, 0)

        cluster.b.prefetch = hang  # type: ignore[method-assign, assignment]
        moving = asyncio.create_task(cluster.router.place(AGENT, 40, 20))
        while not cluster.router._lock(AGENT).locked():
            await asyncio.sleep(0)
        other = await cluster.router.place(AgentId("default", "other"), 40, 20)
        assert not moving.done()
        gate.set()
        assert (await moving).node == "b"
        return other.node

    cluster.busy(a=30.0)
    assert cluster._runner.run(asyncio.wait_for(go(), 10)) == "b"
