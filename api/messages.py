"""The messages of a chat, as OpenAI's SDKs send them: one by one, and as a conversation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from api.fields import Strict, WholeText, mismatch, whole

MAX_CALLS = 128  # of one message
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(whole)]


def _object(text: str) -> str:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return text


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class TextPart(Strict):
    type: Literal["text"]
    text: WholeText


class CalledFunction(Strict):
    name: FunctionName
    arguments: Annotated[WholeText, AfterValidator(_object)]
    parsed_arguments: Any = None  # the SDK's own reading of `arguments`


class ToolCall(Strict):
    id: CallId
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None  # where a stream was put together


class ChatMessage(Strict):
    """SDKs send back whole assistant messages, empty fields included."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: WholeText | list[TextPart] | None = None
    name: WholeText | None = None
    tool_call_id: CallId | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MAX_CALLS)] | None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    parsed: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def to_turn(self) -> dict[str, Any]:
        """As actors.turn has it: flat, and every role one that chat templates know."""
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": self.text()}
        if self.name:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls is not None:
            message["tool_calls"] = tuple(
                {"id": c.id, "name": c.function.name, "arguments": c.function.arguments}
                for c in self.tool_calls
            )
        return message


def check(messages: Sequence[ChatMessage]) -> None:
    """Each message has what its role wants, and each call is answered right after it, once. Raises
    PydanticCustomError."""
    missing: dict[str, str] = {}  # calls that wait for their result -> the function's name
    for i, message in enumerate(messages):
        here = f"messages.{i}"
        if message.role != "assistant" and message.tool_calls is not None:
            raise mismatch(f"{here}.tool_calls", "only an assistant calls tools")
        if message.content is None and message.tool_calls is None:
            raise mismatch(f"{here}.content", "is missing")
        if message.role == "tool":
            _check_result(message, here, missing)
            continue
        if message.tool_call_id is not None:
            raise mismatch(f"{here}.tool_call_id", "goes with role tool")
        if missing:
            raise mismatch(here, f"comes before the result of call {next(iter(missing))}")
        for call in message.tool_calls or ():
            if call.id in missing:
                raise mismatch(f"{here}.tool_calls", f"has the id {call.id} twice")
            missing[call.id] = call.function.name
    if missing:
        raise mismatch("messages", f"lack the result of call {next(iter(missing))}")


def _check_result(message: ChatMessage, here: str, missing: dict[str, str]) -> None:
    where = f"{here}.tool_call_id"
    if message.tool_call_id is None:
        raise mismatch(where, "is missing")
    if message.tool_call_id not in missing:
        raise mismatch(
            where, "names no call of the assistant message before it, or one with a result"
        )
    name = missing.pop(message.tool_call_id)
    message.name = message.name or name  # for templates that show it
