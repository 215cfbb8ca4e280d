"""The tools of a request: their schemas, and which of them may, or must, be called."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from actors.turn import Tool, ToolUse
from api.fields import Strict, WholeText, mismatch, schema
from api.messages import FunctionName

MAX_TOOLS = 128
MAX_TEXT = 1 << 20  # characters of all descriptions and schemas


def _parameters(value: Any) -> str | None:
    """Arguments come as an object, whatever its schema leaves open."""
    if value is None:
        return None
    text = schema(value)
    if value.get("type", "object") != "object":
        raise ValueError('the arguments of a function are of type "object"')
    return text


class Function(Strict):
    """`strict` changes nothing: a schema is always kept."""

    name: FunctionName
    description: WholeText | None = None
    parameters: Annotated[str | None, BeforeValidator(_parameters)] = None
    strict: bool | None = None


class FunctionTool(Strict):
    type: Literal["function"]
    function: Function

    def to_turn(self) -> Tool:
        function = self.function
        nothing = json.dumps({"type": "object", "properties": {}, "additionalProperties": False})
        return Tool(function.name, function.description, function.parameters or nothing)


class NamedFunction(Strict):
    name: FunctionName


class ForcedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | ForcedTool


def tool_use(
    tools: list[FunctionTool] | None, choice: ToolChoice | None, parallel: bool | None
) -> ToolUse | None:
    """None: the request has no tools. Raises PydanticCustomError for what does not fit together."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise mismatch("tool_choice", "needs tools")
        return None
    made = tuple(tool.to_turn() for tool in tools)
    names = [tool.name for tool in made]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise mismatch(f"tools.{i}.function.name", f"{name} is there twice")
    if sum(len(tool.parameters) + len(tool.description or "") for tool in made) > MAX_TEXT:
        raise mismatch("tools", f"have more than {MAX_TEXT} characters")
    several = parallel is not False
    if isinstance(choice, ForcedTool):
        name = choice.function.name
        if name not in names:
            raise mismatch("tool_choice.function.name", f"there is no tool {name}")
        return ToolUse(made, "function", name, several)
    return ToolUse(made, choice or "auto", "", several)
