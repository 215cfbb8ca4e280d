"""Tools, calls and their results in the words of a chat template.

A template that shows tools, and writes calls in a format of actors.tools, gets them as Hugging Face
hands them over. Any other gets them as plain messages: the tools in the system message, calls as
text, results as the user's turn. Which it is, a rendered probe says. Pure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.errors import InvalidRequest
from actors.tools import FORMATS, HERMES, CallFormat
from actors.turn import Message, Tool

Render = Callable[[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None], str]
_PROBE = '{"x": "1"}'
_EXPLAINED = (
    "# Tools\n\nYou can call functions. These are the functions, one JSON object per line:\n"
    "<tools>\n{tools}\n</tools>\n\n"
    "To call a function, answer with a JSON object of its name and its arguments, like this:\n"
    '<tool_call>\n{"name": "name of the function", "arguments": {"name": "value"}}\n</tool_call>\n'
    "The result then comes inside <tool_response></tool_response>."
)


@dataclass(frozen=True)
class ToolStyle:
    """How one template takes tools. `native`: by itself; `texts`: it wants a call's arguments as
    JSON text, not as an object; `system`: it has a place for a system message."""

    form: CallFormat
    native: bool
    texts: bool = False
    system: bool = True

    def messages(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[dict[str, Any]]:
        """As the template is to see them."""
        if self.native:
            return [self._native(message) for message in messages]
        plain: list[dict[str, Any]] = []
        for message in messages:
            shown, response = self._plain(message), message["role"] == "tool"
            joins = response or shown["role"] == "user"
            if joins and plain and plain[-1]["response"]:
                shown["content"] = f"{plain[-1]['content']}\n{shown['content']}"
                plain.pop()
            plain.append(shown | {"response": response})
        for shown in plain:
            del shown["response"]
        return self._explained(plain, tools) if tools else plain

    def tools(self, tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
        """What the template gets as `tools`."""
        return [_schema(tool) for tool in tools] if self.native and tools else None

    def _native(self, message: Message) -> dict[str, Any]:
        shown = dict(message)
        if "tool_call_id" in message:
            shown["tool_call_id"] = _short(message["tool_call_id"])
        if "tool_calls" in message:
            shown["tool_calls"] = [
                {
                    "id": _short(call["id"]),
                    "type": "function",
                    "function": {
                        "name": call["name"],
                        "arguments": call["arguments"]
                        if self.texts
                        else json.loads(call["arguments"]),
                    },
                }
                for call in message["tool_calls"]
            ]
        return shown

    def _plain(self, message: Message) -> dict[str, Any]:
        if message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            return {"role": "user", "content": content}
        shown = dict(message)
        calls = shown.pop("tool_calls", None)
        if calls:
            text = self.form.text([(call["name"], call["arguments"]) for call in calls])
            said = shown["content"].rstrip()
            shown["content"] = f"{said}\n{text}" if said else text
        return shown

    def _explained(
        self, messages: list[dict[str, Any]], tools: Sequence[Tool]
    ) -> list[dict[str, Any]]:
        lines = "\n".join(json.dumps(_schema(tool), ensure_ascii=False) for tool in tools)
        text = _EXPLAINED.replace("{tools}", lines)
        role = "system" if self.system else "user"
        if messages and messages[0]["role"] == role:
            first, *rest = messages
            said = [first["content"], text] if self.system else [text, first["content"]]
            return [first | {"content": "\n\n".join(filter(None, said))}, *rest]
        return [{"role": role, "content": text}, *messages]


def style_of(render: Render) -> ToolStyle:
    """Of the template that `render` renders messages and tools with."""
    for form in FORMATS.values():
        for texts in (False, True):
            style = ToolStyle(form, True, texts)
            if _holds(render, style):
                return style
    hint = {"role": "system", "content": "hint7"}
    try:
        system = "hint7" in render([hint, {"role": "user", "content": "hi"}], None)
    except InvalidRequest:
        system = False
    return ToolStyle(HERMES, False, system=system)


def _holds(render: Render, style: ToolStyle) -> bool:
    """Whether the template shows tools, a call in the style's format, and the call's result."""
    tool = Tool("probe_tool", "what", '{"type": "object", "properties": {}}')
    call = {"id": "1", "name": "probe_call", "arguments": _PROBE}
    messages: list[Message] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "probe_result", "tool_call_id": "1", "name": "probe_call"},
    ]
    try:
        shown = render(style.messages(messages, [tool]), style.tools([tool]))
    except InvalidRequest:
        return False
    pattern = style.form.pattern("probe_call", _PROBE)
    return "probe_tool" in shown and "probe_result" in shown and bool(pattern.search(shown))


def marked(message: Message, mark: str) -> Message:
    """The message with one call, named `mark`, in the place of all it says."""
    call = {"id": "1", "name": mark, "arguments": _PROBE}
    return {**message, "content": "", "tool_calls": [call]}


def marked_place(form: CallFormat, mark: str) -> re.Pattern[str]:
    """What a template makes of the call of `marked`."""
    return form.pattern(mark, _PROBE)


def _schema(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description}
    if tool.description is None:
        del function["description"]
    return {"type": "function", "function": function | {"parameters": json.loads(tool.parameters)}}


def _short(call_id: str) -> str:
    """Nine letters and digits: Mistral's templates take no other ids."""
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]
