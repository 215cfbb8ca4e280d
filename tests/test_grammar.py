"""Structured output: masks keep the form, replays rebuild it, what cannot be is refused by name."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from actors.engines.base import Engine, Vocab
from actors.engines.fake_engine import FakeEngine, FakeVocab
from actors.errors import EngineFault, InvalidRequest, Overloaded
from actors.grammar import MAX_SOURCE, Grammar, GrammarCompiler
from actors.loop import ReplicaLoop
from actors.turn import Guide, Resume, TurnFailed
from tests.loops import Answer, make_loop, run, settle, start, user

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "grün", "🙂"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}


def json_guide(schema: Any) -> Guide:
    return Guide("json", json.dumps(schema), "form")


def valid(text: str, schema: dict[str, Any] = SCHEMA) -> Any:
    value = json.loads(text)
    jsonschema.validate(value, schema)
    return value


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(FakeVocab())


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[ReplicaLoop]:
    made = make_loop(FakeEngine(), tmp_path)
    yield made
    made.close()


def allowed(grammar: Grammar) -> set[int]:
    return set(np.flatnonzero(grammar.mask()).tolist())


def walk(grammar: Grammar, text: str) -> None:
    for token in FakeVocab().tokenize(text):
        assert token in allowed(grammar)
        grammar.accept(token)


# ---- masks


def test_a_mask_lets_through_what_the_form_allows(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Guide("regex", "[ab]c|d?", "form"))
    assert allowed(grammar) == {*b"abd", *FakeVocab().eog}
    grammar.accept(ord("a"))
    assert allowed(grammar) == {ord("c")}
    assert not grammar.complete
    grammar.accept(ord("c"))
    assert grammar.complete


@pytest.mark.parametrize(
    ("guide", "text"),
    [
        (json_guide(SCHEMA), '{"name":"Ann","age":7,"tags":["red","🙂"],"ok":true}'),
        (json_guide({"type": "object"}), '{"a":{"b":[1,"c",null]}}'),
        (Guide("regex", r"\d{3}-[a-zé]+!", "form"), "123-abé!"),
        (Guide("choice", json.dumps(['say "no"\n', "été 🙂"]), "form"), 'say "no"\n'),
        (Guide("choice", json.dumps(['say "no"\n', "été 🙂"]), "form"), "été 🙂"),
        (Guide("grammar", 'start: "<" WORD ">"\nWORD: /[a-z]+/', "form"), "<abc>"),
    ],
    ids=str,
)
def test_a_grammar_follows_a_text_to_its_end(
    compiler: GrammarCompiler, guide: Guide, text: str
) -> None:
    grammar = compiler.compile(guide)
    walk(grammar, text)
    assert grammar.complete


def test_json_is_compact(compiler: GrammarCompiler) -> None:
    """A small model may put out white space for ever where it is free to."""
    grammar = compiler.compile(json_guide(SCHEMA))
    walk(grammar, "{")
    assert allowed(grammar) == {ord('"')}


def test_control_tokens_and_broken_characters_are_in_no_text(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Guide("regex", "(?s:.*)", "form"))
    ids = allowed(grammar)
    assert {*b"a\n ", 0xF0, 0xC3} <= ids
    assert not ids & {0x80, 0xFF, *range(256, FakeVocab().size)} - FakeVocab().eog


def test_a_token_that_is_not_allowed_is_a_fault(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(Guide("regex", "ab", "form"))
    with pytest.raises(EngineFault):
        grammar.accept(ord("z"))


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_a_replayed_grammar_is_where_the_first_one_was(compiler: GrammarCompiler, cut: int) -> None:
    ids = FakeVocab().tokenize('{"name":"Ann","age":7,"tags":["grün"],"ok":true}')
    first = compiler.compile(json_guide(SCHEMA))
    for token in ids[:cut]:
        first.accept(token)
    second = compiler.compile(json_guide(SCHEMA), ids[:cut])
    for token in ids[cut:]:
        assert (first.mask() == second.mask()).all()
        first.accept(token)
        second.accept(token)
    assert first.complete
    assert second.complete


# ---- refusals


DEEP = "{}"
for _ in range(300):
    DEEP = '{"type":"object","properties":{"a":%s}}' % DEEP  # noqa: UP031


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json", "{"),
        ("json", "[1]"),
        ("json", '{"type": "wizard"}'),
        ("json", '{"type": "integer", "minimum": 5, "maximum": 3}'),
        ("json", '{"$ref": "http://example.com/schema"}'),
        ("json", '{"$ref": "#"}'),
        ("json", '{"type": "string", "pattern": "(a"}'),
        ("json", '{"const": "\\ud800"}'),
        ("json", DEEP),
        ("json", '{"type": "string"}' + " " * MAX_SOURCE),
        ("regex", "(a"),
        ("regex", "(?=a)b"),
        ("regex", r"[^\s\S]"),
        ("regex", "(" * 5000 + "a" + ")" * 5000),
        ("grammar", ""),
        ("grammar", 'start: "a" | missing'),
        ("grammar", "start: start"),
        ("grammar", 'root ::= "a"'),
        ("grammar", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
        ("grammar", "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40))
         + '\nA40: "a"'),
    ],
    ids=lambda x: str(x)[:30],
)  # fmt: skip
def test_what_is_malformed_or_impossible_is_refused(
    compiler: GrammarCompiler, kind: Any, source: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(Guide(kind, source, "form.field"))
    assert caught.value.param == "form.field"
    assert len(caught.value.message) < 600
    assert compiler.compile(Guide("regex", "a", "form"))  # the next one is none the worse


CHAINS = '''
from actors.engines.fake_engine import FakeVocab
from actors.errors import InvalidRequest
from actors.grammar import MAX_SOURCE, GrammarCompiler
from actors.turn import Guide

def chain(first, rule, last):
    """As many rules, each of the next, as fit."""
    text, i = first, 0
    while len(text) < MAX_SOURCE - 100:
        text += rule.format(i, i + 1)
        i += 1
    return text + last.format(i)

compiler = GrammarCompiler(FakeVocab())
for kind, source in (
    ("grammar", chain("start:r0\\n", "r{0:x}:r{1:x}\\n", "r{0:x}:/a+/")),
    ("grammar", chain("start:R0\\n", "R{0}:R{1}\\n", "R{0}:/a+/")),
    ("json", chain('{{"$defs":{{'.format(), '"d{0}":{{"$ref":"#/$defs/d{1}"}},',
                   '"d{0}":{{"type":"integer"}}}},"$ref":"#/$defs/d0"}}')),
    ("json", chain('{{"$defs":{{'.format(), '"d{0}":{{"items":{{"$ref":"#/$defs/d{1}"}}}},',
                   '"d{0}":{{"type":"integer"}}}},"$ref":"#/$defs/d0"}}')),
):
    try:
        grammar = compiler.compile(Guide(kind, source, "form"))
    except InvalidRequest as error:
        print("refused", str(error)[:80])
        continue
    for _ in range(20):
        token = int(grammar.mask().nonzero()[0][0])
        if token > 255 or grammar.complete:
            break
        grammar.accept(token)
    print("compiled")
print("alive")
'''


def test_the_longest_chain_of_rules_does_not_end_the_process() -> None:
    """llguidance recurses natively: a stack that overflows takes the replica with it."""
    done = subprocess.run(
        [sys.executable, "-c", CHAINS], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.endswith("alive\n"), (done.returncode, done.stdout, done.stderr[-500:])
    assert "compiled" in done.stdout


def test_a_compilation_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Event()
    monkeypatch.setattr("actors.grammar._COMPILE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(GrammarCompiler, "_compile", lambda *_: slow.wait(30))
    try:
        with pytest.raises(InvalidRequest, match="too long"):
            GrammarCompiler(FakeVocab()).compile(json_guide(SCHEMA))
    finally:
        slow.set()


@dataclass
class Beside:
    """A compiler that is at a slow source until `gate` is set, and another's request behind it."""

    compiler: GrammarCompiler
    slow: Future[Grammar]
    innocent: Future[Grammar]
    gate: threading.Event


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Beside]:
    """The parameter: seconds that one waits for others'."""
    entered, gate, compiled = threading.Event(), threading.Event(), GrammarCompiler._compile

    def compile_(self: GrammarCompiler, guide: Guide) -> Grammar:
        if guide.param == "slow":
            entered.set()
            assert gate.wait(30)
        return compiled(self, guide)

    monkeypatch.setattr(GrammarCompiler, "_compile", compile_)
    monkeypatch.setattr("actors.grammar._COMPILE_TIMEOUT_S", 1.0)
    monkeypatch.setattr("actors.grammar._BUSY_TIMEOUT_S", request.param)
    compiler = GrammarCompiler(FakeVocab())
    compiler.warm()
    # Its parts wait for the compiler as others' do: then none of them is to blame.
    slow = Guide("regex", "b", "slow", (Guide("regex", "a", "part"),) * 9)
    with ThreadPoolExecutor(2) as askers:
        refused = askers.submit(compiler.compile, slow)
        assert entered.wait(30)
        yield Beside(compiler, refused, askers.submit(compiler.compile, json_guide(SCHEMA)), gate)
        gate.set()


@pytest.mark.parametrize("beside", [30.0], indirect=True)
def test_who_waits_behind_a_slow_compilation_is_not_refused(beside: Beside) -> None:
    with pytest.raises(TimeoutError):
        beside.innocent.result(1.5)
    beside.gate.set()
    walk(beside.innocent.result(30), '{"name":"')


@pytest.mark.parametrize("beside", [1.0], indirect=True)
def test_who_waits_too_long_for_the_compiler_may_come_again(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Overloaded, match="other requests") as caught:
        beside.innocent.result(30)
    assert caught.value.retry_after > 0
    with pytest.raises(InvalidRequest, match="slow: too complex"):
        beside.slow.result(30)
    monkeypatch.setattr("actors.grammar._BUSY_TIMEOUT_S", 30.0)
    beside.gate.set()
    walk(beside.compiler.compile(json_guide(SCHEMA)), '{"name":"')


@pytest.mark.slow
def test_a_step_that_costs_too_much_is_refused(compiler: GrammarCompiler) -> None:
    """An ambiguous grammar grows with every token; the engine's thread must not."""
    grammar = compiler.compile(Guide("grammar", 'start: s\ns: s s | s s s | "a" |', "form"))

    def go_on() -> None:
        for _ in range(2000):
            grammar.mask()
            grammar.accept(ord("a"))

    with pytest.raises(InvalidRequest) as caught:
        go_on()
    assert caught.value.param == "form"


# ---- turns


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_replies_are_valid_whatever_is_drawn(loop: ReplicaLoop, temperature: float) -> None:
    texts = set()
    for seed in range(12):
        answer = run(
            loop, [user(f"Say {seed}.")], n=200, temperature=temperature, seed=seed,
            session=f"s{seed}", guide=json_guide(SCHEMA),
        )  # fmt: skip
        assert answer.reason == "stop"
        valid(answer.text)
        texts.add(answer.text)
    assert len(texts) > 6


def test_a_reply_ends_with_its_form(loop: ReplicaLoop) -> None:
    answer = run(loop, [user("Go.")], n=50, guide=Guide("regex", "[ab]{5}", "form"))
    assert re.fullmatch("[ab]{5}", answer.text)
    assert (answer.reason, len(answer.ids)) == ("stop", 5)
    full = run(loop, [user("Go.")], n=5, session="b", guide=Guide("regex", "[ab]{5}", "form"))
    assert full.reason == "stop"  # and not of its length: it is complete


def test_the_end_of_a_form_shows_what_was_held_back(loop: ReplicaLoop) -> None:
    answer = run(loop, [user("Go.")], stop=("STOP",), guide=Guide("regex", "abcST", "form"))
    assert (answer.text, answer.reason) == ("abcST", "stop")


@pytest.mark.parametrize("n", [1, 7, 20])
def test_a_reply_may_be_cut_short(loop: ReplicaLoop, n: int) -> None:
    answer = run(loop, [user("Go.")], n=n, guide=json_guide(SCHEMA))
    assert (answer.reason, len(answer.ids)) == ("length", n)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.slow
def test_a_turn_resumed_in_the_middle_ends_as_the_undisturbed_one(
    tmp_path: Path, temperature: float
) -> None:
    options: dict[str, Any] = {
        "n": 200, "temperature": temperature, "seed": 5, "guide": json_guide(SCHEMA),
        "presence_penalty": 0.5, "repetition_penalty": 1.2, "top_k": 30,
    }  # fmt: skip
    loop = make_loop(FakeEngine(), tmp_path / "one")
    whole = run(loop, [user("Go.")], **options)
    loop.close()
    valid(whole.text)
    for cut in range(len(whole.ids) + 1):
        other = make_loop(FakeEngine(), tmp_path / "other", node=f"n{cut}")
        resume = Resume(tuple(whole.prompt), tuple(whole.ids[:cut]))
        rest = run(
            other, [user("Go.")], attempt=1, resume=resume, **options | {"n": len(whole.ids)}
        )
        other.close()
        assert whole.ids[:cut] + rest.ids == whole.ids
        assert rest.reason == "stop"


def test_an_impossible_form_is_refused_before_the_agent_is_touched(loop: ReplicaLoop) -> None:
    answer = run(loop, [user("Go.")], guide=json_guide({"type": "wizard"}))
    assert isinstance(answer.last, TurnFailed)
    assert isinstance(answer.last.error, InvalidRequest)
    assert answer.last.error.param == "form"
    assert loop.memory.agents() == []
    assert run(loop, [user("Go.")]).reason in ("stop", "length")


@pytest.mark.slow
def test_a_form_that_fails_in_the_middle_ends_its_own_turn_only(loop: ReplicaLoop) -> None:
    """At whatever row: also where its last step filled a block."""
    bad = Guide("grammar", 'start: s\ns: s s | s s s | "a" |', "form")
    other = start(loop, [user("Count.")], session="b", n=3000, ignore_eos=True, turn_id="other")
    question = "Go."
    for session in ("one", "two"):
        answer = run(
            loop, [user(question)], n=2000, session=session, guide=bad, logit_bias=((97, 50.0),)
        )
        assert isinstance(answer.last, TurnFailed), answer.last
        assert isinstance(answer.last.error, InvalidRequest)
        n_rows = len(answer.prompt) + len(answer.ids)
        question += "." * (256 - n_rows)
    assert n_rows == 256
    loop.cancel("other")
    assert other.result().reason in ("cancelled", "length")  # on a slow machine it is over
    settle(loop)
    assert run(loop, [user("Go.")], n=5).reason in ("stop", "length")


def test_stop_tokens_end_a_reply_and_are_no_part_of_it(loop: ReplicaLoop) -> None:
    plain = run(loop, [user("Go.")], n=30, session="a")
    stop = plain.ids[10]
    answer = run(loop, [user("Go.")], n=30, session="b", stop_token_ids=(stop,))
    assert answer.ids == plain.ids[: plain.ids.index(stop)]
    assert answer.reason == "stop"


def test_ignore_eos_goes_on_to_the_length(loop: ReplicaLoop) -> None:
    options: dict[str, Any] = {"n": 400, "temperature": 1.0, "seed": 1}
    assert run(loop, [user("Go.")], session="a", **options).reason == "stop"
    answer = run(loop, [user("Go.")], session="b", ignore_eos=True, **options)
    assert (answer.reason, len(answer.ids)) == ("length", 400)


def test_log_probabilities_come_with_every_token(loop: ReplicaLoop) -> None:
    stream = start(loop, [user("Go.")], n=30, temperature=1.5, logprobs=2, stop=("zzz",))
    told = [(i, entry) for item in stream for i, entry in _told(item)]
    answer = stream.answer
    vocab: Vocab = loop.engine.vocab
    assert [i for i, _ in told] == answer.ids
    assert [entry.raw for _, entry in told] == [vocab.token_bytes(i) for i in answer.ids]
    for _, entry in told:
        assert len(entry.top) == 2
        assert entry.logprob <= entry.top[0][1] < 0
        assert entry.top[0][1] >= entry.top[1][1]
    silent = list(start(loop, [user("Go.")], n=3, session="b"))
    assert not any(_told(item) for item in silent)


def _told(item: Any) -> list[Any]:
    if not getattr(item, "logprobs", ()):
        return []
    return list(zip(item.ids, item.logprobs, strict=True))


# ---- a real model


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Iterator[Engine]:
    from actors.engines.llama_engine import LlamaEngine

    made = LlamaEngine(smollm2_gguf, n_seq_max=2, n_ctx=1024, n_cells=2048, n_threads=2)
    close = made.close
    made.close = lambda: None  # type: ignore[method-assign]  # outlives the loops
    yield made
    close()


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "city": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "city", "age"],
    "additionalProperties": False,
}
ASK = [user("Ann is 31 years old and lives in Paris. Tell me about Ann, in JSON.")]


def on_model(engine: Engine, folder: Path, **options: Any) -> Answer:
    for seq_id in range(engine.n_seq_max):
        engine.truncate(seq_id, 0)
    loop = make_loop(engine, folder)
    try:
        return run(loop, ASK, n=100, guide=json_guide(PERSON), **options)
    finally:
        loop.close()


@pytest.mark.model
def test_a_real_model_keeps_a_schema(smollm2: Engine, tmp_path: Path) -> None:
    for seed in range(4):
        answer = on_model(smollm2, tmp_path / str(seed), temperature=1.0, seed=seed)
        assert answer.reason == "stop"
        valid(answer.text, PERSON)


@pytest.mark.model
def test_a_real_model_resumed_in_the_middle_says_the_same(smollm2: Engine, tmp_path: Path) -> None:
    whole = on_model(smollm2, tmp_path / "whole")
    valid(whole.text, PERSON)
    for cut in (1, len(whole.ids) // 2, len(whole.ids) - 1):
        resume = Resume(tuple(whole.prompt), tuple(whole.ids[:cut]))
        rest = on_model(smollm2, tmp_path / f"cut{cut}", attempt=1, resume=resume)
        assert whole.ids[:cut] + rest.ids == whole.ids
        assert rest.reason == whole.reason == "stop"
