"""Models with sliding windows: what is kept of them, and where a conversation can go on."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from actors.engines.base import Chunk, Logits
from actors.engines.fake_engine import FakeEngine
from actors.loop import ReplicaLoop
from actors.turn import TurnMoved
from storage.cache_file import load_metadata
from tests.loops import (
    Answer,
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

pytestmark = pytest.mark.long

WINDOW = 300  # more than a block, so that a window reaches over several runs
LONG = "Tell me about the sea, the wind and the old harbour of the town. " * 12  # 780 tokens
MakeLoop = Callable[..., ReplicaLoop]


@pytest.fixture(params=[WINDOW, 40])
def window(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def loop_on(tmp_path: Path, window: int) -> Iterator[MakeLoop]:
    loops: list[ReplicaLoop] = []

    def make(store: Path | None = None, delay: float = 0.0, **options: object) -> ReplicaLoop:
        engine = FakeEngine(4, window=window, step_delay=delay)
        made = make_loop(engine, store or tmp_path / "store", **options)  # type: ignore[arg-type]
        loops.append(made)
        return made

    yield make
    for made in loops:
        if made.alive:
            made.close()


def undisturbed(loop_on: MakeLoop, tmp_path: Path, questions: list[str], **options) -> list[Answer]:  # type: ignore[no-untyped-def]
    """The same conversation where nobody ever leaves the engine."""
    loop, messages = loop_on(tmp_path / "undisturbed", **options), []
    return [talk(loop, messages, question) for question in questions]


def sliding_files(store: Path) -> list[tuple[str, int]]:
    """(block id, rows) of every stored sliding part."""
    found = []
    for path in sorted((store / "blocks").rglob("*.sliding.*.safetensors")):
        metadata = load_metadata(path.read_bytes(), path.name)
        found.append((metadata["id"], metadata["rows"]))
    return found


QUESTIONS = [LONG, "And the ships?", "Who built them?", "Of what wood?" * 8, "And now?"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["f16", "q4"])
def test_a_conversation_that_is_parked_every_turn_prefills_only_what_is_new(
    loop_on: MakeLoop, tmp_path: Path, codec: str
) -> None:
    expected = undisturbed(loop_on, tmp_path, QUESTIONS)
    loop, messages, rows = loop_on(codec=codec), [], 0
    for n, question in enumerate(QUESTIONS):
        answer = talk(loop, messages, question)
        assert answer.cached == rows
        if codec == "f16":
            assert answer.ids == expected[n].ids
        settle(loop)
        rows = memory_of(loop).branches[0].rows
        assert rows in (len(answer.prompt) + len(answer.ids) + d for d in (-1, 0))
        if n % 2:
            evict(loop, pool=True)
        else:
            loop.close()
            loop = loop_on(codec=codec)
    assert not loop.memory.faults


def test_only_the_last_windows_are_stored(loop_on: MakeLoop, tmp_path: Path, window: int) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    settle(loop)
    branch = memory_of(loop).branches[0]
    stored = sliding_files(tmp_path / "store")
    assert sum(rows for _, rows in stored) == window - 1
    needed = [run.id for run in branch.runs[-len(stored) :]]
    assert sorted(needed) == [run_id for run_id, _ in stored]
    assert branch.checkpoints == [branch.rows]
    for question in QUESTIONS[1:] * 2:
        talk(loop, messages, question)
    settle(loop)
    kept = [run for run in branch.runs if run.has_window]
    assert len(branch.checkpoints) == 3
    oldest = branch.checkpoints[0] - window + 1
    starts = [sum(r.rows for r in branch.runs[:i]) for i in range(len(branch.runs))]
    for at, run_ in zip(starts, branch.runs, strict=True):
        assert (run_ in kept) == (at + run_.rows > oldest)
    card = loop.memory.store.latest(agent_id(), loop.memory.key)
    assert card is not None
    named = {ref.id for ref in card.card.branches[0].blocks if "sliding" in ref.parts}
    assert named == {run_.id for run_ in kept if run_ in branch.blocks}


def test_a_reply_is_made_again_from_the_checkpoint_before_it(
    loop_on: MakeLoop, tmp_path: Path
) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    settle(loop)
    start_of_turn = memory_of(loop).branches[0].rows
    second = talk(loop, messages, "And the ships?")
    for parked in (False, True):
        if parked:
            evict(loop, pool=True)
        again = run(loop, messages[:-1])
        assert again.ids == second.ids
        assert again.cached == start_of_turn
    edited = run(loop, [*messages[:2], user("And the sailors?")])
    assert edited.cached == start_of_turn
    fresh = run(loop_on(tmp_path / "fresh"), [*messages[:2], user("And the sailors?")])
    assert edited.ids[:1] == fresh.ids[:1]
    assert not loop.memory.faults


def test_a_side_request_costs_the_conversation_nothing(loop_on: MakeLoop) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    title = run(loop, [user("Find a title for: " + LONG[:60])])
    assert title.ids
    settle(loop)
    rows = memory_of(loop).branches[0].rows
    evict(loop, pool=True)
    assert talk(loop, messages, "And the ships?").cached == rows


def test_where_no_window_is_kept_the_prompt_is_prefilled(loop_on: MakeLoop) -> None:
    """A divergence before every checkpoint."""
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    settle(loop)
    other = run(loop, [user(LONG[:500] + "and the mountains?")])
    assert (other.cached, other.cache) == (0, "cold")
    assert not loop.memory.faults


def test_a_reply_cut_by_a_stop_string_goes_on_correctly(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop, messages = loop_on(), []
    whole = run(loop_on(tmp_path / "whole"), [user(LONG)])
    stop = whole.text[6:9]
    first = talk(loop, messages, LONG, stop=(stop,))
    assert len(first.text) < len(whole.text)
    second = talk(loop, messages, "And the ships?")
    evict(loop, pool=True)
    third = run(loop, [*messages, user("And then?")])
    fresh = loop_on(tmp_path / "fresh2")
    again: list[dict[str, str]] = []
    talk(fresh, again, LONG, stop=(stop,))
    assert talk(fresh, again, "And the ships?").ids == second.ids
    assert run(fresh, [*again, user("And then?")]).ids == third.ids


def test_a_lost_window_is_counted_and_an_earlier_checkpoint_serves(
    loop_on: MakeLoop, tmp_path: Path
) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, LONG)
    talk(loop, messages, "And the ships?" * 60)
    settle(loop)
    branch = memory_of(loop).branches[0]
    earlier = branch.checkpoints[0]
    asked = [*messages, user("And then?")]
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    expected = run(loop, asked)
    last = branch.runs[-2] if len(branch.tail) > 1 else branch.runs[-1]
    loop = loop_on(tmp_path / "copy")
    for path in (tmp_path / "copy").rglob(f"{last.id}.sliding.*"):
        path.unlink()
    answer = run(loop, asked)
    assert answer.cached in (earlier, 0)
    assert answer.ids == expected.ids
    assert sum(loop.memory.faults.values()) > 0


def test_a_turn_that_moves_goes_on_with_its_window(loop_on: MakeLoop, tmp_path: Path) -> None:
    whole = run(loop_on(tmp_path / "whole"), [user(LONG)], n=60)
    source, target = loop_on(node="n0", delay=0.01), loop_on(node="n1")
    stream = start(source, [user(LONG)], n=60)
    seen = list(stream.take(20))
    source.call(lambda: source.handoff.freeze(agent_id())).result(10)[1].result(10)
    target.memory.adopt(agent_id())
    source.call(lambda: source.handoff.release(agent_id())).result(10)
    moved = stream.result()
    assert isinstance(moved.last, TurnMoved)
    assert moved.ids[:20] == seen
    answer = run(target, [user(LONG)], n=60)
    assert answer.ids == whole.ids
    settle(target)
    card = target.memory.store.latest(agent_id(), target.memory.key)
    assert card is not None
    assert not target.memory.faults


@pytest.mark.parametrize(("size", "first", "second"), [(125, 378, 110), (300, 250, 60)])
def test_a_longer_reply_in_place_of_another_keeps_its_window(
    tmp_path: Path, size: int, first: int, second: int
) -> None:
    """The tail was cut behind its last checkpoint, then became a block."""
    texts = []
    for park in (False, True):
        loop = make_loop(FakeEngine(4, window=size), tmp_path / str(park))
        messages: list[dict[str, str]] = []
        talk(loop, messages, "x" * first)
        messages.append(user("y" * (2 if size < 256 else 195)))
        run(loop, messages, n=12)
        settle(loop)
        longer = run(loop, messages, n=second, temperature=1.0, seed=0)
        if park:
            evict(loop, pool=True)
        messages.append(assistant(longer.text))
        last = run(loop, [*messages, user("z")], n=30)
        assert last.cached == len(last.prompt) - 5
        assert not loop.memory.faults
        texts.append(last.ids)
        loop.close()
    assert texts[0] == texts[1]


def test_a_turn_cancelled_before_it_repeats_the_last_one_harms_nobody(
    loop_on: MakeLoop,
) -> None:
    loop, messages = loop_on(delay=0.005), []
    other = start(loop, [user("hello")], session="b", n=150, turn_id="other")
    talk(loop, messages, "x" * 100)
    loop.memory.commits.settle().result(10)
    loop.call(loop.residency.evict_idle).result(10)
    again = start(loop, messages[:-1], turn_id="again")
    loop.cancel("again")
    again.result()
    assert other.result().reason in ("length", "stop")


def test_a_missing_block_before_the_window_harms_nobody(loop_on: MakeLoop, tmp_path: Path) -> None:
    loop, messages = loop_on(delay=0.002), []
    talk(loop, messages, LONG)
    evict(loop, pool=True)
    (branch,) = memory_of(loop).branches
    for path in (tmp_path / "store").rglob(f"{branch.blocks[1].id}.full.*"):
        path.unlink()
    other = start(loop, [user("hello")], session="b", n=150, turn_id="other")
    answer = run(loop, [*messages, user("And then?")])
    assert (answer.cached, answer.cache) == (0, "cold")
    assert loop.memory.faults["missing"] > 0
    assert other.result().reason in ("length", "stop")


SYSTEM = {"role": "system", "content": "You know all of the sea, and speak in verse of it. " * 8}


def opening_of(system: dict[str, str], window: int) -> int:
    """Where its window is kept: at its end, or where that window is too short, a block's end."""
    n = len(system["content"]) + 3  # <|system|> and <|end|>, and <|user|>
    return n if window == WINDOW else n // 256 * 256


@pytest.mark.parametrize("parked", ["hot", "pool", "store", "restart"])
def test_a_conversation_that_begins_anew_keeps_its_system_prompt(
    loop_on: MakeLoop, tmp_path: Path, parked: str, window: int
) -> None:
    loop, messages = loop_on(), [SYSTEM]
    talk(loop, messages, LONG)
    for question in ("And the ships?", LONG[:400], "Who built them?", "Of what?"):
        talk(loop, messages, question)
    if parked == "restart":
        settle(loop)
        loop.close()
        loop = loop_on()
    elif parked != "hot":
        evict(loop, pool=parked == "store")
    opening = opening_of(SYSTEM, window)
    for question in ("What of the mountains?", LONG[:200] + "?"):
        anew = run(loop, [SYSTEM, user(question)])
        assert anew.cached == opening
        fresh = run(loop_on(tmp_path / f"fresh{question[:4]}"), [SYSTEM, user(question)])
        assert anew.ids == fresh.ids
    settle(loop)
    assert all(branch.checkpoints[0] == opening for branch in memory_of(loop).branches)
    assert not loop.memory.faults
    evict(loop, pool=True)
    assert talk(loop, messages, "And now?").prefilled < 20  # the first one is as it was


def test_a_prefill_pauses_only_where_a_window_is_to_be_kept(
    loop_on: MakeLoop, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    loop, messages = loop_on(), [SYSTEM]
    steps: list[tuple[int, int]] = []
    step = loop.engine.step

    def watched(chunks: Sequence[Chunk]) -> dict[int, Logits]:
        steps.extend((c.start, len(c.token_ids)) for c in chunks if len(c.token_ids) > 1)
        return step(chunks)

    monkeypatch.setattr(loop.engine, "step", watched)
    first = talk(loop, messages, LONG)
    opening, end = opening_of(SYSTEM, window), len(first.prompt)
    stops = [0, opening, *([] if opening == 256 else [512])]
    stops += range(stops[-1] + 512, end - 1, 512)
    assert [start for start, _ in steps] == stops
    assert sum(n for _, n in steps) == end
    steps.clear()
    rows = end + len(first.ids) - (first.reason == "length")
    second = talk(loop, messages, LONG[:300])
    block = -(-rows // 256) * 256
    assert [start for start, _ in steps] == [second.cached, block]
    steps.clear()
    run(loop, [user(LONG)], session="none")
    assert [start for start, _ in steps] == [0, 512]  # no system prompt, nothing to keep


def test_a_long_turn_leaves_the_checkpoint_before_it_whole(
    loop_on: MakeLoop, tmp_path: Path, window: int
) -> None:
    """The block in which it lies is filled by a prefill of more than a window. A window that does
    not reach to the block's end cannot be kept."""
    loop, messages = loop_on(), []
    talk(loop, messages, LONG[:400])
    settle(loop)
    end = memory_of(loop).branches[0].rows
    assert end % 256
    talk(loop, messages, LONG)
    evict(loop, pool=True)
    edited = [*messages[:2], user("What of the mountains?")]
    answer = run(loop, edited)
    assert answer.cached == (end if window == WINDOW else 0)
    assert answer.ids == run(loop_on(tmp_path / "fresh"), edited).ids
    assert not loop.memory.faults
