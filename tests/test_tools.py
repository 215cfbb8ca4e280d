"""Calls of tools: formats, the parser at every split, grammars, templates, token-faithful calls."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engines.base import Engine
from actors.engines.fake_engine import FakeEngine, FakeVocab
from actors.errors import InvalidRequest
from actors.grammar import MAX_CALLS, GrammarCompiler
from actors.loop import ReplicaLoop
from actors.prompt import ChatTemplate, EmittedReply
from actors.tool_messages import ToolStyle
from actors.tool_parser import CallDelta, CallParser, parse
from actors.tools import FORMATS, HERMES, CallFormat, guide
from actors.turn import Guide, Message, SamplingParams, Tool, ToolUse, TurnRequest
from tests.loops import Answer, Stream, agent_id, make_loop, memory_of, settle, user

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["°C", "°F"]},
    },
    "required": ["city", "days"],
}
TIME: dict[str, Any] = {"type": "object", "properties": {"utc": {"type": "boolean"}}}


def tool(name: str, schema: Any) -> Tool:
    return Tool(name, f"tells the {name}", json.dumps(schema))


TOOLS = (tool("weather", WEATHER), tool("time", TIME))
MISTRAL, ARGS, LLAMA = (FORMATS[name] for name in ("mistral", "mistral-args", "llama3"))


# ---- the parser

ONE = [("weather", '{"city": "Zürich", "days": 3}')]
TWO = [("weather", '{"city": "}\\"{\\\\", "a": [{}, "]"]}'), ("time", "{}")]
OBJECT = '{"city": "Zürich", "days": 3}'

SAID: list[tuple[CallFormat, str, str, list[tuple[str, str]]]] = [
    *((form, form.text(ONE), "", ONE) for form in FORMATS.values()),
    *((form, form.text(TWO), "", TWO) for form in (HERMES, MISTRAL, ARGS)),
    *((form, f"\n {form.text(ONE)}\n", "", ONE) for form in FORMATS.values()),
    *((form, " Hello, 1 < 2!\n", " Hello, 1 < 2!\n", []) for form in FORMATS.values()),
    *((form, " \n", " \n", []) for form in FORMATS.values()),
    *((form, "", "", []) for form in FORMATS.values()),
    *((f, f"Wait. {f.text(ONE)}", "Wait. ", ONE) for f in (HERMES, MISTRAL, ARGS)),
    *((f, f"{f.text(ONE)}\nDone.", "\nDone.", ONE) for f in (HERMES, MISTRAL, ARGS)),
    # Other white space than the models'.
    (HERMES, f'<tool_call>{{"name":"weather","arguments":{OBJECT}}}</tool_call>', "", ONE),
    (HERMES, f'{HERMES.text(ONE)} {HERMES.text(TWO)}', "", ONE + TWO),
    (MISTRAL, f'[TOOL_CALLS] [ {{ "name" : "weather", "arguments" : {OBJECT} }} ]', "", ONE),
    (LLAMA, f'{{ "name": "weather", "parameters": {OBJECT} }}'.replace("{ ", "{"), "", ONE),
    # Calls that are none.
    (HERMES, "a <tool_call> b", "a <tool_call> b", []),
    (HERMES, "a <tool_cal", "a <tool_cal", []),
    (HERMES, "<tool_call>\n[1]</tool_call>", "<tool_call>\n[1]</tool_call>", []),
    (HERMES, '<tool_call>\n{"name": "w", "argu', '<tool_call>\n{"name": "w", "argu', []),
    *((HERMES, text, text, []) for text in (
        '<tool_call>{"name": "a b", "arguments": {}}',
        '<tool_call>{"name": "a", "arguments": [1]}',
        '<tool_call>{"name": "", "arguments": {}}',
    )),
    (HERMES, f"<tool_call>{HERMES.text(ONE)}", "<tool_call>", ONE),
    (MISTRAL, "[TOOL_CALLS] no", "[TOOL_CALLS] no", []),
    (ARGS, "[TOOL_CALLS]weather", "[TOOL_CALLS]weather", []),
    (LLAMA, f"Hm: {LLAMA.text(ONE)}", f"Hm: {LLAMA.text(ONE)}", []),
    (LLAMA, '{"name": "Ann"}', '{"name": "Ann"}', []),
    (LLAMA, '{"names": 1}', '{"names": 1}', []),
    # Cut short: of a call that had begun, its arguments so far.
    (HERMES, HERMES.text(ONE).split(" 3")[0], "", [("weather", OBJECT.split(" 3")[0])]),
    (HERMES, HERMES.text(ONE)[:-3], "", ONE),
    (MISTRAL, MISTRAL.text(TWO)[:-2], "", TWO),
    (HERMES, f"{HERMES.text(ONE)}\n<tool_", "\n<tool_", ONE),
]  # fmt: skip


def read(form: CallFormat, pieces: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """As `parse`, from pieces; checks that a call's name comes first, and once."""
    parser, content, calls = CallParser(form), "", list[tuple[str, str]]()
    deltas: list[str | CallDelta] = []
    for piece in pieces:
        deltas += parser.push(piece)
    for delta in [*deltas, *parser.finish()]:
        if isinstance(delta, str):
            assert delta
            content += delta
        elif delta.name is not None:
            assert (delta.index, delta.arguments) == (len(calls), "")
            calls.append((delta.name, ""))
        else:
            assert delta.index == len(calls) - 1
            assert delta.arguments
            calls[-1] = calls[-1][0], calls[-1][1] + delta.arguments
    return content, calls


@pytest.mark.parametrize(("form", "text", "content", "calls"), SAID)
def test_a_reply_is_taken_apart_however_it_comes(
    form: CallFormat, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    assert parse(form, text) == (content, calls)
    for i in range(len(text) + 1):
        assert read(form, [text[:i], text[i:]]) == (content, calls), (text[:i], text[i:])
    assert read(form, text) == (content, calls)  # letter by letter


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_nothing_of_a_call_is_ever_content_and_arguments_come_as_they_are_said(
    form: CallFormat,
) -> None:
    parser = CallParser(form)
    lead = "" if form.leads else "Wait. "
    fragments = 0
    for letter in lead + form.text(ONE):
        for delta in parser.push(letter):
            assert isinstance(delta, CallDelta) or delta in lead
            fragments += isinstance(delta, CallDelta)
    assert fragments == 1 + len(OBJECT)
    assert not parser.cut
    assert parser.finish() == []


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_call_is_cut_while_its_arguments_lack_their_end(form: CallFormat) -> None:
    text = form.text(ONE)
    begins, ends = text.index(OBJECT), text.index(OBJECT) + len(OBJECT)
    for n in range(len(text) + 1):
        parser = CallParser(form)
        parser.push(text[:n])
        assert parser.cut == (begins < n < ends), text[:n]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[]<>é🙂 \n', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('k"{', max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
arguments = st.dictionaries(st.text('k"}é', max_size=3), values, max_size=3)
names = st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True)
forms = st.sampled_from(list(FORMATS.values()))


@given(forms, st.data(), st.booleans())
def test_what_a_format_writes_is_read_back(form: CallFormat, data: Any, ascii: bool) -> None:
    said = [
        (name, json.dumps(given, ensure_ascii=ascii))
        for name, given in data.draw(st.lists(st.tuples(names, arguments), min_size=1, max_size=3))
    ]
    said = said[:1] if form.between is None else said
    text = form.text(said)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert read(form, pieces) == ("", said)


words = st.sampled_from(
    ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[", "]", "[ARGS]", '{"name"', ': "', "f", '"',
     '", "arguments": ', '", "parameters": ', "{", "}", "}\n", "\n", " ", ", ", "<", "[TOOL", "x"]
)  # fmt: skip


@given(forms, st.lists(words, max_size=14), st.data())
def test_any_text_is_read_alike_in_any_pieces_and_none_is_lost(
    form: CallFormat, parts: list[str], data: Any
) -> None:
    text = "".join(parts)
    whole = parse(form, text)
    cut = data.draw(st.integers(0, len(text)))
    assert read(form, [text[:cut], text[cut:]]) == read(form, text) == whole
    if not whole[1]:
        assert whole[0] == text


# ---- grammars


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(FakeVocab())


def reach(compiler: GrammarCompiler, made: Guide | None, text: str) -> str:
    """How far the grammar follows a text, and "!" where it could end then."""
    assert made is not None
    grammar, vocab = compiler.compile(made), FakeVocab()
    ids = vocab.tokenize(text)
    for i, token in enumerate(ids):
        if not grammar.mask()[token]:
            return bytes(ids[:i]).decode()
        grammar.accept(token)
    may_end = grammar.complete or any(grammar.mask()[token] for token in vocab.eog)
    return text + "!" * may_end


GOOD = [("weather", '{"city": "Bern", "days": 3}'), ("time", '{"utc": true}')]


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_call_that_is_asked_for_is_all_that_can_be_said(
    compiler: GrammarCompiler, form: CallFormat
) -> None:
    one = ToolUse(TOOLS, "function", "weather")
    assert reach(compiler, guide(form, one), form.text(GOOD[:1])) == form.text(GOOD[:1]) + "!"
    assert "weather" not in reach(compiler, guide(form, one), form.text(GOOD[1:]))[:30]
    assert reach(compiler, guide(form, one), "Hello") == ""
    assert len(reach(compiler, guide(form, one), form.text(GOOD))) < len(form.text(GOOD))
    bad = form.text([("weather", '{"city": "Bern", "days": 30}')])
    assert reach(compiler, guide(form, one), bad) == bad[: bad.index("0}")]
    more = form.text([("weather", '{"city": "Bern", "days": 3, "x": 1}')])
    assert reach(compiler, guide(form, one), more) == more[: more.index('x"')]


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_several_calls_where_the_format_and_the_request_allow_them(
    compiler: GrammarCompiler, form: CallFormat, choice: Any
) -> None:
    several, single = ToolUse(TOOLS, choice), ToolUse(TOOLS, choice, parallel=False)
    for call in GOOD:
        text = form.text([call])
        assert reach(compiler, guide(form, several), text) == text + "!"
        assert reach(compiler, guide(form, single), text) == text + "!"
    both = form.text(GOOD)
    if form.between is not None:
        assert reach(compiler, guide(form, several), both) == both + "!"
    assert len(reach(compiler, guide(form, single), both)) < len(both)


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_a_free_reply_is_text_until_it_calls(compiler: GrammarCompiler, form: CallFormat) -> None:
    made = guide(form, ToolUse(TOOLS, "auto"))
    for text in ("", "Hello <b>[1]</b> {}", "\n\n", form.trigger[:-1]):
        assert reach(compiler, made, text) == text + "!"
    lead = "" if form.leads else "Wait.\n"
    text = lead + form.text(GOOD[:1])
    assert reach(compiler, made, text) == text + "!"
    unknown = lead + form.text([("wizard", "{}")])
    assert reach(compiler, made, unknown) == unknown[: unknown.index("izard")]
    cut = text[: text.index(" 3}")]
    assert reach(compiler, made, cut) == cut  # a call that has begun must end


def test_without_leave_to_call_the_reply_is_free() -> None:
    assert guide(HERMES, ToolUse(TOOLS, "none")) is None


def test_text_in_a_form_or_a_call(compiler: GrammarCompiler) -> None:
    form = Guide("json", json.dumps(TIME | {"additionalProperties": False}), "response_format")
    for call_format in (HERMES, MISTRAL, ARGS):
        made = guide(call_format, ToolUse(TOOLS, "auto"), form)
        assert reach(compiler, made, '{"utc":false}') == '{"utc":false}!'
        assert reach(compiler, made, "Hello") == ""
        text = call_format.text(GOOD[:1])
        assert reach(compiler, made, text) == text + "!"
    with pytest.raises(InvalidRequest) as caught:  # an object could be either
        guide(LLAMA, ToolUse(TOOLS, "auto"), form)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("source", ["{", "[]", "true", '{"type": "wizard"}', "[" * 20_000])
def test_a_broken_form_beside_tools_is_named(compiler: GrammarCompiler, source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        reach(compiler, guide(HERMES, ToolUse(TOOLS), Guide("json", source, "form")), "")
    assert caught.value.param == "form"


@pytest.mark.parametrize(
    ("schema", "given"),
    [
        ({"type": "object", "required": ["a"], "properties": {"b": {}}}, '{"a": 1}'),
        ({"properties": {"b": {}}, "additionalProperties": True}, '{"a": 1}'),
        ({"allOf": [{"properties": {"a": {"type": "integer"}}}], "properties": {}}, '{"a": 1}'),
        ({}, '{"a": 1}'),
    ],
)
def test_a_schema_that_is_open_stays_open(
    compiler: GrammarCompiler, schema: Any, given: str
) -> None:
    text = HERMES.text([("x", given)])
    made = guide(HERMES, ToolUse((tool("x", schema),), "required"))
    assert reach(compiler, made, text) == text + "!"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "wizard"}}},
        {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
        {"type": "object", "minProperties": 2, "maxProperties": 1},
        {"allOf": [{"type": "object"}, {"type": "string"}]},
    ],
    ids=str,
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_tool_that_cannot_be_called_is_named(
    compiler: GrammarCompiler, schema: Any, choice: Any
) -> None:
    made = guide(HERMES, ToolUse((*TOOLS, tool("broken", schema)), choice))
    assert made is not None
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(made)
    assert caught.value.param == "tools[2].function.parameters"
    assert caught.value.code == "invalid_value"


def test_tools_that_are_too_large_together_are_refused(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x" * 60_000]}}}
    made = guide(HERMES, ToolUse(tuple(tool(f"t{i}", schema) for i in range(5)), "auto"))
    assert made is not None
    assert len(made.source) > MAX_CALLS
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(made)
    assert caught.value.param == "tools"


def test_a_grammar_that_is_known_begins_anew(compiler: GrammarCompiler) -> None:
    """Tools come with every turn of an agent: each turn is at a place of its own."""
    made = guide(HERMES, ToolUse(TOOLS, "function", "time"))
    assert made is not None
    text = HERMES.text([("time", "{}")])
    half = len(text) // 2
    one = compiler.compile(made, text[:half].encode())
    assert reach(compiler, made, text) == text + "!"
    two = compiler.compile(made)
    for token in text[half:].encode():
        assert one.mask()[token]
        one.accept(token)
    assert one.complete
    assert not two.complete
    assert two.mask()[ord("<")]


def test_more_grammars_than_are_kept(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.grammar._MAX_KNOWN", 2)
    for _ in range(2):
        for name in ("a", "b", "c", "d"):
            made = guide(HERMES, ToolUse((tool(name, TIME),), "required"))
            text = HERMES.text([(name, '{"utc": true}')])
            assert reach(compiler, made, text) == text + "!"
            assert len(compiler._known) <= 2


def test_schemas_do_not_see_each_other(compiler: GrammarCompiler) -> None:
    """Each has definitions of its own."""
    tools = tuple(
        tool(kind, {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": kind}},
                    "required": ["a"]})
        for kind in ("boolean", "integer")
    )  # fmt: skip
    made = guide(HERMES, ToolUse(tools, "required"))
    for name, good, bad in (("boolean", "true", "7"), ("integer", "7", "true")):
        text = HERMES.text([(name, f'{{"a": {good}}}')])
        assert reach(compiler, made, text) == text + "!"
        assert not reach(compiler, made, text.replace(good, bad)).endswith("!")


# ---- templates

CHATML = (  # knows no tools
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\n' }}"
)
QWEN = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>"
    "\n{% endif %}{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}"
    "{% if m.role == 'tool' %}\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}{% if m.content %}\n{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}"
)
TEXTS = QWEN.replace("c.function.arguments | tojson", "c.function.arguments + ''")
STRIPS = QWEN.replace(
    "{{ m.content }}{% endif %}", "{{ m.content.split('</think>')[-1] }}{% endif %}"
)
NEMO = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{{ (c.function | tojson)[:-1] }}, "
    "{% if c.id|length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    '"id": "{{ c.id }}"}{{ "]" if loop.last else ", " }}{% endfor %}</s>'
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.tool_call_id }}:{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
).replace("tools and loop.last", "tools and loop.first")
SMALL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ tools | tojson if tools and loop.first }}"
    "[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}"
    "[/TOOL_RESULTS]{% else %}{{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]"
    "{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}</s>{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n"
    "{% if tools and loop.first %}{{ tools | tojson }}\n\n{% endif %}"
    "{% if m.tool_calls %}{% if m.tool_calls|length != 1 %}{{ raise_exception('one') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}<|start|>assistant<|end|>{{ '\n\n' }}"
)
XML = QWEN.replace('{"name": "{{ c', "<function={{ c").replace('", "arg', "><arg")
GEMMA = (  # no place for a system message, turns alternate
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate') }}{% endif %}"
    "<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}<turn>assistant{{ '\n' }}"
)
KNOWN = {
    "qwen": (QWEN, ToolStyle(HERMES, True)),
    "texts": (TEXTS, ToolStyle(HERMES, True, texts=True)),
    "strips": (STRIPS, ToolStyle(HERMES, True)),
    "nemo": (NEMO, ToolStyle(MISTRAL, True)),
    "small": (SMALL, ToolStyle(ARGS, True)),
    "llama3": (LLAMA3, ToolStyle(LLAMA, True)),
    "chatml": (CHATML, ToolStyle(HERMES, False)),
    "xml": (XML, ToolStyle(HERMES, False)),
    "gemma": (GEMMA, ToolStyle(HERMES, False, system=False)),
}


def template_of(source: str) -> ChatTemplate:
    """Jinja drops line breaks after its blocks; here they are meant."""
    vocab = FakeVocab()
    vocab.chat_template = source.replace("%}\n", "%}{{ '\n' }}")
    return ChatTemplate(vocab)


def called(calls: list[tuple[str, str]], content: str = "", first: int = 0) -> Message:
    made = tuple(
        {"id": f"call_{i}", "name": name, "arguments": given}
        for i, (name, given) in enumerate(calls, first)
    )
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(content: str, n: int = 0) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": f"call_{n}", "name": "weather"}


def odd(text: str) -> tuple[int, ...]:
    """Ids that no tokenizer would choose for the text."""
    return tuple(255 - byte for byte in text.encode())


@pytest.mark.parametrize(("source", "style"), KNOWN.values(), ids=KNOWN)
def test_how_a_template_takes_tools_is_found_out(source: str, style: ToolStyle) -> None:
    assert template_of(source).tools == style


@pytest.mark.parametrize("source", [s for s, _ in KNOWN.values()], ids=KNOWN)
def test_tools_calls_and_results_are_all_in_the_prompt(source: str) -> None:
    shown = template_of(source).render([user("Hot?"), called(ONE), result("Sunny.")], TOOLS)
    for part in ('"weather"', "tells the time", '"maxLength": 8', "Hot?", "Sunny.", "Zürich"):
        assert part in shown
    assert shown.index("tells the time") < shown.index("Zürich") < shown.index("Sunny.")


@pytest.mark.parametrize(
    ("name", "n_calls", "content"),
    [
        (name, n_calls, content)
        for name, (_, style) in KNOWN.items()
        for n_calls in (1, 2)
        for content in ("", "Wait.\n", "<think>hm</think>\n\n")
        if not style.form.leads or (n_calls == 1 and not content)  # such a reply is one call
    ],
)
def test_a_call_that_comes_back_is_the_ids_that_made_it(
    name: str, n_calls: int, content: str
) -> None:
    template = template_of(KNOWN[name][0])
    form = template.tools.form
    said, messages = content + form.text(GOOD[:n_calls]), [user("Hot?")]
    prompt = template.encode(messages, (), TOOLS)
    known, calls = parse(form, said)
    assert calls == GOOD[:n_calls]
    messages += [called(calls, known), *(result("Yes.", i) for i in range(n_calls))]
    ids = template.encode(messages, [EmittedReply(odd(said), said, "")], TOOLS)
    same = ids[: len(prompt) + len(odd(said))] == [*prompt, *odd(said)]
    assert same == (name not in ("strips", "nemo") or "think" not in content)
    # And on: the turn after the next has both replies' ids.
    answer = EmittedReply(odd("Hot."), "Hot.", "")
    messages += [{"role": "assistant", "content": "Hot."}, user("Thanks.")]
    more = template.encode(messages, [EmittedReply(odd(said), said, ""), answer], TOOLS)
    assert bytes(answer.ids) in bytes(i for i in more if i < 256)
    assert more[: len(ids)] == ids


@pytest.mark.parametrize("name", ["qwen", "chatml", "nemo"])
@pytest.mark.parametrize(
    ("given", "same"),
    [
        ('{"days":3,"city":"Bern"}', True),
        ('{"city": "B\\u0065rn", "days": 3}', True),
        ('{"city": "Bern", "days": 4}', False),
        ('{"city": "Bern"}', False),
    ],
)
def test_arguments_are_compared_as_values(name: str, given: str, same: bool) -> None:
    template = template_of(KNOWN[name][0])
    said = template.tools.form.text(GOOD[:1])
    messages = [user("Hot?"), called([("weather", given)]), result("Yes.")]
    ids = template.encode(messages, [EmittedReply(odd(said), said, "")], TOOLS)
    assert (bytes(odd(said)) in bytes(i for i in ids if i < 256)) == same


@pytest.mark.parametrize(
    "message",
    [
        called(GOOD),
        called([("time", GOOD[0][1])]),
        called(GOOD[:1], "But first:"),
        {"role": "assistant", "content": ""},
    ],
)
def test_another_call_is_not_taken_for_the_reply(message: Message) -> None:
    said = HERMES.text(GOOD[:1])
    ids = template_of(QWEN).encode([user("Hot?"), message], [EmittedReply(odd(said), said, "")])
    assert bytes(odd(said)) not in bytes(i for i in ids if i < 256)


def test_a_reply_cut_by_a_stop_string_has_its_tail_as_text() -> None:
    said = HERMES.text(GOOD[:1])
    reply = EmittedReply(odd(said[:-4]), said[:-4], said[-4:])
    messages = [user("Hot?"), called(GOOD[:1]), result("Yes.")]
    ids = bytes(i for i in template_of(QWEN).encode(messages, [reply], TOOLS) if i < 256)
    assert bytes(odd(said[:-4])) + said[-4:].encode() + b"<|im_end|>" in ids


def test_results_are_one_turn_where_turns_alternate() -> None:
    template = template_of(GEMMA)
    messages = [user("Hot?"), called(TWO), result("A"), result("B", 1), user("And?")]
    shown = template.render(messages, TOOLS)
    assert shown.count("<turn>") == 4
    assert shown.startswith("<turn>user\n# Tools")
    assert "A\n</tool_response>\n<tool_response>\nB\n</tool_response>\nAnd?" in shown


def test_tools_join_the_system_message() -> None:
    template = template_of(CHATML)
    shown = template.render([{"role": "system", "content": "Be brief."}, user("Hi")], TOOLS)
    assert shown.count("<|im_start|>system") == 1
    assert shown.startswith("<|im_start|>system\nBe brief.\n\n# Tools")


# ---- turns


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[ReplicaLoop]:
    made = make_loop(FakeEngine(), tmp_path)
    yield made
    made.close()


def ask(
    loop: ReplicaLoop, messages: Sequence[Message], use: ToolUse, n: int = 400, **sampling: Any
) -> Answer:
    params = SamplingParams(n, **({"temperature": 0.0} | sampling))
    stream = Stream(TurnRequest("turn", agent_id(), tuple(messages), params, tools=use))
    loop.submit(stream.request, stream)
    return stream.result()


def check_calls(calls: list[tuple[str, str]]) -> None:
    for name, said in calls:
        jsonschema.validate(json.loads(said), {"weather": WEATHER, "time": TIME}[name])


@pytest.mark.parametrize("use", [ToolUse(TOOLS, "function", "weather"), ToolUse(TOOLS, "required")])
def test_after_a_call_the_next_turn_goes_on_from_every_row(loop: ReplicaLoop, use: ToolUse) -> None:
    messages: list[Message] = [user("Hot?")]
    for seed in range(3):
        first = ask(loop, messages, use, temperature=1.0, seed=seed)
        assert first.started is not None
        assert (first.started.call_format, first.reason) == ("hermes", "stop")
        content, calls = parse(HERMES, first.text)
        assert content == ""
        assert calls
        check_calls(calls)
        settle(loop)
        held = loop.engine.n_rows(0)
        assert held >= len(first.prompt) + len(first.ids) - 1
        back = [(name, json.dumps(json.loads(a), separators=(",", ":"))) for name, a in calls]
        messages += [called(back, first=10 * seed)]  # what comes back may be written otherwise
        messages += [result("Sunny.", 10 * seed + i) for i in range(len(calls))]
        second = ask(loop, messages, ToolUse(TOOLS), n=5)
        assert second.cached == held
        assert second.prompt[: held + 1][: len(first.prompt)] == first.prompt
        assert second.prompt[len(first.prompt) :][: len(first.ids)] == first.ids
        assert len(memory_of(loop).branches) == 1
        messages += [{"role": "assistant", "content": second.text}, user("And now?")]


def test_a_broken_tool_is_refused_before_the_agent_is_touched(loop: ReplicaLoop) -> None:
    broken = tool("broken", {"type": "object", "properties": {"a": {"type": "wizard"}}})
    failed = ask(loop, [user("Hot?")], ToolUse((broken,))).last
    assert isinstance(failed.error, InvalidRequest)  # type: ignore[union-attr]
    assert failed.error.param == "tools[0].function.parameters"  # type: ignore[union-attr]
    assert loop.memory.get(agent_id()) is None


# ---- a real model


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Iterator[Engine]:
    from actors.engines.llama_engine import LlamaEngine

    made = LlamaEngine(smollm2_gguf, n_seq_max=2, n_ctx=2048, n_cells=4096, n_threads=2)
    yield made
    made.close()


@pytest.mark.model
def test_control_tokens_of_a_format_are_text(
    smollm2: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's [TOOL_CALLS] is one; this model's <file_sep> stands for it."""
    from actors.engines.llama_vocab import LlamaVocab

    (token,) = smollm2.vocab.tokenize("<file_sep>")
    assert smollm2.vocab.token_bytes(token) == b""
    monkeypatch.setattr("actors.engines.llama_vocab.SHOWN", ("<file_sep>", "not a token"))
    vocab = LlamaVocab(smollm2._model)  # type: ignore[attr-defined]
    assert vocab.token_bytes(token) == b"<file_sep>"
    made = guide(replace(ARGS, trigger="<file_sep>"), ToolUse(TOOLS, "required"))
    assert made is not None
    assert GrammarCompiler(vocab).compile(made).mask()[token]


@pytest.mark.model
def test_a_real_model_calls_and_goes_on(smollm2: Engine, tmp_path: Path) -> None:
    close, smollm2.close = smollm2.close, lambda: None  # type: ignore[method-assign]
    loop = make_loop(smollm2, tmp_path)
    try:
        messages: list[Message] = [user("What is the weather in Paris for the next 3 days?")]
        first = ask(loop, messages, ToolUse(TOOLS, "function", "weather"), n=200)
        assert first.reason == "stop"
        _, calls = parse(HERMES, first.text)
        assert [name for name, _ in calls] == ["weather"]
        check_calls(calls)
        settle(loop)
        held = loop.engine.n_rows(0)
        messages += [called(calls), result('{"forecast": "sunny"}')]
        second = ask(loop, messages, ToolUse(TOOLS), n=24)
        assert second.cached == held >= len(first.prompt) + len(first.ids) - 1
        assert second.prompt[: len(first.prompt) + len(first.ids)] == first.prompt + first.ids
        free = ask(loop, [user("Say hello.")], ToolUse(TOOLS), n=40, temperature=1.0, seed=4)
        assert parse(HERMES, free.text)[0] or parse(HERMES, free.text)[1]
    finally:
        loop.close()
        smollm2.close = close  # type: ignore[method-assign]


HALF = "\\ud83d"  # of a character, as JSON escapes it


@pytest.mark.parametrize("source", [s for s, _ in KNOWN.values()], ids=KNOWN)
def test_half_a_character_in_a_schema_or_in_arguments_can_be_read(source: str) -> None:
    """A model may write it, and its call has to come back."""
    template = template_of(source)
    shown = tool("ping", {"type": "object", "description": json.loads(f'"{HALF}"')})
    asked = [{"role": "user", "content": "x"}, called([("ping", f'{{"a": "{HALF}"}}')])]
    ids = template.encode([*asked, result("pong")], (), [shown])
    assert "pong" in bytes(i for i in ids if i < 256).decode()


def test_arguments_nested_too_deeply_are_another_call() -> None:
    template = template_of(QWEN)
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    text = template.tools.form.text([("ping", deep)])
    reply = EmittedReply(odd(text), text, "")
    messages = [{"role": "user", "content": "x"}, called([("ping", '{"a": 1}')]), result("pong")]
    assert template.encode(messages, [reply]) == template.encode(messages, [])


def test_a_reply_is_read_once_however_many_messages_might_repeat_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = template_of(QWEN)
    texts = [template.tools.form.text([("ping", f'{{"a": {n}}}')]) for n in range(5)]
    replies = [EmittedReply(odd(text), text, "") for text in texts]
    read: list[str] = []

    def counted(form: CallFormat, text: str) -> Any:
        read.append(text)
        return parse(form, text)

    monkeypatch.setattr("actors.prompt.parse", counted)
    said = [m for n in range(50) for m in (called([("pong", "{}")], first=n), result("x", n))]
    template.encode([{"role": "user", "content": "x"}, *said], replies)
    assert len(read) == 5
