"""An agent's memory: parked, evicted, restarted, damaged, moved, never encoded twice."""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from actors.engines.fake_engine import FakeEngine
from actors.loop import ReplicaLoop
from actors.memory import _LOOK_S, MemoryConfig
from actors.turn import Resume, TurnFinished, TurnMoved
from storage.card import PartRef
from storage.errors import StoreUnavailable
from storage.store import CacheStore
from tests.loops import (
    Answer,
    agent_id,
    block_files,
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
CODECS = ("f16", "q4")


@pytest.fixture
def loop_on(tmp_path: Path) -> Iterator[MakeLoop]:
    """Loops that are closed at the end; by default on one store and one fake model."""
    loops: list[ReplicaLoop] = []

    def make(engine: FakeEngine | None = None, store: object = None, **options: object):  # type: ignore[no-untyped-def]
        made = make_loop(engine or FakeEngine(4), store or tmp_path / "store", **options)
        loops.append(made)
        return made

    yield make
    for made in loops:
        if made.alive:
            made.close()


def fresh_text(loop_on: MakeLoop, tmp_path: Path, messages: list[dict[str, str]]) -> Answer:
    """The same turn on a replica that knows nothing."""
    loop = loop_on(store=tmp_path / f"fresh{time.monotonic_ns()}")
    return run(loop, messages)


# ---- restart, eviction


@pytest.mark.parametrize("codec", CODECS)
def test_a_restarted_replica_still_has_its_agents(loop_on: MakeLoop, codec: str) -> None:
    loop, messages = loop_on(codec=codec), []
    first = talk(loop, messages, LONG)
    loop.close()
    loop = loop_on(codec=codec)
    second = talk(loop, messages, "And the ships?")
    assert second.cached == len(first.prompt) + len(first.ids) - 1  # the last id was never fed
    assert second.prompt[: second.cached + 1] == first.prompt + first.ids
    assert second.cache == "warm"
    assert not loop.memory.faults


def test_restart_gives_the_same_text(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    asked = [*messages, user("And the ships?")]
    undisturbed = run(loop, asked, session="a")
    settle(loop)
    loop.close()
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    loop = loop_on()
    again = run(loop, asked)  # the same prompt: regenerated from the restored prefix
    assert again.ids == undisturbed.ids
    assert again.prefilled == 1
    fresh = fresh_text(loop_on, tmp_path, messages[:1])
    assert fresh.ids == list(undisturbed.prompt[len(fresh.prompt) :][: len(fresh.ids)])


def test_a_q4_memory_continues_as_if_parked_and_restored_once(
    loop_on: MakeLoop, tmp_path: Path
) -> None:
    """Evicted, restarted, evicted again: a second parking loses nothing more."""
    loop, messages = loop_on(codec="q4"), []
    talk(loop, messages, LONG)
    asked = [*messages, user("And the ships?")]
    settle(loop)
    shutil.copytree(tmp_path / "store", tmp_path / "once")
    parked_once = run(loop_on(store=tmp_path / "once", codec="q4"), asked)
    for _ in range(3):
        evict(loop, pool=True)
        settle(loop)
    assert run(loop, asked).ids == parked_once.ids
    settle(loop)
    loop.close()
    parked_later = []  # now the question's own rows have been parked, too
    for _ in range(3):
        loop = loop_on(codec="q4")
        parked_later.append(run(loop, asked))
        loop.close()
    assert parked_later[0].prefilled == 1
    assert len({tuple(answer.ids) for answer in parked_later}) == 1


def test_no_code_is_encoded_twice(loop_on: MakeLoop, tmp_path: Path) -> None:
    store = tmp_path / "store"
    loop, messages = loop_on(codec="q4"), []
    talk(loop, messages, LONG)
    settle(loop)
    before = block_files(store)
    named = names_in_card(loop)
    for turn in range(4):
        loop.close()
        loop = loop_on(codec="q4")
        talk(loop, messages, f"More of it, part {turn}. " * 5)
        evict(loop, pool=True)
    settle(loop)
    after = block_files(store)
    assert {n: after[n] for n in before} == before
    whole = [name for name, rows in named if rows == 256]
    assert len(whole) >= 2
    assert [name for name, rows in names_in_card(loop) if rows == 256][: len(whole)] == whole
    ids = [name.split(".")[0] for name in after]
    assert len(ids) == len(set(ids))  # never two variants of one content


def names_in_card(loop: ReplicaLoop) -> list[tuple[str, int]]:
    card = memory_of(loop).card
    assert card is not None
    branch = card.branches[0]
    return [(f"{r.id}.full.{r.parts['full'].sha256}", r.rows) for r in branch.blocks + branch.tail]


def test_a_block_sealed_from_segments_holds_their_codes(loop_on: MakeLoop) -> None:
    """Tail segments of several turns become a block without passing through the codec again."""
    loop, messages = loop_on(codec="q4"), []
    seen = []
    whole = loop.memory.codec.encode

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def encode(self, side, x, executor=None):  # type: ignore[no-untyped-def]
            seen.append(x.shape[1])
            return whole(side, x, executor)

    real = loop.memory.codec
    loop.memory.rows._codec = Counting()
    for turn in range(12):
        talk(loop, messages, f"Question {turn}?")
        evict(loop, pool=True)
    memory = memory_of(loop)
    assert len(memory.branches) == 1
    branch = memory.branches[0]
    assert len(branch.blocks) >= 1
    assert sum(seen) == 2 * branch.rows  # every row once, as key and as value


@pytest.mark.parametrize("codec", CODECS)
def test_more_agents_than_sequences(loop_on: MakeLoop, tmp_path: Path, codec: str) -> None:
    """Two places, five agents: out to the pool and back, then out of the pool, too."""
    loop = loop_on(FakeEngine(2), codec=codec)
    talks: dict[str, list[dict[str, str]]] = {f"s{i}": [] for i in range(5)}
    for turn in range(3):
        for session, messages in talks.items():
            answer = talk(loop, messages, f"{session} {turn}: {LONG[:300]}", session=session)
            assert answer.cache == ("hot" if turn else "cold")
            if turn:
                assert answer.prefilled < 320
    assert loop.residency.evictions > 5
    settle(loop)
    loop.memory.tiers.pool.evict_all()
    for session, messages in talks.items():
        answer = talk(loop, messages, "And now?", session=session)
        assert answer.prefilled < 30
        if codec == "f16":
            expected = fresh_replay(loop_on, tmp_path, messages, session)
            assert answer.ids == expected
    assert not loop.memory.faults


def fresh_replay(
    loop_on: MakeLoop, tmp_path: Path, messages: list[dict[str, str]], session: str
) -> list[int]:
    """The last reply of a conversation, when all of it ran on an engine with room for all."""
    loop, replayed = loop_on(store=tmp_path / f"replay-{session}"), []
    for message in messages[::2]:
        answer = talk(loop, replayed, message["content"])
    assert replayed == messages
    loop.close()
    return answer.ids


@pytest.mark.parametrize("codec", CODECS)
def test_a_pool_too_small_for_one_block_reads_from_the_store(loop_on: MakeLoop, codec: str) -> None:
    loop, messages = loop_on(FakeEngine(1), pool_bytes=1, codec=codec), []
    talk(loop, messages, LONG)
    for turn in range(3):
        talk(loop, [], "something else", session="other")
        answer = talk(loop, messages, f"And {turn}?")
        assert answer.cache == "warm"
        assert answer.prefilled < 40
        settle(loop)
        assert loop.memory.tiers.pool.used_bytes <= 1
    assert not loop.memory.faults


def test_a_long_generation_is_persisted_while_it_runs(loop_on: MakeLoop) -> None:
    from tests.loops import start

    engine = FakeEngine(4, step_delay=0.0005)
    loop = loop_on(engine)
    stream = start(loop, [user("A long story, please.")], n=900, temperature=0.0)
    ids = list(stream.take(600))
    settle(loop)
    other = loop_on(node="n1")
    memory = other.memory.open(agent_id())
    assert memory.card is not None
    branch = memory.branches[0]
    assert len(branch.blocks) >= 2
    assert branch.turn is not None
    assert branch.turn.prompt_tokens == len(stream.answer.prompt)
    emitted = branch.tokens[branch.turn.prompt_tokens :]
    assert len(emitted) >= 400
    n = min(len(emitted), len(ids))
    assert emitted[:n] == ids[:n]
    assert memory.origin == "remote"


# ---- damage


def damage_flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("damage", "kind", "reason"),
    [
        (damage_flip, "corrupt", "sha256 does not match"),
        (damage_truncate, "corrupt", "bytes, the card says"),
        (damage_empty, "corrupt", "0 bytes"),
        (Path.unlink, "missing", "the block is missing"),
    ],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_damaged_block_is_prefilled_and_reported(
    loop_on: MakeLoop, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None], kind: str, reason: str, which: int, codec: str,
) -> None:  # fmt: skip
    loop, messages = loop_on(codec=codec), []
    first = talk(loop, messages, LONG)
    settle(loop)
    names = names_in_card(loop)
    loop.close()
    asked = [*messages, user("And the ships?")]
    (path,) = (tmp_path / "store" / "blocks").rglob(f"{names[which][0]}.safetensors")
    damage(path)
    loop = loop_on(codec=codec)
    with caplog.at_level(logging.WARNING):
        second = run(loop, asked)
    assert second.cached == sum(rows for _, rows in names[:which])
    assert second.prompt[:-18] == [*first.prompt, *first.ids]  # the question and four controls
    assert loop.memory.faults.keys() == {kind}
    assert loop.memory.faults[kind] in (1, 2)  # when read, and when it is set aside
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(path.name in w and reason in w for w in warnings)
    settle(loop)
    if codec == "f16":
        expected = run(loop_on(store=tmp_path / "fresh"), asked[:1])
        assert expected.ids == first.ids
    loop.close()
    repaired = loop_on(codec=codec)
    third = run(repaired, asked)
    assert third.prefilled == 1  # what was prefilled has been stored again
    if codec == "f16":
        assert third.ids == second.ids
    assert not repaired.memory.faults


def test_a_block_of_another_model_is_refused(
    loop_on: MakeLoop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    settle(loop)
    names = names_in_card(loop)
    loop.close()
    stranger = loop_on(FakeEngine(seed=9), store=tmp_path / "strange")
    run(stranger, messages[:1])
    settle(stranger)
    theirs = names_in_card(stranger)
    (source,) = (tmp_path / "strange").rglob(f"{theirs[0][0]}.safetensors")
    (target,) = (tmp_path / "store").rglob(f"{names[0][0]}.safetensors")
    shutil.copyfile(source, target)
    loop = loop_on()
    answer = talk(loop, messages, "And the ships?")
    assert answer.cached == 0
    assert loop.memory.faults["corrupt"] in (1, 2)  # when read, and when it is set aside


def test_a_sound_file_under_the_wrong_name_is_refused(loop_on: MakeLoop, tmp_path: Path) -> None:
    """A card that points to a block of another content: its checksum holds, its id does not."""
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    settle(loop)
    memory = memory_of(loop)
    blocks = memory.branches[0].blocks
    names = names_in_card(loop)
    (source,) = (tmp_path / "store").rglob(f"{names[1][0]}.safetensors")
    ref = blocks[1].ref("shared")
    assert ref is not None
    wrong = source.with_name(f"{blocks[0].id}.full.{ref.parts['full'].sha256}.safetensors")
    folder = wrong.parent.parent / blocks[0].id[:3]
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source, folder / wrong.name)
    blocks[0].note("shared", "full", ref.parts["full"])
    evict(loop, pool=True)
    answer = talk(loop, messages, "And the ships?")
    assert answer.cached == 0
    assert loop.memory.faults["corrupt"] == 1


def test_a_card_of_another_model_is_refused_and_named(
    loop_on: MakeLoop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = loop_on(FakeEngine(seed=9), store=tmp_path / "strange")
    messages: list[dict[str, str]] = []
    talk(stranger, messages, LONG)
    settle(stranger)
    stranger.close()
    (theirs,) = (tmp_path / "strange" / "agents" / "default").iterdir()
    ours = agent_id().digest(FakeEngine().key.digest)
    shutil.copytree(theirs, tmp_path / "store" / "agents" / "default" / ours)
    loop = loop_on()
    with caplog.at_level(logging.WARNING):
        answer = talk(loop, messages, "And the ships?")
    assert (answer.cached, answer.cache) == (0, "cold")
    assert loop.memory.faults["incompatible"] >= 1
    text = caplog.text
    assert "made for another model" in text
    assert "weights" in text
    assert ".safetensors" in text


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_empty])
def test_a_damaged_card_falls_back_to_the_one_before(
    loop_on: MakeLoop, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    loop, messages = loop_on(), []
    first = talk(loop, messages, LONG)
    settle(loop)
    second = talk(loop, messages, "And the ships?")
    settle(loop)
    loop.close()
    cards = sorted((tmp_path / "store" / "agents").rglob("*.safetensors"))
    damage(cards[-1])
    loop = loop_on()
    third = talk(loop, messages, "And the gulls?")
    assert loop.memory.faults["corrupt"] >= 1
    assert len(first.prompt) <= third.cached < len(second.prompt)


def test_all_cards_damaged_is_cold_and_counted(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    settle(loop)
    loop.close()
    for path in (tmp_path / "store" / "agents").rglob("*.safetensors"):
        damage_flip(path)
    shutil.rmtree(tmp_path / "store" / "blocks")  # a prompt that begins alike could share them
    loop = loop_on()
    answer = talk(loop, messages, "And the ships?")
    assert (answer.cached, answer.cache) == (0, "cold")
    assert loop.memory.faults["corrupt"] >= 2


# ---- a store that fails


class FlakyStore(CacheStore):
    """Refuses to write blocks, or cards, while told so."""

    fail_blocks = fail_cards = False

    def put_block(self, tenant: str, block_id: str, part: str, raw: bytes) -> PartRef:
        if self.fail_blocks:
            raise StoreUnavailable(self.url, "no space left")
        return super().put_block(tenant, block_id, part, raw)

    def commit(self, card):  # type: ignore[no-untyped-def]
        if self.fail_cards:
            raise StoreUnavailable(self.url, "no space left")
        return super().commit(card)


@pytest.mark.parametrize("what", ["fail_blocks", "fail_cards"])
def test_a_store_that_cannot_write_costs_no_turn(
    loop_on: MakeLoop, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = FlakyStore(str(tmp_path / "store"))
    loop, messages = loop_on(store=store), []
    setattr(store, what, True)
    with caplog.at_level(logging.WARNING):
        first = talk(loop, messages, LONG)
        evict(loop)
        second = talk(loop, messages, "And the ships?")
        settle(loop)
    assert isinstance(first.last, TurnFinished)
    assert second.cache == "hot"  # from the pool
    assert second.prefilled < 40
    assert loop.memory.faults["store_unavailable"] >= 1
    assert "no space left" in caplog.text
    setattr(store, what, False)
    third = talk(loop, messages, "And the gulls?")
    settle(loop)
    loop.close()
    fresh = loop_on()
    fourth = talk(fresh, messages, "And the rain?")
    assert fourth.cached == len(third.prompt) + len(third.ids) - 1
    assert not fresh.memory.faults


class GoneStore(CacheStore):
    """While `gone`, it has no answer, and counts who wanted one."""

    gone, asked = False, 0

    def __init__(self, url: str) -> None:
        super().__init__(url)
        names = self.files.names
        self.files.names = lambda *folder: self._answer(names, *folder)  # type: ignore[method-assign]

    def _answer(self, function, *arguments):  # type: ignore[no-untyped-def]
        if self.gone and threading.current_thread().name != "outage":
            self.asked += 1
        if self.gone:
            raise StoreUnavailable(self.url, "no answer")
        return function(*arguments)


def test_a_store_that_is_gone_is_waited_for_once(
    loop_on: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.outage._PAUSE_S", 0.01)
    store = GoneStore(str(tmp_path / "store"))
    loop, messages = loop_on(store=store, local=tmp_path / "local"), []
    talk(loop, messages, LONG)
    settle(loop)
    store.gone = True
    memory = loop.memory
    first = memory.open(agent_id())
    assert (first, store.asked) == (memory.get(agent_id()), 1)
    assert memory.outage.lasts
    assert memory.open(agent_id()) is first  # served from what is known here
    assert memory.open(agent_id("stranger")).card is None  # for one turn
    with pytest.raises(StoreUnavailable):
        memory.adopt(agent_id("stranger"))
    assert store.asked == 1
    answer = talk(loop, messages, "And the ships?")
    assert answer.cached > 600
    store.gone = False
    wait_for(lambda: not memory.outage.lasts)
    assert memory.open(agent_id("stranger")).card is not None
    settle(loop)
    assert memory.is_stored(agent_id())


def test_whoever_waits_for_the_store_has_looked_first(loop_on: MakeLoop, tmp_path: Path) -> None:
    """For a store that is gone they wait as long as a look may take, not as a whole call may."""
    store, looks = GoneStore(str(tmp_path / "store")), []
    names = store.files.names

    def looked(folder: str, timeout_s: float | None = None) -> list[str]:
        looks.append(timeout_s)
        return names(folder, timeout_s)

    store.files.names = looked  # type: ignore[method-assign]
    memory = loop_on(store=store).memory
    owned = memory.open(agent_id())
    owned.state = "frozen"
    for wait in (
        lambda: memory.open(agent_id("stranger")),
        lambda: memory.reclaim(owned),
        lambda: memory.stored(agent_id("nobody")),
    ):
        looks.clear()
        wait()
        assert looks[0] == _LOOK_S


def test_the_turn_after_a_migration_does_not_look_again(loop_on: MakeLoop, tmp_path: Path) -> None:
    """The claim has just looked behind itself. Later turns do."""
    store, looks = GoneStore(str(tmp_path / "store")), []
    memory = loop_on(store=store).memory
    memory.adopt(agent_id())
    names = store.files.names
    store.files.names = lambda *folder: looks.append(folder) or names(*folder)  # type: ignore
    memory.open(agent_id())
    assert not looks
    memory.open(agent_id())
    assert len(looks) == 1
    for n in (2, 3):
        memory.adopt(agent_id())  # a migration itself always looks
        assert len(looks) == n
    owned = memory.get(agent_id())
    assert owned is not None
    owned.seen -= 1.0
    memory.open(agent_id())
    assert len(looks) == 4


def test_a_frozen_agent_speaks_on_without_the_store(
    loop_on: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its migration failed, and it cannot be claimed back: its turn leaves, and is taken up without
    its memory, which is all there when the store is."""
    monkeypatch.setattr("actors.outage._PAUSE_S", 0.01)
    monkeypatch.setattr("actors.handoff._UNANSWERED_S", 0.2)
    store = GoneStore(str(tmp_path / "store"))
    loop, messages = loop_on(FakeEngine(4, step_delay=0.005), store), []
    talk(loop, messages, LONG)
    settle(loop)
    question = [*messages, user("And the ships?")]
    undisturbed = run(loop_on(store=tmp_path / "fresh"), question, n=60)
    turn = start(loop, question, n=60, attempt=1)
    turn.take(3)
    loop.call(lambda: loop.handoff.freeze(agent_id())).result()[1].result()
    store.gone = True
    loop.call(lambda: loop.handoff.thaw(agent_id())).result()
    moved = turn.result()
    assert isinstance(moved.last, TurnMoved)
    memory = memory_of(loop)
    assert memory.state == "frozen"  # nobody has claimed it
    resume = Resume(tuple(moved.prompt), tuple(moved.ids))
    rest = run(loop, question, n=60, attempt=2, resume=resume)
    assert isinstance(rest.last, TurnFinished)
    assert moved.ids + rest.ids == undisturbed.ids
    store.gone = False
    wait_for(lambda: not loop.memory.outage.lasts)
    loop.call(lambda: loop.handoff.thaw(agent_id())).result()
    wait_for(lambda: memory_of(loop).state == "owned")
    again = run(loop, question, n=60)
    assert again.cached > 600
    assert again.ids == undisturbed.ids


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_card_names_only_what_the_store_holds(loop_on: MakeLoop, tmp_path: Path) -> None:
    store = FlakyStore(str(tmp_path / "store"))
    loop, messages = loop_on(store=store), []
    talk(loop, messages, LONG)
    settle(loop)
    store.fail_blocks = True
    talk(loop, messages, LONG)
    settle(loop)
    card = memory_of(loop).card
    assert card is not None
    (branch,) = card.branches
    assert branch.rows < len(branch.tokens) - 200
    for ref in (*branch.blocks, *branch.tail):
        assert store.get_block("default", ref, "full") is not None


def test_a_card_ends_where_a_run_was_lost(loop_on: MakeLoop, tmp_path: Path) -> None:
    """Rows that could be kept neither in the store nor in RAM, and later ones that could."""
    store = FlakyStore(str(tmp_path / "store"))
    loop, messages = loop_on(store=store, pool_bytes=1), []
    talk(loop, messages, "short")
    settle(loop)
    store.fail_blocks = True
    talk(loop, messages, LONG)
    settle(loop)
    store.fail_blocks = False
    for _ in range(2):
        talk(loop, messages, LONG)
        settle(loop)
    loop.close()
    loop = loop_on()
    answer = talk(loop, messages, "And?")
    assert answer.ids == fresh_replay(loop_on, tmp_path, messages, "lost")
    assert not loop.memory.faults


# ---- branches


def test_the_least_recently_used_branch_leaves_and_no_other(loop_on: MakeLoop) -> None:
    loop = loop_on(FakeEngine(8), memory=MemoryConfig(max_branches=3))
    talks: list[list[dict[str, str]]] = [[] for _ in range(3)]
    for number, messages in enumerate(talks):
        talk(loop, messages, f"{number} is the number of this conversation. {LONG[:100]}")
    talk(loop, talks[0], "More?")
    run(loop, [user("A title?")])  # a fourth branch: the second conversation is the oldest
    settle(loop)
    assert len(memory_of(loop).branches) == 3
    assert talk(loop, talks[0], "And?").prefilled < 20
    assert talk(loop, talks[2], "And?").prefilled < 20
    assert talk(loop, talks[1], "And?").prefilled > 100


def test_a_record_dropped_from_ram_comes_back_from_the_store(loop_on: MakeLoop) -> None:
    loop = loop_on(memory=MemoryConfig(max_agents=2))
    talks: dict[str, list[dict[str, str]]] = {f"s{i}": [] for i in range(5)}
    for session, messages in talks.items():
        talk(loop, messages, f"{session}: {LONG[:200]}", session=session)
        settle(loop)
    assert len(loop.memory.agents()) == 2
    for session, messages in talks.items():
        assert talk(loop, messages, "And?", session=session).prefilled < 20
        settle(loop)
    assert not loop.memory.faults


def test_a_deleted_agent_is_gone(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    settle(loop)
    loop.call(lambda: loop.drop(agent_id())).result(10)
    loop.memory.delete(agent_id())
    assert loop.memory.get(agent_id()) is None
    loop.memory.tiers.pool.evict_all()
    shutil.rmtree(tmp_path / "store" / "blocks")  # as a collector would, once nobody names them
    answer = talk(loop, messages, "And the ships?")
    assert (answer.cached, answer.cache) == (0, "cold")
    settle(loop)
    loop.close()
    assert talk(loop_on(), messages, "And?").prefilled < 20


def test_without_a_session_nothing_is_left_in_the_store(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop = loop_on()
    run(loop, [user(LONG)], persist=False, n=600)
    settle(loop)
    store = tmp_path / "store"
    assert [p for p in store.rglob("*") if p.is_file()] == []
    assert loop.memory.agents() == []
    assert loop.memory.tiers.pool.used_bytes == 0
    assert loop.residency.cells_used == 0


def test_another_tenant_shares_nothing(loop_on: MakeLoop) -> None:
    from actors.turn import SamplingParams, TurnRequest
    from storage.card import AgentId
    from tests.loops import Stream

    loop = loop_on()
    run(loop, [user(LONG)])
    settle(loop)
    request = TurnRequest("t", AgentId("other", "a"), (user(LONG),), SamplingParams(20, 0.0))
    stream = Stream(request)
    loop.submit(request, stream)
    assert stream.result().cached == 0
    settle(loop)
    first, second = (m.branches[0].blocks for m in loop.memory.agents())
    assert {run.id for run in first}.isdisjoint(run.id for run in second)
    assert [run.rows for run in first] == [run.rows for run in second]


def test_a_shared_prefix_is_stored_once(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop = loop_on()
    for session in ("a", "b", "c"):
        run(loop, [user(LONG)], session=session)
    settle(loop)
    assert len({run.id for m in loop.memory.agents() for run in m.branches[0].blocks}) == 2
    whole = [n for n, raw in block_files(tmp_path / "store").items() if rows_of(raw) == 256]
    assert len(whole) == 2


def rows_of(raw: bytes) -> int:
    size = int.from_bytes(raw[:8], "little")
    metadata = json.loads(raw[8 : 8 + size])["__metadata__"]["kvferry"]
    return int(json.loads(metadata)["rows"])


# ---- a collector


def test_a_block_that_is_condemned_is_stored_anew_and_read_from_there(
    loop_on: MakeLoop, tmp_path: Path
) -> None:
    now = [0.0]
    store = CacheStore(str(tmp_path / "store"), clock=lambda: now[0])
    loop, messages = loop_on(store=store, codec="q4"), []
    talk(loop, messages, LONG)
    settle(loop)
    (branch,) = memory_of(loop).branches
    ref = branch.blocks[0].ref("shared")
    assert ref is not None
    path = Path(store.block_path("default", ref, "full"))
    store.condemned.publish("default", "condemned", {path.name: path.stat().st_size})
    now[0] += 60.0
    talk(loop, messages, "And the ships?")
    settle(loop)
    card = memory_of(loop).card
    assert card is not None
    assert card.branches[0].blocks[0] == branch.blocks[0].ref("shared") != ref
    path.unlink()
    evict(loop, pool=True)
    assert talk(loop, messages, "And then?").cached == card.branches[0].rows
    assert not loop.memory.faults


def test_layers_side_by_side_give_the_same_rows(loop_on: MakeLoop, tmp_path: Path) -> None:
    for threads in (1, 3):
        loop = loop_on(
            store=tmp_path / str(threads), codec="q4", memory=MemoryConfig(codec_threads=threads)
        )
        messages: list[dict[str, str]] = []
        talk(loop, messages, LONG)
        evict(loop, pool=True)
        talk(loop, messages, "And the ships?")
        settle(loop)
    assert block_files(tmp_path / "1") == block_files(tmp_path / "3")
