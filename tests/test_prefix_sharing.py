"""Prompts that begin alike, in one tenant and salt: computed once, held once, restored once."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actors.rows
from actors.engines.base import Chunk, Engine, Logits, count_rows
from actors.engines.fake_engine import FakeEngine
from actors.loop import LoopConfig, ReplicaLoop
from actors.prompt import common_prefix
from actors.scheduler import SchedulerConfig
from actors.turn import SamplingParams, TurnRequest
from storage.card import AgentId
from storage.store import CacheStore
from tests.engine_contract import GAP, feed, forced
from tests.loops import WAIT, Answer, Stream, assistant, block_files, evict, make_loop, settle, user

MakeLoop = Callable[..., ReplicaLoop]
Messages = list[dict[str, str]]
SYSTEM = "You serve the harbour office. Ships, winds, tides, ropes and lamps are your trade. " * 14
N_SYSTEM = 1000  # tokens of the fake template that `system` makes


class CountingEngine(FakeEngine):
    """Counts tokens that are computed and rows that are loaded."""

    computed = loaded = most_cells = 0

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        self.computed += sum(len(chunk.token_ids) for chunk in chunks)
        logits = super().step(chunks)
        self.most_cells = max(self.most_cells, self.cells_used)
        return logits

    def load(self, seq_id: int, start: int, rows: Any) -> None:
        self.loaded += count_rows(rows)
        super().load(seq_id, start, rows)


def system(n: int = N_SYSTEM) -> Messages:
    """A system prompt of n tokens: its control tokens are two, the user's follows."""
    return [{"role": "system", "content": SYSTEM[: n - 3]}]


def ask(session: int | str, question: str = "", n: int = N_SYSTEM) -> Messages:
    """Of different sessions, all but the first `n` tokens differ."""
    return [*system(n), user(f"{session} is my number. {question}")]


def start(
    loop: ReplicaLoop,
    messages: Messages,
    session: str,
    *,
    tenant: str = "default",
    persist: bool = True,
    n: int = 12,
) -> Stream:
    agent = AgentId(tenant, session)
    request = TurnRequest(session, agent, tuple(messages), SamplingParams(n, 0.0), persist)
    stream = Stream(request)
    loop.submit(request, stream)
    return stream


def run(loop: ReplicaLoop, messages: Messages, session: str, **options: Any) -> Answer:
    return start(loop, messages, session, **options).result()


@pytest.fixture
def loop_on(tmp_path: Path) -> Iterator[MakeLoop]:
    """Loops that are closed at the end; by default on one store and one fake model."""
    loops: list[ReplicaLoop] = []

    def make(engine: Engine | None = None, store: Path | None = None, **options: Any):  # type: ignore[no-untyped-def]
        made = make_loop(engine or CountingEngine(8), store or tmp_path / "store", **options)
        loops.append(made)
        return made

    yield make
    for made in loops:
        if made.alive:
            made.close()


def unshared(loop_on: MakeLoop, tmp_path: Path, messages: Messages) -> str:
    """What an agent alone is told."""
    store = tmp_path / f"alone{random.getrandbits(40):x}"
    loop = loop_on(store=store)
    text = run(loop, messages, "alone").text
    loop.close()
    return text


def common(answers: Sequence[Answer]) -> int:
    return min(common_prefix(answers[0].prompt, a.prompt) for a in answers[1:])


# ---- in the engine


def test_eight_agents_and_one_system_prompt(loop_on: MakeLoop, tmp_path: Path) -> None:
    """All at once: the common tokens are computed once, held once, and restored once."""
    asked = [ask(i) for i in range(8)]
    texts = [unshared(loop_on, tmp_path, m) for m in asked]
    engine = CountingEngine(8, 4096, n_cells=2500)  # unshared, two of the eight would fit
    loop = loop_on(engine)
    streams = [start(loop, m, str(i)) for i, m in enumerate(asked)]
    answers = [s.result() for s in streams]
    assert [a.text for a in answers] == texts
    assert common(answers) == N_SYSTEM
    own = sum(len(a.prompt) - N_SYSTEM for a in answers)
    assert sum(a.prefilled for a in answers) == N_SYSTEM + own
    assert sorted(a.cached for a in answers) == [0] + [N_SYSTEM] * 7
    settle(loop)
    assert engine.cells_used == engine.computed == loop.residency.cells_used
    assert engine.cells_used - N_SYSTEM == sum(
        engine.n_rows(i) - N_SYSTEM for i in range(engine.n_seq_max)
    )
    kept = sum(engine.n_rows(i) - N_SYSTEM for i in range(engine.n_seq_max))

    evict(loop)
    assert engine.cells_used == loop.residency.cells_used == 0
    engine.computed = engine.loaded = 0
    for m, answer in zip(asked, answers, strict=True):
        m += [assistant(answer.text), user("And then?")]
    streams = [start(loop, m, str(i)) for i, m in enumerate(asked)]
    again = [s.result() for s in streams]
    assert engine.loaded == N_SYSTEM + kept
    assert all(a.cache == "hot" and a.prefilled < 20 for a in again)
    settle(loop)
    assert engine.cells_used == engine.loaded + engine.computed
    assert [a.text for a in again] == [unshared(loop_on, tmp_path, m) for m in asked]


def test_a_new_agent_shares_with_one_that_sits_idle(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop = loop_on()
    run(loop, ask(0), "a")
    settle(loop)
    answer = run(loop, ask(1), "b")
    assert (answer.cached, answer.cache) == (N_SYSTEM, "hot")
    assert answer.text == unshared(loop_on, tmp_path, ask(1))


def test_a_new_agent_shares_with_one_that_runs(loop_on: MakeLoop) -> None:
    engine = CountingEngine(4, step_delay=0.002)
    loop = loop_on(engine)
    long = start(loop, ask(0), "a", n=400)
    long.take(1)
    assert run(loop, ask(1), "b", n=3).cached == N_SYSTEM
    assert long.answer.last is None
    long.result()


@pytest.mark.parametrize("n", [20, 31, 32, 40, 256, 257, 513])
def test_prefixes_of_every_length_from_the_least_on(loop_on: MakeLoop, n: int) -> None:
    loop = loop_on()
    first = run(loop, ask(0, n=n), "a")
    settle(loop)
    second = run(loop, ask(1, n=n), "b")
    assert common([first, second]) == n
    assert second.cached == (n if n >= 32 else 0)


def test_the_same_prompt_again_computes_its_last_token(loop_on: MakeLoop) -> None:
    loop = loop_on()
    first = run(loop, ask(0), "a")
    settle(loop)
    second = run(loop, ask(0), "b")
    assert second.prefilled == 1
    assert second.text == first.text


def test_a_lender_that_leaves_takes_nothing_along(loop_on: MakeLoop, tmp_path: Path) -> None:
    """The source is evicted while its borrower runs, then cut while another does."""
    engine = CountingEngine(4, step_delay=0.001)
    loop = loop_on(engine)
    first = run(loop, ask(0), "a")
    settle(loop)
    borrower = start(loop, ask(1), "b", n=100)
    borrower.take(1)
    held = loop.residency.find(loop.memory.get(AgentId("default", "a")).branches[0])
    loop.call(lambda: loop.residency.free(held)).result(WAIT)
    other = [*system(600), user("something else")]  # parts inside the common tokens
    third = run(loop, other, "c", n=5)
    assert 0 < third.cached < N_SYSTEM
    expected = loop_on(store=tmp_path / "alone")
    assert borrower.result().text == run(expected, ask(1), "b", n=100).text
    assert third.text == run(expected, other, "c", n=5).text
    settle(loop)
    assert loop.residency.cells_used == engine.cells_used
    assert first.text
    evict(loop)
    assert engine.cells_used == 0


def test_one_sequence_passes_from_agent_to_agent(loop_on: MakeLoop) -> None:
    """With one slot there is no place beside the source: it leaves, what is common stays."""
    engine = CountingEngine(1)
    loop = loop_on(engine)
    run(loop, ask(0), "a")
    settle(loop)
    assert run(loop, ask(1), "b").cached == N_SYSTEM
    settle(loop)
    assert engine.loaded == 0
    back = run(loop, [*ask(0), user("And?")], "a")
    assert back.cached >= N_SYSTEM
    assert engine.loaded < 256  # only what the two have not in common


def test_a_broken_lender_is_not_waited_for(loop_on: MakeLoop) -> None:
    """The turn whose prefill others wait for is cancelled: they go on without it."""
    engine = CountingEngine(4, step_delay=0.01)
    loop = loop_on(engine, loop=LoopConfig(SchedulerConfig(prefill_chunk=64)))
    first = start(loop, ask(0), "a")
    streams = [start(loop, ask(i), str(i)) for i in (1, 2)]
    next(iter(first))
    loop.cancel("a")
    answers = [s.result() for s in streams]
    assert max(a.cached for a in answers) == N_SYSTEM


def test_a_new_branch_shares_with_another_agent(loop_on: MakeLoop, tmp_path: Path) -> None:
    """It parts from the agent's own history early, and goes on in a neighbour's."""
    loop = loop_on()
    run(loop, [{"role": "system", "content": "You mend nets. " * 40}, user("Hello.")], "a")
    run(loop, ask(1), "b")
    settle(loop)
    assert run(loop, ask(2), "a").cached == N_SYSTEM
    assert len(loop.memory.get(AgentId("default", "a")).branches) == 2
    evict(loop, pool=True)
    told = [*ask(2), assistant(run(loop, ask(2), "c").text), user("And?")]
    evict(loop, pool=True)
    back = run(loop, told, "a")
    assert back.prefilled < 20
    assert back.text == unshared(loop_on, tmp_path, told)


def test_a_changed_reply_that_a_neighbour_has_seen(loop_on: MakeLoop, tmp_path: Path) -> None:
    """The branch goes on in its place with rows of the neighbour's sequence and records."""
    loop = loop_on()
    changed = [*ask(0), assistant("The tide has turned, all lamps are lit. " * 9), user("So?")]
    run(loop, changed, "b")
    run(loop, ask(0), "a")
    settle(loop)
    shared = run(loop, changed, "a")
    assert shared.prefilled == 1
    (branch,) = loop.memory.get(AgentId("default", "a")).branches
    evict(loop, pool=True)
    assert branch.rows == len(branch.tokens) - 1
    told = [*changed, assistant(shared.text), user("And?")]
    back = run(loop, told, "a")
    assert back.prefilled < 20
    assert back.text == unshared(loop_on, tmp_path, told)


# ---- accounting under pressure


@pytest.mark.parametrize("seed", range(3))
def test_many_agents_in_few_cells(loop_on: MakeLoop, tmp_path: Path, seed: int) -> None:
    """Random arrivals over three slots, preemption included: no step finds the cells taken, every
    text is that of an agent alone."""
    rng = random.Random(seed)
    engine = CountingEngine(3, 1500, n_cells=1500)
    loop = loop_on(engine)
    alone = loop_on(FakeEngine(12, 4096), store=tmp_path / "alone", loop=LoopConfig())
    talks: list[Messages] = [ask(i % 5, n=rng.choice([100, 300, 700])) for i in range(10)]
    for _ in range(3):
        wanted = rng.sample(range(10), 6)
        streams = {i: start(loop, talks[i], str(i), n=rng.choice([5, 90])) for i in wanted}
        for i, stream in streams.items():
            answer = stream.result()
            assert answer.reason in ("stop", "length")
            n = len(answer.ids) if answer.reason == "length" else 400
            assert answer.text == run(alone, talks[i], f"{i}", n=n, persist=False).text
            talks[i] = [*talks[i], assistant(answer.text), user("Go on.")]
    assert not loop.memory.faults
    settle(loop)
    assert engine.most_cells <= engine.n_cells
    assert loop.residency.cells_used == engine.cells_used
    evict(loop)
    assert loop.residency.cells_used == engine.cells_used == 0


# ---- stored blocks


def test_a_new_agent_begins_with_blocks_from_the_pool(loop_on: MakeLoop, tmp_path: Path) -> None:
    engine = CountingEngine(4)
    loop = loop_on(engine)
    run(loop, ask(0), "a")
    evict(loop)
    before = set(block_files(tmp_path / "store"))
    answer = run(loop, ask(1), "b")
    assert (answer.cached, answer.cache, engine.loaded) == (768, "hot", 768)
    assert answer.started is not None
    assert answer.started.durable_tokens == 0  # its own card does not name them yet
    assert answer.text == unshared(loop_on, tmp_path, ask(1))
    settle(loop)
    mine, theirs = (loop.memory.get(AgentId("default", x)).card.branches[0] for x in "ba")
    assert [ref.id for ref in mine.blocks[:3]] == [ref.id for ref in theirs.blocks[:3]]
    assert mine.rows == len(mine.tokens) - 1
    new = {name.split(".")[0] for name in set(block_files(tmp_path / "store")) - before}
    assert not new & {ref.id for ref in theirs.blocks}


@pytest.mark.parametrize("local", [False, True])
def test_a_new_agent_begins_with_blocks_of_the_store(
    loop_on: MakeLoop, tmp_path: Path, local: bool
) -> None:
    """Another replica has stored them; this one knows of no agent."""
    where = {"local": tmp_path / "disk"} if local else {}
    loop = loop_on(**where)
    run(loop, ask(0), "a")
    settle(loop)
    loop.close()
    if local:
        shutil.rmtree(tmp_path / "disk")
    engine = CountingEngine(4)
    loop = loop_on(engine, **where, node="n1")
    answer = run(loop, ask(1), "b")
    assert (answer.cached, answer.cache, engine.loaded) == (768, "remote", 768)
    assert answer.text == unshared(loop_on, tmp_path, ask(1))
    settle(loop)
    card = CacheStore(str(tmp_path / "store")).latest(AgentId("default", "b"), engine.key)
    assert card is not None
    assert card.card.branches[0].rows == len(card.card.branches[0].tokens) - 1
    assert not loop.memory.faults


def test_a_new_agent_begins_with_blocks_of_the_nodes_disk(
    loop_on: MakeLoop, tmp_path: Path
) -> None:
    loop = loop_on(local=tmp_path / "disk")
    run(loop, ask(0), "a")
    settle(loop)
    loop.close()
    shutil.rmtree(tmp_path / "store" / "blocks")
    engine = CountingEngine(4)
    loop = loop_on(engine, local=tmp_path / "disk")
    answer = run(loop, ask(1), "b")
    assert (answer.cached, answer.cache, engine.loaded) == (768, "warm", 768)
    settle(loop)
    evict(loop, pool=True)
    back = run(loop, [*ask(1), assistant(answer.text), user("And?")], "b")
    assert back.prefilled < 20


def test_what_is_shared_is_never_encoded_again(
    loop_on: MakeLoop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I7, with a lossy codec: rows decoded for one agent are no other's to encode, whether they
    came through the engine or from storage."""
    rows: list[int] = []
    encode = actors.rows.encode_rows

    def counting(spec: Any, codec: Any, x: Any, *more: Any, **options: Any) -> Any:
        rows.append(count_rows(x))
        return encode(spec, codec, x, *more, **options)

    monkeypatch.setattr(actors.rows, "encode_rows", counting)
    loop = loop_on(codec="q4")
    first = run(loop, ask(0), "a")
    evict(loop)
    answers = [run(loop, ask(1), "b"), run(loop, ask(2), "c")]  # from the pool; from b's cells
    assert [a.cached for a in answers] == [768, N_SYSTEM]
    settle(loop)
    tokens = [len(a.prompt) + len(a.ids) - 1 for a in (first, *answers)]
    b, c = tokens[1] - 768, tokens[2] - N_SYSTEM
    assert sum(rows) == tokens[0] + b + c
    files = block_files(tmp_path / "store")
    assert len(files) == len({name.split(".")[0] for name in files})
    evict(loop, pool=True)
    for i, answer in enumerate(answers, 1):
        told = [*ask(i), assistant(answer.text), user("And?")]
        assert run(loop, told, "abc"[i]).prefilled < 20


def test_blocks_of_an_agent_that_has_left_are_not_encoded_again(
    loop_on: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody here remembers where they are stored, but RAM has them; then it has not."""
    rows: list[int] = []
    encode = actors.rows.encode_rows

    def counting(spec: Any, codec: Any, x: Any, *more: Any, **options: Any) -> Any:
        rows.append(count_rows(x))
        return encode(spec, codec, x, *more, **options)

    loop = loop_on(CountingEngine(1, step_delay=0.01), codec="q4")
    run(loop, ask(0), "a")
    evict(loop)
    loop.call(lambda: loop.handoff.release(AgentId("default", "a"))).result(WAIT)
    run(loop, [user("Hello.")], "c")
    settle(loop)
    gc.collect()
    assert not loop.memory.rows.known
    monkeypatch.setattr(actors.rows, "encode_rows", counting)
    stream = start(loop, ask(1), "b")
    stream.take(1)
    loop.memory.tiers.pool.evict_all()
    answer = stream.result()
    assert (answer.cached, answer.cache) == (768, "hot")
    settle(loop)
    (branch,) = loop.memory.get(AgentId("default", "b")).branches
    assert branch.rows == len(branch.tokens) - 1
    assert sum(rows) == branch.rows - 768


def test_a_stored_block_that_is_damaged_is_prefilled(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop = loop_on()
    run(loop, ask(0), "a")
    settle(loop)
    block = loop.memory.get(AgentId("default", "a")).card.branches[0].blocks[1]
    loop.close()
    (path,) = (tmp_path / "store").rglob(f"{block.id}.full.*")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    loop = loop_on()
    answer = run(loop, ask(1), "b")
    assert answer.cached == 256
    assert answer.text == unshared(loop_on, tmp_path, ask(1))
    assert loop.memory.faults["corrupt"] >= 1


# ---- one-off agents


def test_a_one_off_agent_shares_and_stores_nothing(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop = loop_on()
    run(loop, ask(0), "a")
    settle(loop)
    files = sorted(p for p in (tmp_path / "store").rglob("*") if p.is_file())
    used = loop.memory.tiers.pool.used_bytes
    assert run(loop, ask(1), "x", persist=False).cached == N_SYSTEM
    evict(loop)
    answer = run(loop, ask(1), "x", persist=False, n=300)
    assert (answer.cached, answer.cache) == (768, "hot")
    settle(loop)
    loop.close()
    loop = loop_on()
    answer = run(loop, ask(1), "x", persist=False)
    assert (answer.cached, answer.cache) == (768, "remote")
    settle(loop)
    assert sorted(p for p in (tmp_path / "store").rglob("*") if p.is_file()) == files
    assert loop.memory.tiers.pool.used_bytes <= used
    assert loop.residency.cells_used == 0


def test_one_off_agents_lend_only_what_they_computed(loop_on: MakeLoop) -> None:
    """Rows that one has from storage would be encoded again by an agent that is kept."""
    engine = CountingEngine(4, step_delay=0.002)
    loop = loop_on(engine, codec="q4")
    fresh = start(loop, ask(0), "x", persist=False, n=300)
    fresh.take(1)
    assert run(loop, ask(1), "a", n=3).cached == N_SYSTEM
    loop.cancel("x")
    fresh.result()
    evict(loop)
    restored = start(loop, ask(2), "y", persist=False, n=300)
    restored.take(1)
    assert restored.answer.cached == 768
    assert run(loop, ask(3), "z", n=3, persist=False).cached == N_SYSTEM
    assert run(loop, ask(4), "b", n=3).cached == 768
    loop.cancel("y")
    restored.result()


# ---- I6


def salted(loop: ReplicaLoop, session: str, salt: str) -> None:
    memory = loop.memory.open(AgentId("default", session))
    assert memory.card is not None
    memory.card = replace(memory.card, cache_salt=salt)


@pytest.mark.parametrize("path", ["engine", "pool", "store"])
def test_nothing_is_shared_between_tenants(loop_on: MakeLoop, path: str) -> None:
    loop = loop_on()
    run(loop, ask(0), "a", tenant="one")
    loop = moved_out(loop, loop_on, path)
    assert run(loop, ask(0), "a", tenant="two").cached == 0
    assert run(loop, ask(0), "x", tenant="two", persist=False).cached > 0  # of "two" itself
    assert run(loop, ask(0), "x", tenant="three", persist=False).cached == 0


@pytest.mark.parametrize("path", ["engine", "pool", "store"])
def test_nothing_is_shared_between_salts(loop_on: MakeLoop, path: str) -> None:
    loop = loop_on()
    salted(loop, "a", "pepper")
    run(loop, ask(0), "a")
    loop = moved_out(loop, loop_on, path)
    assert run(loop, ask(1), "x", persist=False).cached == 0
    salted(loop, "b", "paprika")
    assert run(loop, ask(1), "b").cached == 0
    salted(loop, "c", "pepper")
    assert run(loop, ask(2), "c").cached == (N_SYSTEM if path == "engine" else 768)
    assert run(loop, ask(3), "d").cached == 0


def moved_out(loop: ReplicaLoop, loop_on: MakeLoop, path: str) -> ReplicaLoop:
    """The loop, or one that has rows of finished turns in the pool or the store only."""
    settle(loop)
    if path == "pool":
        evict(loop)
    elif path == "store":
        loop.close()
        return loop_on()
    return loop


# ---- sliding windows


@pytest.mark.slow
@pytest.mark.parametrize("window", [16, 48, 300])
def test_windows_allow_it_or_the_prompt_is_computed(
    loop_on: MakeLoop, tmp_path: Path, window: int
) -> None:
    """The fake engine drops what no window reaches: only where the source stands can be forked."""
    engine = CountingEngine(6, window=window)
    loop = loop_on(engine)
    asked = [ask(i, n=600) for i in range(5)]
    answers = [s.result() for s in [start(loop, m, str(i)) for i, m in enumerate(asked)]]
    same = run(loop, asked[0], "same")
    evict(loop)
    for m, answer in zip(asked, answers, strict=True):
        m += [assistant(answer.text), user("And?")]
    back = [s.result() for s in [start(loop, m, str(i)) for i, m in enumerate(asked)]]
    alone = loop_on(FakeEngine(1, window=window), store=tmp_path / "alone")
    for i, (m, answer, later) in enumerate(zip(asked, answers, back, strict=True)):
        assert answer.text == run(alone, m[:2], f"x{i}", persist=False).text
        assert later.text == run(alone, m, f"y{i}", persist=False).text
        assert later.prefilled < 20
    assert same.text == answers[0].text
    settle(loop)
    assert loop.residency.cells_used == engine.cells_used


# ---- llama.cpp

STORY = (
    "The sea was calm that morning, and the fishermen went out early. They rowed past the old "
    "lighthouse, where the keeper used to wave to them with a white cloth. "
)


@pytest.mark.parametrize("name", ["llama64", "gemma3", "deepseek2"])
def test_on_llama_cpp(loop_on: MakeLoop, tiny_models: dict[str, Path], name: str) -> None:
    """Four agents at once in cells that hold the common tokens once; and again after eviction."""
    from actors.engines.llama_engine import LlamaEngine

    engine = LlamaEngine(tiny_models[name], n_seq_max=4, n_ctx=2048, n_cells=1280, n_threads=1)
    loop = loop_on(engine)
    engine.close, close = lambda: None, engine.close  # type: ignore[method-assign]
    asked = [[{"role": "system", "content": STORY * 4}, user(f"{i} of us")] for i in range(4)]
    answers = [s.result() for s in [start(loop, m, str(i)) for i, m in enumerate(asked)]]
    shared = common(answers)
    assert shared > 250
    assert sorted(a.cached for a in answers) == [0] + [shared] * 3
    settle(loop)
    kept = sum(engine.n_rows(i) - shared for i in range(4))
    assert loop.residency.cells_used == shared + kept
    evict(loop)
    for m, answer in zip(asked, answers, strict=True):
        m += [assistant(answer.text), user("And?")]
    back = [s.result() for s in [start(loop, m, str(i)) for i, m in enumerate(asked)]]
    loop.close()
    for seq_id in range(4):
        engine.truncate(seq_id, 0)
    for answer in (*answers, *back):
        assert_as_alone(engine, answer)
    close()


def assert_as_alone(engine: Engine, answer: Answer) -> None:
    """The reply is the one of a sequence alone, or parts from it at a near tie (FACTS "equal")."""
    first = feed(engine, 0, answer.prompt)
    logits = forced(engine, 0, answer.ids, first) if answer.ids else np.empty((0, 1))
    engine.truncate(0, 0)
    for row, token in zip(logits, answer.ids, strict=True):
        assert row.max() - row[token] < GAP
        if row.argmax() != token:
            print("a near tie")
