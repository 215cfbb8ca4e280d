"""The ownership protocol, model-checked: invariants I1, I4 and I5.

A hypothesis state machine drives the real Memory, Handoff, CacheStore, collector and Registry. Each
replica's calls of the store run in greenlets that stop before every one of them: a step of the
machine lets one replica do a few, and the last of these may fail before the deed, lose its answer,
or see an old listing. Replicas crash, sleep and wake up as zombies; any message of a migration may
be lost; the registry is lost and rebuilt. Nothing waits for a clock or a thread, so the steps alone
decide what happens. KVFERRY_SEED chooses them, else the day.

What is promised of an acknowledged commit: a claim that begins after it goes on from it. A claim
that has begun before may miss it (its reader was faster), and one whose own listing was old may go
on from an older card, never from one that its owner wrote when it had lost the agent.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import itertools
import logging
import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import greenlet
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from actors.branches import AgentMemory, Before, Branch, durable_rows
from actors.errors import AgentMoved
from actors.handoff import Handoff
from actors.memory import Memory, MemoryConfig
from actors.report import AgentReport
from cluster.registry import Registry
from storage.blocks import WRITER_WINDOW_S, BlockStore, card_block_names
from storage.cache_file import sha256
from storage.card import (
    AgentId,
    BranchCard,
    CacheCard,
    Owner,
    PartRef,
    card_name,
    decode_card,
    parse_name,
)
from storage.claims import Claim
from storage.codec import decode_rows, get_codec
from storage.collector import CollectOptions, collect
from storage.errors import StorageError, StoreUnavailable
from storage.files import FilesOptions
from storage.reader import CardReader, LoadedCard
from storage.spec import CompatibilityKey, GroupRows, KVRows, LayerSpec, ModelCacheSpec
from storage.store import CacheStore
from storage.tiers import Tiers, unpack_block
from tests.faulty import DictBackend, Faulty, Rates

SEED = int(os.environ.get("KVFERRY_SEED", datetime.date.today().toordinal()))
STEPS = 50_000
STEPS_PER_RUN = 200
REPLICAS, AGENTS = 3, 2
GRACE_S = 2 * WRITER_WINDOW_S

SPEC = ModelCacheSpec("tiny", (LayerSpec("full", 1, 32, 32),), block_tokens=8)
KEY = CompatibilityKey("1f" * 32, "2e" * 32, (("base", 10000.0), ("type", "neox")), SPEC)
F16 = get_codec("f16")
MOST = 30  # calls of the store in one step
POOL_BYTES = 4 * 8 * 128  # four blocks: others are read from the store again
OPENING = tuple(range(1, 11))  # tokens that all agents begin with: their blocks are shared
Tokens = tuple[int, ...]


def rows_of(tokens: list[int]) -> KVRows:
    """Rows that say which token they are of."""
    row = np.array(tokens, np.float16).reshape(1, -1, 1, 1)
    keys = np.broadcast_to(row, (1, len(tokens), 1, 32))
    return (GroupRows(np.ascontiguousarray(keys), -np.ascontiguousarray(keys)),)


def tokens_of(card: CacheCard) -> Tokens:
    return card.branches[0].tokens if card.branches else ()


def extends(longer: Tokens, shorter: Tokens) -> bool:
    return longer[: len(shorter)] == shorter


def common(a: Tokens, b: Tokens) -> Tokens:
    return a[
        : sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
        )
    ]


# ---- the store, as its replicas reach it


@dataclass(eq=False)
class Task:
    """A replica's call that reaches the store. `floor` and `stale` are of the claim under way:
    what it must go on from, and whether it saw an old listing."""

    run: greenlet.greenlet
    agent: AgentId | None = None
    floor: Tokens | None = None
    stale: bool = False
    waits_for: tuple[str, str] = ("", "")  # the call of the store that comes next
    failed: StorageError | AgentMoved | None = None

    @property
    def at_a_card(self) -> bool:
        return self.waits_for[0] == "create" and self.waits_for[1].startswith("/agents/")


class Wire(Faulty):
    """Each call of the backend waits until the machine lets it happen, with the fault it says."""

    def __init__(self, inner: DictBackend, older: dict[str, Any], hub: greenlet.greenlet) -> None:
        super().__init__(inner, Rates(stale=1.0), staleness=4)
        self._older = older
        self._hub, self._plan = hub, "ok"
        self.task: Task | None = None
        self.before = self._wait

    def _wait(self, call: str, path: str) -> None:
        if self.task is not None:
            self.task.waits_for = (call, path)
        self._plan = self._hub.switch()
        if self._plan == "no_answer":
            raise OSError(errno.ENOTCONN, "the store cannot be reached", path)

    def _hit(self, fault: str) -> bool:
        hit = self._plan == fault
        if hit and fault == "stale" and self.task is not None:
            self.task.stale = True
        return hit

    def _leave(self, result: Any) -> Any:
        if self._plan == "error_after":
            raise OSError(errno.ENOTCONN, "the answer was lost")
        return result


PLANS = (*["ok"] * 9, "no_answer", "error_after", "stale")


@dataclass(frozen=True)
class Written:
    """A card's file. `late`: a newer epoch was there when it was written."""

    tokens: Tokens
    nonce: str
    late: bool
    blocks: frozenset[str]


class Audit(DictBackend):
    """The store itself; tells the world of every card that comes and goes."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def create(self, path: str, raw: bytes) -> None:
        super().create(path, raw)
        if path.startswith("/agents/"):
            self.world.card_written(path, raw)

    def remove(self, path: str) -> None:
        super().remove(path)
        if path.startswith("/agents/"):
            self.world.card_removed(path)


class WatchedStore(CacheStore):
    """Tells the world when a claim begins and what was acknowledged."""

    world: World
    wire: Wire

    def claim(self, template: CacheCard, **options: Any) -> Claim:  # type: ignore[override]
        task = self.wire.task
        assert task is not None
        task.agent, task.floor, task.stale = template.agent, self.world.floor[template.agent], False
        try:
            claim = super().claim(template, **options)
        finally:
            task.floor = None
        self.world.claimed(claim.card, stale=task.stale)
        return claim

    def commit(self, card: CacheCard) -> LoadedCard:
        task = self.wire.task
        assert task is not None
        task.stale = False
        loaded = super().commit(card)
        self.world.acknowledged(loaded.card, stale=task.stale)
        return loaded


# ---- a replica, without its engine


class Jobs:
    """The persister, job by job."""

    has_room = True

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None]] = deque()

    def submit(self, job: Callable[[], None]) -> None:
        self.queue.append(job)


@dataclass(eq=False)
class Turn:
    memory: AgentMemory
    branch: Branch
    sequence: SimpleNamespace

    @property
    def ready(self) -> SimpleNamespace:
        return SimpleNamespace(memory=self.memory, match=SimpleNamespace(branch=self.branch))


class Replica:
    """One life of a replica: its memory, its handoff, and the calls that are under way."""

    def __init__(self, world: World, node: str, life: int) -> None:
        self.world, self.paused = world, False
        self.wire = Wire(world.disk, world.older, world.hub)
        store = WatchedStore(
            "memory://own", options=FilesOptions(attempts=1), clock=lambda: world.disk.clock
        )
        store.files.backend, store.world, store.wire = self.wire, world, self.wire
        self.jobs = Jobs()
        tiers = Tiers(store, SPEC, F16, POOL_BYTES)
        with mock.patch("actors.memory.Persister", return_value=self.jobs):
            owner = Owner(node, str(life))
            self.memory = Memory(store, KEY, F16, tiers, owner, MemoryConfig(), {})
        # Has a thread of its own; here each call of the store is decided by the machine.
        self.memory.outage = SimpleNamespace(lasts=False, began=lambda: None)  # type: ignore[assignment]
        self.turns: dict[AgentId, Turn] = {}
        self.frozen: dict[AgentId, int] = {}  # epoch at which it was frozen
        self.handoff = Handoff(
            self.memory,
            SimpleNamespace(active=self.turns),  # type: ignore[arg-type]
            SimpleNamespace(drop=lambda branch: None),  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            SimpleNamespace(),  # type: ignore[arg-type]
            lambda agent: self.turns.pop(agent, None) and None,
            lambda function: function(),
            timeout_s=1e9,
        )
        self.tasks: dict[str, Task | None] = {"worker": None, "persister": None}

    # as the Exporter
    def export(self, turn: Turn, stop: int, *, wait: bool) -> bool:
        branch = turn.branch
        if branch.exported < stop:
            rows = rows_of(branch.tokens[branch.exported : stop])
            self.memory.rows.append(turn.memory, branch, branch.exported, stop, rows)
        return True

    def checkpoint(self, turn: Turn) -> None:
        """The spec has no sliding window."""

    # ---- calls

    def start(self, slot: str, function: Callable[[], Any]) -> Task | None:
        """Begin a call, up to its first use of the store; None while the slot is taken."""
        if self.tasks[slot] is not None or self.paused:
            return None

        def run() -> None:
            try:
                function()
            except (StorageError, AgentMoved) as error:
                task.failed = error

        task = self.tasks[slot] = Task(greenlet.greenlet(run, self.world.hub))
        self._switch(slot, None)
        return task

    def _switch(self, slot: str, plan: str | None) -> None:
        task = self.tasks[slot]
        assert task is not None
        self.wire.task = task
        task.run.switch(*([] if plan is None else [plan]))
        if task.run.dead:
            self.tasks[slot] = None

    def go(self, slot: str, calls: int, plan: str) -> None:
        """So many calls of the store, the last as planned; MOST: up to the creation of a card. The
        persister takes its next job."""
        if self.paused:
            return
        for left in reversed(range(calls)):
            if self.tasks[slot] is None and slot == "persister" and self.jobs.queue:
                self.start(slot, self.jobs.queue.popleft())
            task = self.tasks[slot]
            if task is None:
                continue
            if calls == MOST and task.at_a_card and left < MOST - 1:
                return
            self._switch(slot, "ok" if left else plan)

    def finish(self) -> None:
        """Everything that is under way and queued, without faults."""
        while not self.paused and (any(self.tasks.values()) or self.jobs.queue):
            for slot in self.tasks:
                self.go(slot, MOST - 1, "ok")

    @property
    def busy(self) -> bool:
        return any(self.tasks.values())

    def begin_turn(self, agent: AgentId, n: int) -> None:
        """On a worker: open, then on the loop: the prompt, which goes on where the memory ends."""
        known = self.memory.get(agent)
        if known is not None and n % 2:
            known.seen = -math.inf  # its claim was longer ago
        memory = self.memory.open(agent)
        if memory.card is None or memory.state != "owned" or agent in self.turns:
            return
        if not memory.branches:
            memory.branches.append(Branch(0))
        branch = memory.branches[0]
        if not branch.tokens:
            branch.tokens = list(OPENING)
        self.turns[agent] = Turn(memory, branch, SimpleNamespace(paused=False, n_rows=0))
        self.speak(agent, n)

    def speak(self, agent: AgentId, n: int) -> None:
        """Tokens of a turn; a paused sequence takes no step."""
        turn = self.turns.get(agent)
        if turn is None or turn.sequence.paused:
            return
        if self.memory.get(agent) is not turn.memory or turn.memory.card is None:
            del self.turns[agent]  # fenced, and forgotten
            return
        assert turn.memory.state == "owned", "a frozen agent took a step"
        turn.branch.tokens = [*turn.branch.tokens, *self.world.new_tokens(n)]
        turn.sequence.n_rows = len(turn.branch.tokens) - 1  # the last one is never fed

    def end_turn(self, agent: AgentId) -> None:
        turn = self.turns.get(agent)
        if turn is None or turn.sequence.paused:
            return
        del self.turns[agent]
        if self.memory.get(agent) is turn.memory:
            self.export(turn, turn.sequence.n_rows, wait=False)
            self.memory.commits.later(turn.memory)

    def freeze(self, agent: AgentId) -> Any:
        _, done = self.handoff.freeze(agent)
        memory = self.memory.get(agent)
        assert memory is not None
        assert memory.card is not None
        self.frozen[agent] = memory.card.epoch
        return done

    def reports(self) -> Iterator[AgentReport]:
        for memory in self.memory.agents():
            assert memory.card is not None
            branch = memory.branches[0] if memory.branches else Branch(0)
            yield AgentReport(
                memory.agent, memory.card.epoch, memory.card.generation, len(memory.branches),
                len(branch.tokens), branch.rows, True, 0, 0, 0.0, durable_rows(branch),
            )  # fmt: skip


@dataclass(eq=False)
class Moving:
    """A migration, as the router makes it: one message after another."""

    agent: AgentId
    source: Replica
    target: Replica
    stage: str = "prefetch"
    settled: Any = None
    latest: LoadedCard | None = None
    adopting: Task | None = None

    def prefetch(self) -> None:
        self.target.memory.stored(self.agent)


# ---- the world, and what must hold in it


class World:
    def __init__(self) -> None:
        self.hub = greenlet.getcurrent()
        self.older: dict[str, Any] = {}  # listings that may still be seen
        self.disk = Audit(self)
        self.reader = CacheStore("memory://own", clock=lambda: self.disk.clock)
        self.reader.files.backend = self.disk
        self.agents = [AgentId("acme", f"session-{n}") for n in range(AGENTS)]
        folders = {a: self.reader.agent_folder(a, KEY) for a in self.agents}
        self._agent_of = {folder: agent for agent, folder in folders.items()}
        self.cards: dict[AgentId, dict[tuple[int, int], Written]] = {a: {} for a in self.agents}
        self.late: dict[AgentId, set[tuple[int, int]]] = {a: set() for a in self.agents}
        self.floor: dict[AgentId, Tokens] = dict.fromkeys(self.agents, ())
        self.buried: dict[AgentId, bool] = dict.fromkeys(self.agents, False)
        self._sound: dict[str, Tokens] = {}  # by block file: what its rows say
        self._changed: set[AgentId] = set()
        self._last_token = OPENING[-1]
        self._lives = itertools.count()
        self.replicas = [self.born(n) for n in range(REPLICAS)]
        self.registry = Registry()
        self.moving: dict[AgentId, Moving] = {}
        self.seen: Counter[str] = Counter()
        self.violation: AssertionError | None = None

    def born(self, n: int) -> Replica:
        return Replica(self, f"node-{n}", next(self._lives))

    def new_tokens(self, n: int) -> range:
        first = self._last_token + 1
        self._last_token += n
        return range(first, first + n)

    def newest(self, agent: AgentId) -> int:
        return max((epoch for epoch, _ in self.cards[agent]), default=0)

    # ---- told by the store

    def card_written(self, path: str, raw: bytes) -> None:
        """Told from within a create, whose caller takes any exception for the store's."""
        try:
            self._card_written(path, raw)
        except AssertionError as error:
            self.violation = error

    def _card_written(self, path: str, raw: bytes) -> None:
        folder, name = path.rsplit("/", 1)
        agent, number = self._agent_of[folder], parse_name(name)
        assert number is not None
        card = decode_card(raw, path, key=KEY)
        late = number[0] < self.newest(agent)
        blocks = card_block_names(card)
        lost = blocks - {path.rsplit("/", 1)[1] for path in self.disk.files}
        assert not lost, "I4: a card was written that names a block which its store lacks"
        base = (card.base.epoch, card.base.generation) if card.base else None
        if late:
            self.late[agent].add(number)
            self.seen["late card"] += 1
        elif number[1] == 0:
            assert base not in self.late[agent], "I5: a claim goes on from a fenced owner's write"
            self._new_epoch(agent, card)
        self.cards[agent][number] = Written(tokens_of(card), card.nonce, late, blocks)
        self._changed.add(agent)

    def _new_epoch(self, agent: AgentId, card: CacheCard) -> None:
        current = greenlet.getcurrent()
        task = next((t for t in self.tasks() if t.run is current), None)
        assert task is not None, "a claim by nobody"
        assert task.floor is not None, "a claim outside of a claim"
        tokens = tokens_of(card)
        assert card.tombstone or task.stale or extends(tokens, task.floor), (
            f"I1: {len(task.floor)} acknowledged tokens, the claim goes on from {len(tokens)}"
        )
        if not extends(tokens, self.floor[agent]) and not card.tombstone:
            self.seen["claim from an older card" if task.stale else "commit during a claim"] += 1
        self.floor[agent] = tokens
        self.buried[agent] = card.tombstone
        for other in self.tasks():
            if other.agent == agent and other.floor is not None:
                other.floor = common(other.floor, tokens)

    def card_removed(self, path: str) -> None:
        folder, name = path.rsplit("/", 1)
        number = parse_name(name)
        if number is not None:
            del self.cards[self._agent_of[folder]][number]
            self._changed.add(self._agent_of[folder])

    def claimed(self, card: CacheCard, *, stale: bool) -> None:
        assert stale or card.epoch >= self.newest(card.agent), (
            "I5: a claim of an epoch that is over"
        )
        self.seen["claim"] += 1

    def acknowledged(self, card: CacheCard, *, stale: bool) -> None:
        agent, number = card.agent, (card.epoch, card.generation)
        late = number in self.late[agent]
        assert stale or not late, "I5: a fenced owner's commit was acknowledged"
        if card.epoch == self.newest(agent) and not late:
            tokens = tokens_of(card)
            assert extends(tokens, self.floor[agent]), "I1: a commit forgets acknowledged tokens"
            self.floor[agent] = tokens
            self.seen["commit"] += 1

    def tasks(self) -> list[Task]:
        lives = [*self.replicas, *(m.source for m in self.moving.values())]
        return [task for r in lives for task in r.tasks.values() if task is not None]

    # ---- the invariants

    def check(self) -> None:
        if self.violation is not None:
            raise self.violation
        for agent in self.agents:
            self._one_owner(agent)
        for agent in self._changed:
            self._what_is_read(agent)
        self._changed.clear()

    def _one_owner(self, agent: AgentId) -> None:
        newest = self.newest(agent)
        owners = []
        for replica in self.replicas:
            memory = replica.memory.get(agent)
            if memory is not None and memory.card is not None and memory.card.epoch == newest:
                claim = self.cards[agent].get((newest, 0))
                assert claim is not None, "the newest epoch's claim is gone"
                assert claim.nonce == memory.card.nonce, "I5: an owner whose claim is another's"
                owners.append(replica)
            if memory is not None and memory.card is not None and memory.state == "owned":
                frozen = replica.frozen.get(agent, 0)
                assert memory.card.epoch > frozen, "a frozen agent goes on without a claim"
        assert len(owners) <= 1, "I5: two owners of the newest epoch"

    def _what_is_read(self, agent: AgentId) -> None:
        loaded = self.reader.latest(agent, KEY)
        if loaded is None:
            assert not self.cards[agent], "the memory vanished"
            return
        card = loaded.card
        assert card.epoch == self.newest(agent), "I5: a card of an older epoch is read"
        assert (card.epoch, card.generation) not in self.late[agent], "I5: a zombie's card is read"
        tokens = tokens_of(card)
        if card.tombstone:
            return
        assert extends(tokens, self.floor[agent]), "I1: acknowledged tokens are lost"
        assert len(set(tokens)) == len(tokens), "I1: a token is doubled"
        assert not tokens or extends(tokens, OPENING[:1])
        for branch in card.branches:
            assert self._rows(branch) == branch.tokens[: branch.rows], "I1: rows of other tokens"

    def _rows(self, branch: BranchCard) -> Tokens:
        """What the branch's rows say; each block file is decoded once."""
        said: list[int] = []
        for ref in (*branch.blocks, *branch.tail):
            path = self.reader.block_path("acme", ref, "full")
            if path not in self._sound:
                raw = self.reader.get_block("acme", ref, "full")
                assert raw is not None, "I4: the newest card names a block that is gone"
                tensors = unpack_block(raw, path, SPEC, F16, ref.id, ref.rows)
                (group,) = decode_rows(SPEC, F16, tensors)
                self._sound[path] = tuple(int(x) for x in group.k[0, :, 0, 0])
            assert path in self.disk.files, "I4: the newest card names a block that is gone"
            said += self._sound[path]
        return tuple(said)


EVENTS = {"claim", "commit", "migration", "thaw", "collected", "late card"}  # in every check
WEIGHTS = {
    "turn": 5, "speak": 5, "work": 7, "persist": 7, "finish": 5, "take_over": 3, "migrate": 3,
    "message": 10, "overdue": 1, "delete": 1, "crash": 1, "pause": 1, "wake": 3, "report": 2,
    "rebuild": 1, "collect": 1,
}  # fmt: skip


class Ownership(RuleBasedStateMachine):
    """The steps. `executed` counts them over all runs."""

    executed = 0
    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    def teardown(self) -> None:
        type(self).seen.update(self.world.seen)

    # One rule, so that hypothesis does not switch off whole kinds of steps for a run.
    @rule(
        what=st.sampled_from([name for name, weight in WEIGHTS.items() for _ in range(weight)]),
        who=st.integers(0, REPLICAS - 1),
        a=st.integers(0, AGENTS - 1),
        n=st.integers(1, 12),
        plan=st.sampled_from(PLANS),
    )
    def step(self, what: str, who: int, a: int, n: int, plan: str) -> None:
        replica, agent = self.world.replicas[who], self.world.agents[a]
        getattr(self, f"_{what}")(replica, agent, n, plan)
        type(self).executed += 1
        self.world.check()

    # ---- work

    def _turn(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        """Where the registry says, most of the time."""
        node = self.world.registry.location(agent).node
        if n > 2 and node is not None:
            replica = self.world.replicas[int(node[-1])]
        replica.start("worker", lambda: replica.begin_turn(agent, n))
        self.world.registry.assign(agent, replica.memory.owner.node)

    def _speak(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        """Whoever has a turn of the agent; half of the turns end."""
        for each in self.world.replicas:
            if not each.paused:
                each.speak(agent, n)
                if n % 2:
                    each.end_turn(agent)

    def _work(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        replica.go("worker", MOST if n > 9 else n, plan)

    def _persist(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        replica.go("persister", MOST if n > 9 else n, plan)

    def _finish(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        replica.finish()

    # ---- ownership

    def _take_over(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        """Somebody suspects the owner; at times just before that writes a card."""
        if n > 6:
            for each in self.world.replicas:
                each.go("persister", MOST, "ok")
        replica.start("worker", lambda: replica.memory.adopt(agent))
        if n % 3:
            replica.go("worker", MOST - 1, "ok")

    def _migrate(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        node = self.world.registry.location(agent).node
        if node is None or agent in self.world.moving:
            return
        source = self.world.replicas[int(node[-1])]
        if source is not replica:
            self.world.moving[agent] = Moving(agent, source, replica)

    def _message(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        """The next message of a migration, or its answer, which may be lost."""
        moving = self.world.moving.get(agent)
        if moving is not None and self._deliver(moving, lost=n == 1):
            del self.world.moving[agent]

    def _deliver(self, moving: Moving, *, lost: bool) -> bool:
        """Whether the migration is over."""
        agent, source = moving.agent, moving.source
        if source.paused or source not in self.world.replicas:
            # Silent: it is frozen already, or the router gives up; dead: the target claims.
            if moving.stage in ("prefetch", "freeze", "settle"):
                moving.stage = "adopt"
                return source.paused
            return moving.stage == "release" or self._adopt(moving, lost)
        match moving.stage:
            case "prefetch":
                moving.target.start("worker", moving.prefetch)
                moving.stage = "freeze"
                return False
            case "freeze" if not lost:
                try:
                    moving.settled, moving.stage = source.freeze(agent), "settle"
                except AgentMoved:
                    moving.stage = "adopt"
                return False
            case "settle" if moving.settled.done() and source.memory.is_stored(agent):
                try:
                    _, moving.latest = source.handoff.answer(agent)
                except StoreUnavailable:  # it is claimed back
                    return self._thaw(moving)
                moving.stage = "adopt"
                return False
            case "settle":
                return (lost or moving.settled.done()) and self._thaw(moving)
            case "adopt" | "adopting":
                return self._adopt(moving, lost)
            case "release" if not lost:
                source.handoff.release(agent)
                self.world.seen["migration"] += 1
        return True

    def _adopt(self, moving: Moving, lost: bool) -> bool:
        target, agent = moving.target, moving.agent
        if moving.adopting is None:
            before = Before(latest=moving.latest)
            moving.adopting = target.start("worker", lambda: target.memory.adopt(agent, before))
            moving.stage = "adopting" if moving.adopting is not None else "adopt"
            return moving.adopting is None and self._thaw(moving)
        if lost or target not in self.world.replicas:  # adopted or not: the router cannot know
            return self._thaw(moving)
        if not moving.adopting.run.dead:
            return False
        if moving.adopting.failed is not None:
            return self._thaw(moving)
        self.world.registry.assign(agent, target.memory.owner.node)
        moving.stage = "release"
        return False

    def _thaw(self, moving: Moving) -> bool:
        if not moving.source.paused:
            moving.source.handoff.thaw(moving.agent)
            self.world.seen["thaw"] += 1
        return True

    def _overdue(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        """The deadline of a freeze has passed: some message was lost."""
        for each in self.world.replicas:
            if not each.paused:
                each.handoff.thaw(agent)

    def _delete(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        if n < 4 and agent not in replica.turns:
            replica.start("worker", lambda: replica.memory.delete(agent))

    # ---- what befalls them

    def _crash(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        """What it held in RAM is gone, and a call under way never ends."""
        number = self.world.replicas.index(replica)
        self.world.replicas[number] = self.world.born(number)
        self.world.registry.node_lost(f"node-{number}")

    def _pause(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        replica.paused = True

    def _wake(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        for number, each in enumerate(self.world.replicas):
            each.paused = each.paused and n >> number & 1 == 1

    def _report(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        self.world.registry.reported(replica.memory.owner.node, replica.reports())

    def _rebuild(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        """The registry is lost, and learns again from the replicas and the store."""
        world = self.world
        world.registry = Registry()
        for each in world.replicas:
            world.registry.reported(each.memory.owner.node, each.reports())
        for loaded in world.reader.cards(["acme"], KEY):
            world.registry.found_in_store(loaded)
        for one in world.agents:
            self._is_known(one)

    def _is_known(self, agent: AgentId) -> None:
        """To the registry, it is where the newest epoch is that anybody reports."""
        held = {r.memory.owner.node: r.memory.get(agent) for r in self.world.replicas}
        epochs = {node: m.card.epoch for node, m in held.items() if m is not None and m.card}
        record = self.world.registry.get(agent)
        if epochs:
            assert record is not None, "registry"
            assert record.node is not None, "registry"
            assert record.epoch == epochs[record.node] == max(epochs.values()), "registry"
        elif self.world.cards[agent] and not self.world.buried[agent]:
            assert record is not None
            assert record.node is None

    def _collect(self, replica: Replica, agent: AgentId, n: int, plan: str) -> None:
        """A round of the collector, later than any call that was under way."""
        world = self.world
        for each in world.replicas:
            each.finish()
        if not any(each.busy for each in world.replicas):
            world.disk.clock += 1.1 * GRACE_S
            world.older.clear()  # no listing is that old
            if collect(world.reader, CollectOptions(grace_s=GRACE_S)).deleted:
                world.seen["collected"] += 1


def check(runs: int, steps: int = STEPS_PER_RUN, *, shrink: bool = True) -> type[Ownership]:
    """The machine that did it, after so many runs of so many steps."""
    machine = type("Machine", (Ownership,), {"executed": 0, "seen": Counter()})
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    options = settings(
        max_examples=runs, stateful_step_count=steps, deadline=None, database=None, phases=phases,
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=False,
    )  # fmt: skip
    run_state_machine_as_test(seed(SEED)(machine), settings=options, _min_steps=steps)
    return machine


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Thousands of faults are counted, and need not be told."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_schedule_breaks_ownership() -> None:
    print(f"KVFERRY_SEED={SEED}")
    machine = check(STEPS // STEPS_PER_RUN)
    print(f"{machine.executed} steps; there were {dict(machine.seen)}")
    assert machine.executed >= STEPS
    assert machine.seen.keys() >= EVENTS


# ---- what the machine would notice


def unfenced_commit(store: CacheStore, card: CacheCard) -> LoadedCard:
    """Without a look at the epochs, before or after."""
    with (
        mock.patch.object(store, "_check_owned"),
        mock.patch.object(store, "epoch", return_value=0),
    ):
        return COMMIT(store, card)


def overwriting(backend: DictBackend, path: str, raw: bytes) -> None:
    backend.files[path] = (raw, backend.clock)


def late_block(blocks: BlockStore, tenant: str, block_id: str, part: str, raw: bytes) -> PartRef:
    vars(blocks).setdefault("later", []).append((tenant, block_id, part, raw))
    return PartRef(sha256(raw), len(raw))


def card_then_blocks(store: CacheStore, card: CacheCard) -> LoadedCard:
    loaded = COMMIT(store, card)
    for one in vars(store.blocks).pop("later", []):
        PUT(store.blocks, *one)
    return loaded


def longest_card(
    reader: CardReader,
    folder: str,
    key: CompatibilityKey | None,
    look_s: float | None = None,
    **_: object,
) -> Any:
    """The greatest generation, of whatever epoch."""
    names = sorted(reader._card_names(folder, look_s), key=lambda name: (name[1], name[0]))
    return reader._read_card(f"{folder}/{card_name(*names[-1])}", key) if names else None


def unclaimed(memory: Memory, agent: AgentMemory) -> None:
    agent.state = "owned"


def believing(store: CacheStore, path: str, raw: bytes, card: CacheCard) -> None:
    """Takes a file that is there for its own."""
    with contextlib.suppress(OSError):
        store.files.create(path, raw)


def credulous(registry: Registry, node: str, reports: Any) -> None:
    """Believes whoever spoke last."""
    registry._records.clear()
    REPORTED(registry, node, reports)


COMMIT, PUT, REPORTED = CacheStore.commit, BlockStore.put, Registry.reported
MUTANTS: dict[str, tuple[str, dict[tuple[type, str], Any]]] = {
    "a commit without the epoch check": ("I5", {(CacheStore, "commit"): unfenced_commit}),
    "a create that overwrites": ("I[15]", {(DictBackend, "create"): overwriting}),
    "the card before its blocks": (
        "I4",
        {
            (BlockStore, "put"): late_block,
            (BlockStore, "secure"): lambda blocks, tenant, ref, named: ref,
            (CacheStore, "commit"): card_then_blocks,
        },
    ),
    "an older epoch is read": ("I[15]", {(CardReader, "_newest"): longest_card}),
    "a thaw without a claim": ("without a claim", {(Memory, "reclaim"): unclaimed}),
    "a claim that inherits nothing": (
        "I1",
        {(CacheStore, "_inherit"): lambda store, card, old, rows: card},
    ),
    "another's claim taken for one's own": (
        "I[15]",
        {(CacheStore, "_create_or_read_back"): believing},
    ),
    "a registry that believes the last": ("registry", {(Registry, "reported"): credulous}),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_notices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message, changes = MUTANTS[name]
    for (owner, attribute), replacement in changes.items():
        monkeypatch.setattr(owner, attribute, replacement)
    with pytest.raises(AssertionError, match=message):
        check(100, shrink=False)
