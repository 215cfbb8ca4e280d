"""Messages -> token ids: the model's chat template, token-faithful history, prefix matching.

Where an assistant message says what this agent emitted, be it text or calls of functions, the
emitted ids stand in the prompt, not a new tokenization. Knows tokens and text; no engine, no
storage.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from actors.engines.base import Vocab
from actors.errors import InvalidRequest, ModelUnavailable
from actors.tool_messages import marked, marked_place, style_of
from actors.tool_parser import parse
from actors.turn import Message, Tool

Calls = list[tuple[str, str]]  # name, arguments as JSON
_SURROGATES = re.compile("[\ud800-\udfff]")  # schemas and arguments escape them; no UTF-8 does
_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
)


@dataclass(frozen=True)
class EmittedReply:
    """ids of an earlier reply, and the visible text `text` of those ids; `tail` see card.Reply."""

    ids: tuple[int, ...]
    text: str
    tail: str


@dataclass(frozen=True)
class _Mark:
    """A text that no message has, for the reply that message `index` repeats; `calls`: in a call's
    name, else in the message's content."""

    text: str
    index: int
    reply: EmittedReply
    calls: bool


class ChatTemplate:
    """The model's own template, in Jinja's immutable sandbox."""

    def __init__(self, vocab: Vocab) -> None:
        """Raises ModelUnavailable for a model without a chat template, or with a broken one."""
        if not vocab.chat_template:
            raise ModelUnavailable("the model file has no chat template")
        self._vocab = vocab
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )  # the environment that Hugging Face renders them in
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        env.filters["tojson"] = lambda value, **kwargs: json.dumps(
            value, **{"ensure_ascii": False, **kwargs}
        )
        try:
            self._template = env.from_string(vocab.chat_template)
        except jinja2.TemplateError as error:
            raise ModelUnavailable(f"the model's chat template is broken: {error}") from error
        self.tools = style_of(self._render)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> str:
        """Raises InvalidRequest when the template refuses the messages."""
        return self._render(self.tools.messages(messages, tools), self.tools.tools(tools))

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]] | None
    ) -> str:
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._vocab.bos_text,
                eos_token=self._vocab.eos_text,
                tools=tools,
            )
        except _REFUSALS as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error
        return _SURROGATES.sub("\ufffd", text)

    def encode(
        self,
        messages: Sequence[Message],
        replies: Sequence[EmittedReply],
        tools: Sequence[Tool] = (),
    ) -> list[int]:
        """The prompt's token ids, with the ids of `replies` (in order) where their text stands, or
        the calls that they made."""
        marks = self._marks(messages, replies)
        texts = [mark for mark in marks if not mark.calls]
        calls = self._kept(messages, [mark for mark in marks if mark.calls], tools)
        plain = self._marked(messages, calls, tools) if calls else None
        if plain is None:
            calls, plain = [], self.render(messages, tools)
        text = self._marked(messages, [*calls, *texts], tools) if texts else None
        if text is None or _unmarked(text, texts) != plain:  # the template rewrites replies
            return self._splice(plain, calls)
        return self._splice(text, [mark for mark in marks if mark in calls or not mark.calls])

    def opening(
        self, messages: Sequence[Message], prompt: Sequence[int], tools: Sequence[Tool] = ()
    ) -> int:
        """How many tokens of the prompt come before the first message that is not the system's; 0:
        it has none."""
        n = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
        if not n and not tools:
            return 0
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        try:
            text = self.render([*messages[:n], {"role": "user", "content": mark}], tools)
        except InvalidRequest:
            return 0
        before, found, _ = text.partition(mark)
        return common_prefix(self._begin(text) + self._vocab.tokenize(before), prompt) * bool(found)

    def _marks(self, messages: Sequence[Message], replies: Sequence[EmittedReply]) -> list[_Mark]:
        """One for each assistant message that repeats an emitted reply."""
        nonce = secrets.token_hex(8)
        marks: list[_Mark] = []
        for index, reply in self._repeated(messages, replies).items():
            text = f"\ue000{nonce}.{len(marks)}\ue001"
            marks.append(_Mark(text, index, reply, "tool_calls" in messages[index]))
        return marks

    def _repeated(
        self, messages: Sequence[Message], replies: Sequence[EmittedReply]
    ) -> dict[int, EmittedReply]:
        """The reply that each assistant message repeats, by the message's index."""
        left = list(replies)
        known: dict[int, EmittedReply] = {}
        read = cache(lambda text: parse(self.tools.form, text))
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                for index, reply in enumerate(left):
                    if reply.ids and _says(message, reply.text + reply.tail, read):
                        known[i] = reply
                        del left[: index + 1]
                        break
        return known

    def _kept(
        self, messages: Sequence[Message], calls: list[_Mark], tools: Sequence[Tool]
    ) -> list[_Mark]:
        """Without those whose reasoning the template strips."""
        said = [messages[mark.index]["content"].strip() for mark in calls]
        if not any("</think>" in text for text in said):
            return calls
        shown = self.render(messages, tools)
        kept = zip(calls, said, strict=True)
        return [mark for mark, text in kept if "</think>" not in text or text in shown]

    def _marked(
        self, messages: Sequence[Message], marks: Sequence[_Mark], tools: Sequence[Tool]
    ) -> str | None:
        """The prompt with each mark where the template puts its reply, or None."""
        shown = list(messages)
        for mark in marks:
            if mark.calls:
                shown[mark.index] = marked(shown[mark.index], mark.text)
            else:
                content = mark.text + mark.reply.tail
                shown[mark.index] = {**shown[mark.index], "content": content}
        try:
            text = self.render(shown, tools)
        except InvalidRequest:
            return None
        for mark in marks:
            if mark.calls:
                around = marked_place(self.tools.form, mark.text).split(text)
                text = (mark.text + mark.reply.tail).join(around)
            if text.count(mark.text) != 1:
                return None
        return text

    def _splice(self, text: str, marks: Sequence[_Mark]) -> list[int]:
        ids: list[int] = self._begin(text)
        for mark in marks:
            before, text = text.split(mark.text)
            ids += self._vocab.tokenize(before)
            ids += mark.reply.ids
        return ids + self._vocab.tokenize(text)

    def _begin(self, text: str) -> list[int]:
        """The BOS token, unless the template wrote it or the model wants none."""
        vocab = self._vocab
        wants = vocab.add_bos and vocab.bos >= 0 and not text.startswith(vocab.bos_text)
        return [vocab.bos] if wants else []


def _unmarked(text: str, marks: Sequence[_Mark]) -> str:
    for mark in marks:
        text = text.replace(mark.text, mark.reply.text)
    return text


def _says(message: Message, text: str, read: Callable[[str], tuple[str, Calls]]) -> bool:
    """Whether the message is what the client was told of a reply's text."""
    if "tool_calls" not in message:
        return bool(message["content"] == text)
    content, calls = read(text)
    given = [(call["name"], call["arguments"]) for call in message["tool_calls"]]
    return (
        content == message["content"]
        and len(calls) == len(given)
        and all(a[0] == b[0] and _equal(a[1], b[1]) for a, b in zip(calls, given, strict=True))
    )


def _equal(a: str, b: str) -> bool:
    """Whether two JSON texts say the same; one that was cut, or is nested too deeply, says
    nothing."""
    try:
        return bool(json.loads(a) == json.loads(b))
    except (ValueError, RecursionError):
        return False


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if list(a[:n]) == list(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))
