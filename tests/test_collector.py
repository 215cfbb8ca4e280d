"""The collector: what it deletes, what it never does, and why a writer and it need no lock."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import numpy as np
import pytest

from storage import cache_file
from storage.blocks import WRITER_WINDOW_S, block_name, card_block_names
from storage.card import (
    AgentId,
    BlockRef,
    BranchCard,
    CacheCard,
    decode_card,
    encode_card,
    parse_name,
)
from storage.collector import CollectOptions, CollectReport, collect
from storage.condemned import MAX_AGE_S
from storage.crypto import Cipher
from storage.errors import Busy, CorruptData, Fenced, StoreUnavailable
from storage.lease import LEASE_S
from storage.spec import canonical_json
from storage.store import CacheStore
from tests.sim_store import Actor, Baton, Disk, sim_store
from tests.store_contract import AGENT, ALICE, BOB, KEY, flip, template

GRACE = CollectOptions.grace_s
DAY = 86400.0


def raw_block(number: int) -> bytes:
    """A small file in a block's format."""
    return cache_file.save({"x": np.array([number], np.uint32)}, {"id": block_id(number)})


def block_id(number: int) -> str:
    return f"{number:02x}" * 32


def put(store: CacheStore, number: int, part: str = "full") -> BlockRef:
    stored = store.put_block("acme", block_id(number), part, raw_block(number))
    return BlockRef(block_id(number), 16, {part: stored})


def with_blocks(card: CacheCard, *refs: BlockRef) -> CacheCard:
    """The owner's next generation, with these blocks."""
    branch = BranchCard(id=0, tokens=tuple(range(16 * len(refs))), blocks=refs)
    return replace(card, generation=card.generation + 1, branches=(branch,))


def card_file(card: CacheCard) -> str:
    return f"sim/agents/acme/{card.agent.digest(KEY.digest)}/{card.name}"


# ---- the property


GRACE_S = 600.0  # in the simulation
SLOW_S = 120.0  # the longest operation of a writer, and the longest wait for one remove or create
LAG_S = 30.0  # of listings
N_BLOCKS = 12
AGENTS = [AgentId("acme", f"s{n}") for n in range(3)]
OPTIONS = CollectOptions(grace_s=GRACE_S, tombstone_keep_s=4000, corrupt_keep_s=4000)


class World:
    """Two writers, two collectors, one disk; `run` asserts after every step."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.disk = Disk()
        self.baton = Baton(self.disk)
        self.writers: set[Actor] = set()
        self.reports: list[CollectReport] = []
        self.commits = self.unavailable = 0
        self._cards: dict[str, CacheCard] = {}
        for name in ("alice", "bob"):
            self.writers.add(self.baton.spawn(name, self.write))
        for name in ("carol", "dave"):
            self.baton.spawn(name, self.collect)

    def run(self, steps: int) -> None:
        try:
            while steps > 0:
                actor = self.rng.choice(self.baton.actors)
                collects = actor not in self.writers
                bursts = (1, 1, 4, 60) if self.seed % 2 or not collects else (1, 2)
                for _ in range(self.rng.choice(bursts)):  # the others stand still
                    self.baton.resume(actor)
                    self.check()
                    steps -= 1
                self.pass_time()
        finally:
            self.baton.stop()

    def pass_time(self) -> None:
        """Mostly little, sometimes much; never so much that an operation lasts beyond SLOW_S."""
        started = [a.busy_since for a in self.baton.actors if a.busy_since is not None]
        writes = ("remove", "create")
        started += [a.since for a in self.baton.actors if a.waiting_for in writes]
        most = min([t + SLOW_S - self.disk.clock for t in started], default=1e9)
        wish = self.rng.choices((1.0, 60.0, 700.0), (60, 25, 15))[0] * self.rng.random()
        self.disk.clock += max(0.0, min(wish, most))

    def check(self) -> None:
        """Every newest card's blocks are there."""
        newest: dict[str, tuple[tuple[int, int], str]] = {}
        for path in self.disk.files:
            folder, _, name = path.rpartition("/")
            parsed = parse_name(name) if "/agents/" in folder else None
            if parsed and parsed > newest.get(folder, ((0, -1), ""))[0]:
                newest[folder] = (parsed, path)
        for _, path in newest.values():
            if path not in self._cards:
                self._cards[path] = decode_card(self.disk.files[path][0], path)
            for name in card_block_names(self._cards[path]):
                found = f"sim/blocks/acme/{name[:3]}/{name}" in self.disk.files
                assert found, f"lost: {path} names {name}"

    # ---- actors

    def store(self, actor: Actor, *, lags_everywhere: bool) -> CacheStore:
        def lag(folder: str) -> float:
            stale = "/condemned" in folder or (lags_everywhere and "/lease" not in folder)
            return self.rng.choice((0.0, self.rng.random() * LAG_S)) if stale else 0.0

        return sim_store(self.disk, lambda op, path: self.baton.step(actor, op), lag)

    def collect(self, actor: Actor) -> None:
        store = self.store(actor, lags_everywhere=True)
        while True:
            with contextlib.suppress(Busy, StoreUnavailable):
                self.reports.append(collect(store, OPTIONS, clock=lambda: self.disk.clock))
            for _ in range(self.rng.randrange(20)):
                self.baton.step(actor, "rest")

    def write(self, actor: Actor) -> None:
        """Puts, commits of blocks put at any time before, drops, claims and deletes."""
        store = self.store(actor, lags_everywhere=False)
        owned: dict[AgentId, CacheCard] = {}
        held: dict[int, BlockRef] = {}  # in RAM, however old
        while True:
            agent = self.rng.choice(AGENTS)
            action = self.rng.choices(
                ("put", "commit", "drop", "claim", "delete"), (6, 8, 8, 2, 1)
            )[0]
            actor.busy_since = self.disk.clock
            try:
                if action == "put":
                    number = self.rng.randrange(N_BLOCKS)
                    held[number] = put(store, number)
                elif action == "delete":
                    owned.pop(agent, None)
                    store.delete(template(ALICE, agent))
                elif action == "claim" or agent not in owned:
                    owned[agent] = store.claim(template(ALICE, agent)).card
                else:
                    self._commit(
                        store, owned, agent, [] if action == "drop" else list(held.values())
                    )
            except Fenced:
                owned.pop(agent, None)
            except StoreUnavailable:  # one lagging listing after the other
                self.unavailable += 1
            actor.busy_since = None
            for _ in range(self.rng.choice((0, 1, 10))):
                self.baton.step(actor, "rest")

    def _commit(
        self,
        store: CacheStore,
        owned: dict[AgentId, CacheCard],
        agent: AgentId,
        held: list[BlockRef],
    ) -> None:
        refs = self.rng.sample(held, self.rng.randint(0, len(held)))
        owned[agent] = store.commit(with_blocks(owned[agent], *refs)).card
        self.commits += 1


@pytest.mark.slow
def test_no_interleaving_takes_a_block_from_a_newest_card():
    """Seeded schedules of two writers and two collectors, whose steps are single file operations
    and whose listings lag; after every step every newest card's blocks exist."""
    worlds = []
    for seed in range(20):
        world = World(seed)
        world.run(8000)
        worlds.append(world)
    reports = [report for world in worlds for report in world.reports]
    assert sum(report.deleted for report in reports) > 200  # it was about something
    assert sum(report.spared for report in reports) > 0
    assert sum(world.commits for world in worlds) > 2000
    assert sum(world.unavailable for world in worlds) < 100
    skipped = [why for report in reports for why in report.skipped.values()]
    assert len(skipped) < len(reports) / 10
    assert all("keep changing" in why for why in skipped)  # one lagging listing after the other


# ---- what is deleted, and when


class Clockwork:
    """One store on a disk whose clock the test moves, and a collector's store beside it."""

    def __init__(self, **options) -> None:
        self.disk = Disk()
        self.faults: list[Exception] = []
        self.store = sim_store(self.disk, on_fault=self.faults.append, **options)
        self.other = sim_store(self.disk, **options)

    def collect(self, **options) -> CollectReport:
        return collect(self.other, CollectOptions(**options), clock=lambda: self.disk.clock)

    def wait(self, seconds: float) -> None:
        self.disk.clock += seconds

    def blocks(self) -> list[str]:
        return sorted(path for path in self.disk.files if path.startswith("sim/blocks/"))

    def commit(self, owner, *refs: BlockRef, agent: AgentId = AGENT) -> CacheCard:
        claimed = self.store.claim(template(owner, agent)).card
        return self.store.commit(with_blocks(claimed, *refs)).card


@pytest.fixture
def world():
    return Clockwork()


def test_an_orphan_is_condemned_first_and_deleted_a_grace_later(world):
    kept, orphan = put(world.store, 1), put(world.store, 2)
    world.commit(ALICE, kept)
    assert (world.collect().condemned, world.collect().deleted) == (0, 0)  # too young
    world.wait(GRACE + 1)
    report = world.collect()
    assert (report.condemned, report.deleted, report.due_s) == (1, 0, GRACE)
    assert report.condemned_bytes == orphan.size
    world.wait(GRACE - 1)
    report = world.collect()
    assert (report.condemned, report.deleted, report.due_s) == (0, 0, 1)
    assert len(world.blocks()) == 2
    world.wait(1)
    report = world.collect()
    assert (report.deleted, report.deleted_bytes, report.due_s) == (1, orphan.size, 0)
    assert world.blocks() == [world.store.block_path("acme", kept, "full")]
    assert world.store.get_block("acme", orphan, "full") is None


def test_every_card_that_is_present_keeps_its_blocks(world):
    """Older generations and epochs, too: a reader may be about to fall back on them."""
    first, second = put(world.store, 1), put(world.store, 2)
    card = world.commit(ALICE, first)
    card = world.store.commit(with_blocks(card, second)).card
    world.wait(GRACE + 1)
    assert world.collect().condemned == 0  # the generation before names the first
    third = put(world.store, 3)
    world.store.commit(with_blocks(card, third))
    assert world.collect().condemned == 1
    world.wait(GRACE)
    assert world.collect().deleted == 1
    assert world.store.get_block("acme", first, "full") is None
    assert world.store.get_block("acme", second, "full") == raw_block(2)
    assert world.store.get_block("acme", third, "full") == raw_block(3)


def test_the_second_look_spares_what_was_named_meanwhile(world):
    """A writer that checked before the list was published may commit after the first look."""
    ref = put(world.store, 1)
    claimed = world.store.claim(template(ALICE)).card
    world.wait(GRACE + 1)
    card = with_blocks(claimed, ref)
    world.collect()
    path = card_file(card)
    world.disk.add(path, encode_card(card))
    world.wait(GRACE)
    report = world.collect()
    assert (report.deleted, report.spared) == (0, 1)
    assert world.store.get_block("acme", ref, "full") == raw_block(1)


def test_a_condemned_block_is_not_adopted_but_stored_anew(world):
    old = put(world.store, 1)
    world.wait(GRACE + 1)
    world.collect()
    world.wait(MAX_AGE_S + 1)
    assert world.store.find_block("acme", old.id, "full") is None
    new = put(world.store, 1)
    assert new != old
    assert new.id == old.id
    assert world.store.find_block("acme", old.id, "full") == new.parts["full"]
    raw = world.store.get_block("acme", new, "full")
    assert cache_file.load(raw, "new")[0]["x"] == [1]
    assert put(world.store, 1) == new  # the sound variant that is not condemned
    world.commit(ALICE, new)
    world.wait(GRACE)
    assert world.collect().deleted == 1
    assert world.store.get_block("acme", old, "full") is None
    assert world.store.get_block("acme", new, "full") == raw


def test_a_deleted_name_is_not_free_at_once(world):
    """A collector that was slow may still delete by that name."""
    old = put(world.store, 1)
    world.wait(GRACE + 1)
    world.collect()
    world.wait(GRACE)
    assert world.collect().deleted == 1
    world.wait(MAX_AGE_S + 1)
    assert put(world.store, 1) != old
    world.wait(GRACE)
    world.collect()
    world.wait(MAX_AGE_S + 1)
    assert (
        world.store.condemned.names("acme") & {block_name(old.id, "full", old.parts["full"].sha256)}
        == set()
    )


def test_a_commit_stores_a_condemned_block_anew(world):
    """Put, then nothing for a long time, condemned, and only then named."""
    old = put(world.store, 1)
    card = world.store.claim(template(ALICE)).card
    world.wait(GRACE + 1)
    world.collect()
    world.wait(MAX_AGE_S + 1)
    card = world.store.commit(with_blocks(card, old)).card
    (new,) = card.branches[0].blocks
    assert new.parts != old.parts
    world.wait(GRACE)
    assert world.collect().deleted == 1
    assert world.store.get_block("acme", new, "full") is not None


def test_a_commit_ends_a_branch_before_a_block_that_is_gone(world):
    first, second, third = (put(world.store, n) for n in (1, 2, 3))
    card = world.commit(ALICE, first)
    world.disk.remove(world.store.block_path("acme", second, "full"))
    world.wait(WRITER_WINDOW_S + 1)
    card = world.store.commit(with_blocks(card, first, second, third)).card
    assert card.branches[0].blocks == (first,)
    assert len(card.branches[0].tokens) == 48
    assert [type(fault) for fault in world.faults] == [CorruptData]
    assert "missing" in str(world.faults[0])


def test_a_claim_inherits_no_condemned_block(world):
    """The owner's card that is inherited may be gone before the second look."""
    ref = put(world.store, 1)
    card = world.store.claim(template(ALICE)).card
    world.wait(GRACE + 1)
    world.collect()
    world.disk.add(  # checked before the list was published
        card_file(with_blocks(card)),
        encode_card(with_blocks(card, ref)),
    )
    world.wait(MAX_AGE_S + 1)
    (inherited,) = world.other.claim(template(BOB)).card.branches[0].blocks
    assert inherited.id == ref.id
    assert inherited.parts != ref.parts


def test_a_slow_commit_is_looked_at_again(world):
    """A create that outlasted the window may name what was deleted meanwhile; the next one not."""
    ref = put(world.store, 1)
    card = world.store.claim(template(ALICE)).card
    create = world.store.files.create

    def slow(path, raw):
        if "/agents/" in path:
            world.wait(2 * GRACE)
            world.disk.remove(world.store.block_path("acme", ref, "full"))
        create(path, raw)

    world.store.files.create = slow
    card = world.store.commit(with_blocks(card, ref)).card
    assert card.branches[0].blocks == (ref,)
    world.store.files.create = create
    assert world.store.commit(replace(card, generation=2)).card.branches[0].blocks == ()


# ---- one at a time


def test_one_collector_at_a_time(world):
    def during(operation: str, path: str) -> None:
        if "/agents" in path:
            with pytest.raises(Busy, match="another collector"):
                world.collect()
            seen.append(path)

    seen: list[str] = []
    put(world.store, 1)
    collect(sim_store(world.disk, during), clock=lambda: world.disk.clock)
    assert seen
    world.collect()  # released
    assert not [path for path in world.disk.files if "/lease/" in path]


def test_a_crashed_collectors_lease_is_taken_over(world):
    def die(operation: str, path: str) -> None:
        if path.startswith("sim/blocks"):
            raise MemoryError

    put(world.store, 1)
    dead = sim_store(world.disk, die)
    dead.files.remove = lambda path: None
    with pytest.raises(MemoryError):
        collect(dead, clock=lambda: world.disk.clock)
    with pytest.raises(Busy):
        world.collect()
    world.wait(LEASE_S)
    world.collect()


def test_a_collector_that_wakes_up_late_deletes_nothing(world):
    """It sleeps between its second look and the first delete; another has taken the lease."""
    for number in range(3):
        put(world.store, number)
    world.wait(GRACE + 1)
    world.collect()
    world.wait(GRACE)
    slept = []

    def sleep(operation: str, path: str) -> None:
        if operation == "remove" and path.startswith("sim/blocks") and not slept:
            slept.append(path)
            world.wait(2 * LEASE_S)
            assert world.collect().deleted == 3
            world.disk.add(path, b"somebody put it again")

    late = sim_store(world.disk, sleep)
    with pytest.raises(Busy, match="lease was lost"):
        collect(late, clock=lambda: world.disk.clock)
    assert world.blocks() == []  # the one it was about to delete, and no other


def test_wait_stays_until_it_is_due(world):
    put(world.store, 1)
    world.wait(GRACE + 1)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        world.wait(seconds)

    report = collect(
        world.other, CollectOptions(wait=True), clock=lambda: world.disk.clock, sleep=sleep
    )
    assert (report.condemned, report.deleted, report.due_s) == (1, 1, 0)
    assert sum(slept) == pytest.approx(GRACE)
    assert world.blocks() == []


def test_a_dry_run_changes_nothing(world):
    put(world.store, 1)
    world.wait(GRACE + 1)
    world.collect()
    put(world.store, 2)
    world.wait(GRACE + 1)
    before = dict(world.disk.files)
    report = world.collect(dry_run=True)
    assert (report.deleted, report.condemned) == (1, 1)
    assert world.disk.files == before


def test_a_grace_that_is_too_short_for_writers_is_refused():
    with pytest.raises(ValueError, match="grace"):
        CollectOptions(grace_s=2 * WRITER_WINDOW_S - 1)


# ---- tenants that cannot be read


def other_schema(raw: bytes) -> bytes:
    tensors, metadata = cache_file.load(raw, "card")
    return cache_file.save(tensors, metadata | {"schema": "kvferry.card.v9"})


@pytest.mark.parametrize("why", ["schema", "signed", "encrypted", "unavailable"])
def test_a_tenant_with_a_card_that_others_may_read_is_skipped(world, why):
    put(world.store, 1)
    (kept,) = world.blocks()
    world.store.put_block("other", block_id(2), "full", raw_block(2))
    writer = world.store
    if why == "signed":
        writer = sim_store(world.disk, signing_key=b"k" * 16)
    if why == "encrypted":
        writer = sim_store(world.disk, cipher=Cipher({"*": [b"k" * 32]}))
    card = writer.claim(template(ALICE)).card
    path = card_file(card)
    if why == "schema":
        world.disk.files[path] = (other_schema(world.disk.files[path][0]), world.disk.clock)
    if why == "unavailable":
        read = world.other.files.read

        def refuse(name):
            if name == path:
                raise StoreUnavailable("sim", "timeout")
            return read(name)

        world.other.files.read = refuse
    for _ in range(3):
        world.wait(GRACE + 1)
        assert list(world.collect().skipped) == ["acme"]
    assert world.blocks() == [kept]  # the other tenant's is gone


def test_a_damaged_card_keeps_nothing_and_stops_nobody(world):
    card = world.commit(ALICE, put(world.store, 1))
    for generation in (0, 1):
        path = card_file(replace(card, generation=generation))
        world.disk.files[path] = (flip(world.disk.files[path][0], -1), world.disk.clock)
    world.wait(GRACE + 1)
    report = world.collect()
    assert (report.condemned, report.skipped) == (1, {})


def test_a_damaged_list_condemns_nothing(world):
    ref = put(world.store, 1)
    world.wait(GRACE + 1)
    world.collect()
    (path,) = [path for path in world.disk.files if "/condemned/" in path]
    world.disk.files[path] = (flip(world.disk.files[path][0], 40), world.disk.clock)
    world.wait(MAX_AGE_S + 1)
    with pytest.raises(StoreUnavailable, match="list of condemned blocks"):
        put(world.store, 1)
    world.wait(GRACE)
    report = collect(sim_store(world.disk), clock=lambda: world.disk.clock)
    assert (report.deleted, report.condemned) == (0, 1)
    assert f"{path}.corrupt" in world.disk.files
    assert world.store.get_block("acme", ref, "full") is not None


def test_lists_are_sealed(world):
    world.store.condemned.publish("acme", "condemned", {"x": 1})
    (path,) = world.disk.files
    assert world.disk.files[path][0] == canonical_json(
        {
            "schema": "kvferry.condemned.v1",
            "kind": "condemned",
            "names": {"x": 1},
            "sha256": cache_file.sha256(
                b'{"kind":"condemned","names":{"x":1},"schema":"kvferry.condemned.v1"}'
            ),
        }
    )


# ---- what else is left behind


def test_old_leftovers_go(world):
    folder = f"sim/agents/acme/{AGENT.digest(KEY.digest)}"
    world.commit(ALICE)
    left = (f"{folder}/.1.tmp", "sim/blocks/acme/010/.2.tmp", "sim/probe/ab")
    for path in (*left, f"{folder}/x.corrupt", f"{folder}/notes.txt"):
        world.disk.add(path, b"?")
    assert world.collect().leftovers == 0
    world.wait(GRACE + 1)
    assert world.collect().leftovers == 3
    assert not set(left) & set(world.disk.files)
    world.wait(7 * DAY)
    assert world.collect().leftovers == 1
    assert f"{folder}/notes.txt" in world.disk.files


def cards_of(world: Clockwork) -> list[str]:
    return sorted(path.rsplit("/", 1)[1][:17] for path in world.disk.files if "/agents/" in path)


def test_cards_of_epochs_that_are_over_go(world):
    world.commit(ALICE, put(world.store, 1))
    world.wait(GRACE + 1)
    world.store.claim(template(BOB))
    assert world.collect().stale_cards == 0  # the claim is young
    world.wait(GRACE + 1)
    assert world.collect().stale_cards == 2
    assert cards_of(world) == ["00000002-00000000"]


def test_cards_stay_below_an_epoch_of_which_nothing_can_be_read(world):
    world.commit(ALICE)
    card = world.store.claim(template(BOB)).card
    path = card_file(card)
    world.disk.files[path] = (b"torn", world.disk.clock)
    world.wait(40 * DAY)
    assert world.collect().stale_cards == 0
    assert len(cards_of(world)) == 3


def test_a_tombstone_goes_when_no_writer_can_come_back(world):
    card = world.commit(ALICE, put(world.store, 1))
    world.store.delete(template(BOB))
    late = with_blocks(card)  # a zombie's write that came after the delete
    world.disk.add(card_file(late), encode_card(late))
    world.wait(30 * DAY + 1)
    report = world.collect()
    assert (report.stale_cards, report.tombstones) == (1, 0)
    assert cards_of(world) == ["00000002-00000000"]
    assert world.collect().tombstones == 1
    assert cards_of(world) == []
    with pytest.raises(Fenced):  # even then
        world.store.commit(late)


def test_nothing_of_a_store_without_agents(world):
    assert world.collect() == CollectReport()
