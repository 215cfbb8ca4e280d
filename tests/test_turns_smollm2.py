"""Turns of a real model with its real template: the seam, side requests, restart, move, codecs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.engines.base import Engine
from actors.loop import ReplicaLoop
from actors.turn import Resume, TurnMoved
from tests.loops import (
    WAIT,
    Answer,
    agent_id,
    assistant,
    block_files,
    evict,
    make_loop,
    memory_of,
    run,
    settle,
    start,
    user,
)

pytestmark = pytest.mark.model

MakeLoop = Callable[..., ReplicaLoop]
Messages = list[dict[str, str]]
STORY = (
    "The sea was calm that morning, and the fishermen went out early. They rowed past the old "
    "lighthouse, where the keeper used to wave to them with a white cloth, and set their nets in "
    "the deep water behind the island. Nobody spoke much. The youngest of them, a boy of fifteen, "
    "had never been out so far, and he watched the coast until it was only a thin grey line. "
    "Toward noon the wind turned. The oldest man looked at the sky, said that they would have rain "
    "before the evening, and began to pull in the first of the nets. It was heavy. Two others came "
    "to help him, and when the net rose out of the water they saw that it was full of herring, "
    "more than any of them had seen since the spring. The boy laughed out loud. Then the first "
    "drops fell, the boat began to roll, and they turned her bow toward the harbour, where a lamp "
    "had been lit in the window of the inn although it was still day. What is this story about?"
)
START, END = 1, 2  # <|im_start|>, which the file also calls BOS, and <|im_end|>


@pytest.fixture(scope="module")
def engine(smollm2_gguf: Path) -> Iterator[Engine]:
    from actors.engines.llama_engine import LlamaEngine

    made = LlamaEngine(smollm2_gguf, n_seq_max=3, n_ctx=2048, n_cells=4096, n_threads=2)
    close = made.close
    made.close = lambda: None  # type: ignore[method-assign]  # outlives the loops
    yield made
    close()


@pytest.fixture
def loop_on(engine: Engine, tmp_path: Path) -> Iterator[MakeLoop]:
    """One loop after another on the one engine, which starts empty each time."""
    loops: list[ReplicaLoop] = []

    def make(name: str = "store", **options: Any) -> ReplicaLoop:
        for loop in loops:
            if loop.alive:
                loop.close()
        for seq_id in range(engine.n_seq_max):
            engine.truncate(seq_id, 0)
        loops.append(make_loop(engine, tmp_path / name, **options))
        return loops[-1]

    yield make
    for loop in loops:
        if loop.alive:
            loop.close()


def talk(loop: ReplicaLoop, messages: Messages, question: str, **options: Any) -> Answer:
    """One more question of a conversation; its reply is appended to `messages`."""
    messages.append(user(question))
    answer = run(loop, messages, **options)
    messages.append(assistant(answer.text))
    return answer


def new_part(loop: ReplicaLoop, question: str) -> list[int]:
    """What the template adds between a reply and the next one."""
    text = f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return loop.engine.vocab.tokenize(text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n": 2, "temperature": 0.0}, "length"),
        ({"n": 2, "temperature": 1.3, "seed": 3}, "length"),
        ({"n": 200, "temperature": 0.0}, "stop"),
        ({"n": 200, "temperature": 0.8, "seed": 5}, "stop"),
    ],
)
def test_turn_two_prefills_only_its_new_message(
    loop_on: MakeLoop, options: dict[str, Any], reason: str
) -> None:
    loop, messages = loop_on(), []
    question = "Say hello, please."
    first = talk(loop, messages, question, **options)
    assert first.reason == reason
    assert first.prompt.count(START) == 3  # the template's system message, the user, the assistant
    assert first.prompt[0] == START
    assert first.prompt[1] != START
    second = talk(loop, messages, "Why?", n=5)
    new = new_part(loop, "Why?")
    assert second.prompt == [*first.prompt, *first.ids, *new]
    assert second.prefilled == len(new) + (reason == "length")
    evict(loop, pool=True)
    third = talk(loop, messages, "Really?", n=5)
    assert third.prompt == [*second.prompt, *second.ids, *new_part(loop, "Really?")]
    assert third.prefilled == len(new_part(loop, "Really?")) + (len(second.ids) == 5)
    assert third.cache == "warm"


def test_a_reply_cut_by_a_stop_string_leaves_no_hidden_token(loop_on: MakeLoop) -> None:
    loop, messages = loop_on(), []
    question = "Count from one to ten in words."
    whole = run(loop, [user(question)], session="look", n=24)
    at = len(whole.text) * 2 // 3
    stop = whole.text[at : at + 3]
    shown = whole.text[: whole.text.index(stop)]
    first = talk(loop, messages, question, n=24, stop=(stop,))
    assert (first.text, first.reason) == (shown, "stop")
    settle(loop)
    branch = memory_of(loop).branches[0]
    kept = branch.tokens[len(first.prompt) :]
    assert kept == whole.ids[: len(kept)]
    vocab = loop.engine.vocab
    cut = b"".join(map(vocab.token_bytes, kept)).decode()
    assert shown.startswith(cut)
    second = talk(loop, messages, "Go on.", n=5)
    rest = vocab.tokenize(shown[len(cut) :]) + new_part(loop, "Go on.")
    assert len(second.prompt) <= len(branch.tokens) + len(rest)
    assert second.prompt[: len(first.prompt) + len(kept)] == first.prompt + kept
    assert second.cached == len(first.prompt) + len(kept)


def test_a_side_request_costs_the_conversation_nothing(loop_on: MakeLoop) -> None:
    loop, messages = loop_on(), []
    talk(loop, messages, "Name one river.", n=8)
    run(loop, [user("A title of three words for a talk about rivers, please.")], n=8)
    run(loop, [*messages, user("Make a title of three words for this talk.")], n=8)
    second = talk(loop, messages, "And one mountain?", n=8)
    assert second.prefilled <= len(new_part(loop, "And one mountain?")) + 1


def test_restored_f16_memory_gives_the_undisturbed_text(loop_on: MakeLoop) -> None:
    asked = "Who laughed?"
    texts = []
    for disturb in ("not", "store", "restart"):
        loop, messages = loop_on(disturb), []
        first = talk(loop, messages, STORY, n=24)
        settle(loop)
        if disturb == "restart":
            loop = loop_on(disturb)
        elif disturb != "not":
            evict(loop, pool=True)
        second = talk(loop, messages, asked, n=24)
        assert second.cached == len(first.prompt) + len(first.ids) - (first.reason == "length")
        assert second.cache == ("hot" if disturb == "not" else "warm")
        assert not loop.memory.faults
        texts.append((first.ids, second.ids, second.text))
    assert all(text == texts[0] for text in texts)


def test_q4_memory_equals_the_run_parked_at_the_same_token(
    loop_on: MakeLoop, tmp_path: Path
) -> None:
    runs = []
    for disturb in ("pool", "restart", "twice"):
        loop, messages = loop_on(disturb, codec="q4"), []
        talk(loop, messages, STORY, n=24)
        settle(loop)
        stored = block_files(tmp_path / disturb)
        if disturb == "pool":
            evict(loop)
        else:
            loop = loop_on(disturb, codec="q4")
        if disturb == "twice":  # in and out once more, before the same question
            loop.memory.open(agent_id())
            settle(loop)
            loop = loop_on(disturb, codec="q4")
        second = talk(loop, messages, "Who laughed?", n=16)
        settle(loop)
        after = block_files(tmp_path / disturb)
        assert {name: after[name] for name in stored} == stored
        runs.append(second.ids)
    assert runs[0] == runs[1] == runs[2]


def test_a_turn_that_moves_gives_the_undisturbed_text(loop_on: MakeLoop) -> None:
    undisturbed = run(loop_on("alone"), [user(STORY)], n=40)
    source = loop_on()
    stream = start(source, [user(STORY)], n=40)
    stream.take(10)
    source.call(lambda: source.handoff.freeze(agent_id())).result(WAIT)[1].result(WAIT)
    source.call(lambda: source.handoff.release(agent_id())).result(WAIT)
    moved = stream.result()
    assert isinstance(moved.last, TurnMoved)
    target = loop_on(node="n1")
    resume = Resume(tuple(moved.prompt), tuple(moved.ids))
    rest = start(target, [user(STORY)], n=40, attempt=1, resume=resume).result()
    assert moved.ids + rest.ids == undisturbed.ids
    assert moved.text + rest.text == undisturbed.text
    assert rest.cache == "remote"
    assert rest.cached == len(rest.prompt)
