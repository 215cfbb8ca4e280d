"""Write-behind: the node's disk first, the store follows; nothing names what is not there."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.branches import durable_rows
from actors.engines.fake_engine import FakeEngine
from actors.loop import LoopConfig, ReplicaLoop
from actors.turn import TurnFinished
from storage.backends import LocalBackend
from storage.card import CacheCard
from storage.errors import StoreUnavailable
from storage.files import Files
from storage.store import CacheStore
from tests.loops import (
    agent_id,
    assistant,
    evict,
    make_loop,
    memory_of,
    run,
    settle,
    start,
    talk,
    user,
)

MakeLoop = Callable[..., ReplicaLoop]
LONG = "Tell me about the sea, the wind and the old harbour of the town. " * 10  # 650 tokens


class Shared:
    """A shared store that can be slow, or gone."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.down, self.delay = folder, threading.Event(), 0.0
        self.full = threading.Event()  # the nodes' own disks
        create = Files.create

        def guarded(files: Files, path: str, raw: bytes) -> None:
            if str(path).startswith(str(folder)):
                time.sleep(self.delay)
                if self.down.is_set():
                    raise OSError("the shared store is gone")
            elif self.full.is_set():
                raise OSError(28, "no space left")
            create(files, path, raw)

        monkeypatch.setattr(Files, "create", guarded)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    monkeypatch.setattr("actors.replicator._FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr("actors.replicator._LONGEST_PAUSE_S", 0.1)
    return Shared(tmp_path / "shared", monkeypatch)


@pytest.fixture
def node(tmp_path: Path, shared: Shared) -> Iterator[MakeLoop]:
    """Replicas by node name, each with a disk of its own."""
    loops: list[ReplicaLoop] = []

    def make(name: str = "n0", **options: object) -> ReplicaLoop:
        made = make_loop(
            FakeEngine(4), shared.folder, node=name, local=tmp_path / name, codec="q4", **options
        )  # type: ignore[arg-type]
        loops.append(made)
        return made

    yield make
    for made in loops:
        if made.alive:
            made.close(5.0)


def crash(loop: ReplicaLoop) -> None:
    """The replica ends without storing anything more."""

    def dead(snapshot: object) -> None:
        raise StoreUnavailable("dead", "dead")

    assert loop.memory.commits.replicator is not None
    loop.memory.commits.replicator._replicate = dead  # type: ignore[assignment]
    loop._stopping = True
    loop._wake.set()
    loop._thread.join(5)
    loop.memory.persister.close(5)
    loop.memory.commits.replicator.close(5)


def missing(folder: Path, card: CacheCard) -> list[str]:
    """Blocks that a store's card names and the store lacks."""
    store = CacheStore(str(folder))
    return [
        ref.id
        for branch in card.branches
        for ref in (*branch.blocks, *branch.tail)
        for part in ref.parts
        if store.get_block(card.agent.tenant, ref, part) is None
    ]


def card_in(folder: Path, loop: ReplicaLoop) -> CacheCard | None:
    found = CacheStore(str(folder)).latest(agent_id(), loop.memory.key)
    return found.card if found else None


def test_when_the_shared_store_has_caught_up_the_local_card_goes(
    node: MakeLoop, shared: Shared, tmp_path: Path
) -> None:
    loop, messages = node(), []
    for question in (LONG, "And the ships?", LONG):
        talk(loop, messages, question)
        settle(loop)
        card = card_in(shared.folder, loop)
        assert card is not None
        assert card.branches[0].rows == memory_of(loop).branches[0].rows > 0
        assert missing(shared.folder, card) == []
        assert card_in(tmp_path / "n0", loop) is None
    local = loop.memory.tiers.local
    assert local is not None
    assert local.used_bytes > 0
    assert local.pinned_bytes == 0
    assert not loop.memory.faults


def test_an_agent_is_reported_again_when_the_shared_store_has_caught_up(
    node: MakeLoop, shared: Shared
) -> None:
    loop, messages = node(), []
    talk(loop, messages, LONG)
    settle(loop)
    shared.down.set()
    talk(loop, messages, "And the ships?")
    loop.memory.persister.flush().result(10)
    before = time.time()
    shared.down.clear()
    settle(loop)
    assert memory_of(loop).changed >= before


def test_a_local_card_may_be_ahead_and_no_card_names_what_its_store_lacks(
    node: MakeLoop, shared: Shared, tmp_path: Path
) -> None:
    loop, messages = node(), []
    first = talk(loop, messages, LONG)
    settle(loop)
    shared.down.set()
    second = talk(loop, messages, "And the ships?" + LONG)
    settle(loop)
    ahead, behind = card_in(tmp_path / "n0", loop), card_in(shared.folder, loop)
    assert ahead is not None
    assert behind is not None
    assert ahead.branches[0].rows > behind.branches[0].rows == len(first.prompt) + 19
    assert missing(tmp_path / "n0", ahead) == missing(shared.folder, behind) == []
    # The owner dies with its disk: another node has the shared card, and prefills the rest.
    shared.down.clear()
    asked = [*messages, user("And then?")]
    elsewhere = run(make_loop(FakeEngine(4), shared.folder, node="n1", codec="q4"), asked)
    assert elsewhere.cached == behind.branches[0].rows
    assert elsewhere.cached < len(second.prompt)
    # What the old owner still has is never read again: it is fenced, and lets go.
    deadline = time.monotonic() + 10
    while card_in(tmp_path / "n0", loop) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert loop.memory.get(agent_id()) is None
    assert loop.memory.faults["fenced"] == 1
    assert card_in(tmp_path / "n0", loop) is None
    now = card_in(shared.folder, loop)
    assert now is not None
    assert now.owner.node == "n1"


@pytest.mark.parametrize("recovers", ["at start", "at the next turn"])
def test_a_restarted_node_brings_what_the_shared_store_lacks(
    node: MakeLoop, shared: Shared, recovers: str
) -> None:
    loop, messages = node(), []
    talk(loop, messages, LONG)
    settle(loop)
    shared.down.set()
    talk(loop, messages, "And the ships?" + LONG)
    settle(loop)
    rows = memory_of(loop).branches[0].rows
    loop.close(5.0)
    shared.down.clear()
    loop = node()
    if recovers == "at start":
        loop.memory.recover()
    else:
        answer = run(loop, [*messages, user("And then?")], n=1)
        assert answer.cached == rows
        assert answer.cache == "warm"
    settle(loop)
    card = card_in(shared.folder, loop)
    assert card is not None
    assert card.branches[0].rows >= rows
    assert missing(shared.folder, card) == []
    assert not loop.memory.faults


def test_a_node_that_lost_the_agent_meanwhile_does_not_take_it_back(
    node: MakeLoop, shared: Shared, tmp_path: Path
) -> None:
    loop, messages = node(), []
    talk(loop, messages, LONG)
    settle(loop)
    shared.down.set()
    talk(loop, messages, "And the ships?")
    settle(loop)
    loop.close(1.0)
    shared.down.clear()
    other = node("n1")
    run(other, [*messages, user("And then?")])
    settle(other)
    owned = card_in(shared.folder, other)
    again = node()
    again.memory.recover()
    assert again.memory.get(agent_id()) is None
    assert card_in(tmp_path / "n0", again) is None
    assert card_in(shared.folder, other) == owned


def test_an_answer_does_not_wait_for_the_store(node: MakeLoop, shared: Shared) -> None:
    loop, messages = node(), []
    talk(loop, messages, LONG)
    settle(loop)
    shared.delay = 3.0
    began = time.monotonic()
    talk(loop, messages, "And the ships?")
    assert time.monotonic() - began < 3.0
    assert loop.memory.commits.replicator is not None
    shared.delay = 0.0
    settle(loop)


@pytest.mark.parametrize("down", [False, True])
def test_a_sync_turn_ends_when_its_memory_is_stored(
    node: MakeLoop, shared: Shared, down: bool
) -> None:
    loop = node(loop=LoopConfig(sync=True))
    run(loop, [user("Hello")])
    if down:
        shared.down.set()
    else:
        shared.delay = 0.3
    began = time.monotonic()
    answer = run(loop, [user("Hello"), assistant("x"), user("And the ships?")])
    assert isinstance(answer.last, TurnFinished)
    card = card_in(shared.folder, loop)
    assert card is not None
    if down:  # the store is gone: the answer still comes, and the fault is counted
        assert loop.memory.faults["store_unavailable"] > 0
    else:
        assert time.monotonic() - began > 0.3
        assert card.branches[-1].rows == memory_of(loop).branches[-1].rows


def test_rows_the_disk_has_no_room_for_go_to_the_shared_store(
    node: MakeLoop, shared: Shared
) -> None:
    loop, messages = node(local_bytes=1000), []
    talk(loop, messages, LONG)
    settle(loop)
    local = loop.memory.tiers.local
    assert local is not None
    assert (local.used_bytes, local.writes) == (0, False)
    card = card_in(shared.folder, loop)
    assert card is not None
    assert card.branches[0].rows == memory_of(loop).branches[0].rows
    evict(loop, pool=True)
    assert talk(loop, messages, "And the ships?").cached == card.branches[0].rows


def test_a_damaged_local_file_is_read_from_the_shared_store(node: MakeLoop, tmp_path: Path) -> None:
    loop, messages = node(), []
    talk(loop, messages, LONG)
    settle(loop)
    rows = memory_of(loop).branches[0].rows
    for path in (tmp_path / "n0" / "blocks").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    evict(loop, pool=True)
    assert talk(loop, messages, "And the ships?").cached == rows
    assert loop.memory.faults["corrupt"] > 0
    settle(loop)


def test_a_prefetched_agent_is_in_ram_and_on_disk_before_it_is_owned(
    node: MakeLoop, shared: Shared, tmp_path: Path
) -> None:
    source, messages = node(), []
    talk(source, messages, LONG)
    settle(source)
    target = node("n1")
    rows = target.preloader.fetch(agent_id()).held.rows
    assert rows == memory_of(source).branches[0].rows
    assert target.memory.get(agent_id()) is None
    target.call(target.residency.evict_idle).result(10)
    target.memory.adopt(agent_id())
    shutil.rmtree(shared.folder / "blocks")
    answer = run(target, [*messages, user("And then?")])
    assert (answer.cached, answer.cache) == (rows, "hot")
    assert target.preloader.fetch(agent_id("unknown")).held.rows == 0


def test_a_frozen_agent_is_in_the_shared_store(node: MakeLoop, shared: Shared) -> None:
    loop = node()
    stream = start(loop, [user(LONG)], n=400)
    stream.take(8)
    shared.delay = 0.05
    loop.call(lambda: loop.handoff.freeze(agent_id())).result(10)[1].result(10)
    card = card_in(shared.folder, loop)
    assert card is not None
    assert card.branches[0].rows == memory_of(loop).branches[0].rows
    assert card.branches[0].rows >= len(stream.answer.prompt) + 7
    loop.call(lambda: loop.handoff.release(agent_id())).result(10)
    stream.result()


def test_an_agent_taken_over_is_ahead_here_with_all_its_rows(
    node: MakeLoop, shared: Shared
) -> None:
    """Its older rows were never written to this disk: the shared store has them."""
    source, messages = node(), []
    talk(source, messages, LONG)
    settle(source)
    source.close(5.0)
    target = node("n1")
    shared.down.set()
    memory = target.memory
    shared.down.clear()
    memory.adopt(agent_id())
    shared.down.set()
    talk(target, messages, LONG)
    settle(target)
    rows = memory_of(target).branches[0].rows
    crash(target)
    shared.down.clear()
    again = node("n1")
    again.memory.recover()
    settle(again)
    card = card_in(shared.folder, again)
    assert card is not None
    assert card.branches[0].rows == rows
    assert missing(shared.folder, card) == []


def test_an_older_local_card_does_not_win(node: MakeLoop, shared: Shared, tmp_path: Path) -> None:
    """The disk was full when the shared store took a newer one."""
    loop, messages = node(), []
    talk(loop, messages, "Hello")
    settle(loop)
    shared.down.set()
    talk(loop, messages, LONG)
    settle(loop)
    shared.full.set()
    talk(loop, messages, LONG)
    settle(loop)
    shared.down.clear()
    loop.memory.commits.later(memory_of(loop))
    settle(loop)
    rows = memory_of(loop).branches[0].rows
    shared.full.clear()
    crash(loop)
    again = node()
    again.memory.recover()
    settle(again)
    card = card_in(shared.folder, again)
    assert card is not None
    assert card.branches[0].rows == rows


def test_a_thawed_agent_is_still_ours_and_catches_up(node: MakeLoop, shared: Shared) -> None:
    loop, messages = node(), []
    talk(loop, messages, LONG)
    settle(loop)
    shared.down.set()
    talk(loop, messages, LONG)
    settle(loop)
    loop.call(lambda: loop.handoff.freeze(agent_id())).result(10)[1].result(10)
    assert not loop.memory.is_stored(agent_id())
    shared.down.clear()
    loop.call(lambda: loop.handoff.thaw(agent_id())).result(10)
    loop.memory.persister.flush().result(10)
    answer = talk(loop, messages, "And the ships?")
    assert isinstance(answer.last, TurnFinished)
    settle(loop)
    card = card_in(shared.folder, loop)
    assert card is not None
    assert card.epoch == 2
    assert card.branches[0].rows == memory_of(loop).branches[0].rows
    assert loop.memory.is_stored(agent_id())


def test_a_local_card_half_written_does_not_fence_its_owner(
    node: MakeLoop, shared: Shared, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loop, messages = node(), []
    talk(loop, messages, "Hello")
    settle(loop)
    shared.down.set()
    talk(loop, messages, LONG)
    settle(loop)
    remove, failed = Files.remove, []

    def once(files: Files, path: str) -> None:
        if str(path).startswith(str(tmp_path / "n0")) and not failed:
            failed.append(path)
            raise StoreUnavailable(path, "EIO")
        remove(files, path)

    monkeypatch.setattr(Files, "remove", once)
    for question in ("And the ships?", "And then?"):
        talk(loop, messages, question)
        settle(loop)
    assert failed
    assert loop.memory.get(agent_id()) is not None
    shared.down.clear()
    settle(loop)
    card = card_in(shared.folder, loop)
    assert card is not None
    assert card.branches[0].rows == memory_of(loop).branches[0].rows


@pytest.mark.parametrize("when", ["after its claim", "with no store mounted"])
def test_a_node_that_dies_while_it_recovers_recovers_later(
    node: MakeLoop, shared: Shared, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, messages = node(), []
    talk(loop, messages, LONG)
    settle(loop)
    shared.down.set()
    talk(loop, messages, LONG)
    settle(loop)
    rows = memory_of(loop).branches[0].rows
    crash(loop)
    if when == "after its claim":
        shared.down.clear()
        dying = node()
        local = dying.memory.tiers.local
        assert local is not None
        monkeypatch.setattr(local, "write_card", lambda card: None)
        monkeypatch.setattr(dying.memory.commits, "later", lambda memory: None)
        dying.memory.recover()
        crash(dying)
    else:
        shared.folder.rename(tmp_path / "away")
        dying = node()
        dying.memory.recover()
        crash(dying)
        shutil.rmtree(shared.folder, ignore_errors=True)
        (tmp_path / "away").rename(shared.folder)
        shared.down.clear()
    last = node()
    last.memory.recover()
    settle(last)
    card = card_in(shared.folder, last)
    assert card is not None
    assert card.branches[0].rows == rows


def test_a_read_that_fails_deletes_nothing(
    node: MakeLoop, shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, messages = node(), []
    shared.delay = 0.0
    talk(loop, messages, LONG)
    settle(loop)
    evict(loop, pool=True)
    before = sorted((tmp_path / "n0").rglob("*.full.*"))
    read = LocalBackend.read

    def fails(backend: LocalBackend, path: str, start: int, stop: int | None) -> bytes:
        if "/n0/blocks/" in path:
            raise OSError(24, "too many open files")
        return read(backend, path, start, stop)

    monkeypatch.setattr(LocalBackend, "read", fails)
    assert talk(loop, messages, "And the ships?").cached > 600  # from the shared store
    monkeypatch.undo()
    assert set(before) <= set((tmp_path / "n0").rglob("*.full.*"))


def test_rows_that_were_lost_before_they_were_stored_are_exported_again(
    node: MakeLoop, shared: Shared
) -> None:
    loop, messages = node(local_bytes=1), []
    talk(loop, messages, LONG)
    settle(loop)
    shared.down.set()
    talk(loop, messages, LONG)
    settle(loop)
    loop.memory.tiers.pool.evict_all()
    shared.down.clear()
    for question in ("And the ships?", "And then?"):
        talk(loop, messages, question)
        settle(loop)
    card = card_in(shared.folder, loop)
    assert card is not None
    assert card.branches[0].rows == memory_of(loop).branches[0].rows > 1300


def test_a_commit_that_is_told_late_does_not_hide_a_newer_claim(
    node: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a frozen owner hands over as the shared store's last card is never one that it has
    itself claimed over."""
    loop, messages = node(), []
    talk(loop, messages, "Hello")
    settle(loop)
    memory, commit = memory_of(loop), CacheStore.commit

    def and_claimed(store: CacheStore, card: CacheCard) -> object:
        committed = commit(store, card)
        loop.memory.reclaim(memory)
        return committed

    monkeypatch.setattr(CacheStore, "commit", and_claimed)
    loop.memory.commits.later(memory)
    settle(loop)
    monkeypatch.undo()
    assert memory.card is not None
    assert memory.shared is not None
    assert memory.shared.ref.epoch == memory.card.epoch == 2


def test_an_agent_released_during_a_commit_leaves_nothing_behind(
    node: MakeLoop, shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, messages = node(), []
    talk(loop, messages, "Hello")
    settle(loop)
    memory, store_again = memory_of(loop), loop.memory.rows.store_again

    def and_released(held: object, branch: object) -> None:
        loop.memory.forget(memory)
        store_again(held, branch)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.memory.rows, "store_again", and_released)
    loop.memory.commits.later(memory)
    settle(loop)
    assert loop.memory.commits.replicator is not None
    assert loop.memory.commits.replicator.pending == 0
    assert card_in(tmp_path / "n0", loop) is None


def test_rows_are_durable_once_a_card_names_them(
    node: MakeLoop, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were uploaded are lost with the node, as long as no card in the store says so."""
    cards, create = threading.Event(), Files.create

    def slow(files: Files, path: str, raw: bytes) -> None:
        if str(path).startswith(str(shared.folder / "agents")) and not path.endswith(
            "00000001-00000000.safetensors"
        ):
            cards.wait(10)
        create(files, path, raw)

    monkeypatch.setattr(Files, "create", slow)
    loop = node()
    run(loop, [user("Tell me about the sea.")], n=8)
    branch = memory_of(loop).branches[0]
    deadline = time.monotonic() + 10
    while not all(r.shared for r in branch.runs) or not branch.runs:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert durable_rows(branch) == 0
    cards.set()
    settle(loop)
    assert durable_rows(branch) == branch.rows > 0
