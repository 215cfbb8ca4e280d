"""How models write function calls: a table of formats, and the grammar that holds a reply to one.

A reply is text, calls, or text and then calls, with arguments that keep to their schemas. Pure;
which format a chat template has, tool_messages finds out, and tool_parser reads replies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.errors import InvalidRequest
from actors.turn import Guide, Tool, ToolUse

SHOWN = ("[TOOL_CALLS]", "[ARGS]")  # control tokens that are part of a format's text
WORD = re.compile(r'</?\w+>|\[[A-Z_]+\]|"\w+"|\S')
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_OPEN_ENDED = {"allOf", "anyOf", "oneOf", "$ref", "if", "not", "patternProperties"}


@dataclass(frozen=True)
class CallFormat:
    """trigger begin ITEM (between ITEM)* end, ITEM = item[0] name item[1] arguments item[2], as
    models were trained to write them. The parser lets white space differ."""

    name: str
    trigger: str
    begin: str
    item: tuple[str, str, str]
    between: str | None  # None: one call per reply
    end: str
    leads: bool = False  # the trigger counts at the start of a reply only

    def pattern(self, name: str, arguments: str) -> re.Pattern[str]:
        """One call as chat templates write it, which may add an id."""
        head = _loose(self.trigger + self.begin + self.item[0])
        given = _loose(self.item[1]) + r"\s*" + re.escape(arguments).replace(r"\ ", r"\s*")
        tail = r'(?:,\s*"id"\s*:\s*"\w*")?\s*' + _loose(self.item[2] + self.end)
        return re.compile(head + re.escape(name) + given + tail)

    def text(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls (name, arguments as JSON) as this format writes them."""
        items = [self.item[0] + name + self.item[1] + given + self.item[2] for name, given in calls]
        between = self.end + self.trigger + self.begin if self.between is None else self.between
        return self.trigger + self.begin + between.join(items) + self.end


def _loose(literal: str) -> str:
    return r"\s*".join(re.escape(word) for word in WORD.findall(literal))


HERMES = CallFormat(
    "hermes", "<tool_call>", "", ('\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
    "\n<tool_call>", "",
)  # fmt: skip
FORMATS = {
    known.name: known
    for known in (
        HERMES,  # Qwen, too
        CallFormat(
            "mistral", "[TOOL_CALLS]", "[", ('{"name": "', '", "arguments": ', "}"), ", ", "]"
        ),
        CallFormat("mistral-args", "[TOOL_CALLS]", "", ("", "[ARGS]", ""), "[TOOL_CALLS]", ""),
        CallFormat(
            "llama3", '{"name"', "", (': "', '", "parameters": ', "}"), None, "", leads=True
        ),
    )
}


def guide(form: CallFormat, use: ToolUse, text: Guide | None = None) -> Guide | None:
    """What holds a reply to `use`; `text`, of kind json, is the form of a reply without a call.
    None: nothing to hold, as no call may be made. Raises InvalidRequest."""
    if use.choice == "none":
        return text
    if text is not None and form.leads:  # the first letters would not tell which it is
        raise _refused(text, "this model calls tools in JSON, so that its text cannot be JSON")
    tools = [tool for tool in use.tools if use.choice != "function" or tool.name == use.function]
    rules = [
        f"call_{i}: {_quoted(form.item[0] + tool.name + form.item[1])}"
        f" %json {json.dumps(_arguments_schema(tool))} {_quoted(form.item[2])}"
        for i, tool in enumerate(tools)
    ]
    calls = "call"
    if form.between is not None and use.parallel and use.choice != "function":
        calls = f"call ({_quoted(form.between)} call)*"
    calls = f"{_quoted(form.begin)} {calls} {_quoted(form.end)}"
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    parts = tuple(
        Guide("json", tool.parameters, f"tools[{use.tools.index(tool)}].function.parameters")
        for tool in tools
    )
    if use.choice != "auto":
        start = [f"start: {_quoted(form.trigger)} {calls}"]
    elif text is not None:
        start = [f"start: said | {_quoted(form.trigger)} {calls}", f"said: %json {_compact(text)}"]
        parts = (text, *parts)
    else:
        start = _free(form, calls)
    return Guide("calls", "\n".join([*start, *rules]), "tools", parts)


def _refused(text: Guide, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{text.param}: {reason}", text.param, "invalid_value")


def _compact(text: Guide) -> str:
    try:
        schema = json.loads(text.source)
    except (ValueError, RecursionError) as error:
        raise _refused(text, "not JSON, or nested too deeply") from error
    if not isinstance(schema, dict):
        raise _refused(text, "not a JSON object")
    return json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}})


def _free(form: CallFormat, calls: str) -> list[str]:
    """Text without the trigger, or text, the trigger and what then must follow."""
    trigger, before = re.escape(form.trigger), r"\s*" if form.leads else "(?s:.*)"
    trigger = trigger.replace("/", r"\/")
    return [
        f"start: TEXT | head {calls}",
        f"head[lazy]: /{before}{trigger}/",
        f"TEXT: /(?s:.*)/ & ~/{before}{trigger}(?s:.*)/",
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    """As the model should write it: an object, spaced as in what it was trained on. Properties
    that the schema does not name are allowed only where it says so, or leaves it open."""
    schema: dict[str, Any] = json.loads(tool.parameters)
    named, required = schema.get("properties"), schema.get("required", [])
    if isinstance(named, dict) and isinstance(required, list) and not schema.keys() & _OPEN_ENDED:
        unnamed = set(map(str, required)) - named.keys()
        schema = ({} if unnamed else {"additionalProperties": False}) | schema
    return schema | {"type": "object", "x-guidance": _SPACED}
