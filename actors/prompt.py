"""Messages -> token ids: the model's chat template, token-faithful history, prefix matching.

Where an assistant message's text equals what this agent emitted, the emitted ids stand in the
prompt, not a new tokenization of the text. Knows tokens and text; no engine, no storage.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from actors.engines.base import Vocab
from actors.errors import InvalidRequest, ModelUnavailable
from actors.turn import Message


@dataclass(frozen=True)
class EmittedReply:
    """ids of an earlier reply, and the visible text `text` of those ids; `tail` see card.Reply."""

    ids: tuple[int, ...]
    text: str
    tail: str


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

    def render(self, messages: Sequence[Message]) -> str:
        """Raises InvalidRequest when the template refuses the messages."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self._vocab.bos_text,
                eos_token=self._vocab.eos_text,
                tools=None,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error

    def encode(self, messages: Sequence[Message], replies: Sequence[EmittedReply]) -> list[int]:
        """The prompt's token ids, with the ids of `replies` (in order) where their text stands."""
        plain = self.render(messages)
        marked, pieces = self._mark(messages, replies)
        if pieces:
            text = self.render(marked)
            spliced = text
            for mark, reply in pieces:
                spliced = spliced.replace(mark, reply.text)
            if spliced == plain and all(text.count(mark) == 1 for mark, _ in pieces):
                return self._splice(text, pieces)
        return self._begin(plain) + self._vocab.tokenize(plain)  # the template rewrites replies

    def opening(self, messages: Sequence[Message], prompt: Sequence[int]) -> int:
        """How many tokens of the prompt come before the first message that is not the system's; 0:
        it has none."""
        n = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
        if not n:
            return 0
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        try:
            text = self.render([*messages[:n], {"role": "user", "content": mark}])
        except InvalidRequest:
            return 0
        before, found, _ = text.partition(mark)
        return common_prefix(self._begin(text) + self._vocab.tokenize(before), prompt) * bool(found)

    def _mark(
        self, messages: Sequence[Message], replies: Sequence[EmittedReply]
    ) -> tuple[list[Message], list[tuple[str, EmittedReply]]]:
        """Each assistant message that repeats an emitted reply becomes a mark that no text has."""
        nonce = secrets.token_hex(8)
        left = list(replies)
        marked: list[Message] = []
        pieces: list[tuple[str, EmittedReply]] = []
        for message in messages:
            if message["role"] == "assistant":
                for index, reply in enumerate(left):
                    if reply.ids and message["content"] == reply.text + reply.tail:
                        mark = f"\ue000{nonce}.{len(pieces)}\ue001"
                        pieces.append((mark, reply))
                        message = {**message, "content": mark + reply.tail}
                        del left[: index + 1]
                        break
            marked.append(message)
        return marked, pieces

    def _splice(self, text: str, pieces: Sequence[tuple[str, EmittedReply]]) -> list[int]:
        ids: list[int] = self._begin(text)
        for mark, reply in pieces:
            before, text = text.split(mark)
            ids += self._vocab.tokenize(before)
            ids += reply.ids
        return ids + self._vocab.tokenize(text)

    def _begin(self, text: str) -> list[int]:
        """The BOS token, unless the template wrote it or the model wants none."""
        vocab = self._vocab
        wants = vocab.add_bos and vocab.bos >= 0 and not text.startswith(vocab.bos_text)
        return [vocab.bos] if wants else []


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if list(a[:n]) == list(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])


def _raise(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))
