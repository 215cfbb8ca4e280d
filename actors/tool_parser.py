"""Takes a reply apart as it comes: what is text, what are calls of functions.

Also a reply that no grammar held to its format. Pure; used at the ingress for the client, and where
prompts are made, to tell a reply by the calls that the client sends back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from actors.tools import WORD, CallFormat

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_WHITE = re.compile(r"\s*")


@dataclass(frozen=True)
class CallDelta:
    """`name` comes with the first delta of a call; `arguments` is the next piece of its JSON."""

    index: int
    name: str | None
    arguments: str


class CallParser:
    """Text in pieces of any size -> content and calls, as early as they are certain.

    What may still turn out to be a call is held back; what then is none, is content. White space
    before, between and after calls belongs to nobody. Without a call the content is the text.
    """

    def __init__(self, form: CallFormat) -> None:
        self._form = form
        self._held = ""
        self._state: Literal["text", "open", "arguments", "close", "between"] = "text"
        self._head = ""  # what leads to the item of state "open"
        self._white: str | None = ""  # so far all white, at the start or after a call
        self._object = _ObjectScan()
        self._out: list[str | CallDelta] = []
        self.n_calls = 0

    @property
    def cut(self) -> bool:
        """The last call's arguments are not complete."""
        return self._state == "arguments"

    def push(self, text: str) -> list[str | CallDelta]:
        self._held += text
        while getattr(self, f"_{self._state}")():
            pass
        out, self._out = self._out, []
        return out

    def finish(self) -> list[str | CallDelta]:
        """What was held back, once no more text comes."""
        if self._state != "close":  # in which only the frame of a call is missing
            self._content(self._held)
        self._held = ""
        if self._white and not self.n_calls:
            self._out.append(self._white)
        out, self._out = self._out, []
        return out

    # Each looks at what is held, and returns whether the next state should.

    def _text(self) -> bool:
        trigger, held = self._form.trigger, self._held
        at = held.find(trigger)
        if self._form.leads and (self._white is None or self.n_calls or held[:at].strip()):
            at = -1
        if at < 0:
            self._release(len(held) - self._partial())
            return False
        self._release(at)
        self._state, self._head = "open", trigger + self._form.begin
        return True

    def _partial(self) -> int:
        """Length of the end of the held text that may begin a trigger."""
        trigger, held = self._form.trigger, self._held
        if self._form.leads:
            rest = held.lstrip()
            possible = self._white is not None and not self.n_calls and trigger.startswith(rest)
            return len(rest) if possible else 0
        sizes = range(min(len(trigger) - 1, len(held)), 0, -1)
        return next((size for size in sizes if trigger.startswith(held[-size:])), 0)

    def _open(self) -> bool:
        form, held = self._form, self._held
        at = _skip(form.item[0], held, _skip(self._head, held, 0))
        name = _NAME.match(held, at) if at is not None and at >= 0 else None
        if name is not None:
            at = name.end() if name.end() < len(held) else None
            at = _skip(form.item[1] + "{", held, at)
        elif at == len(held):
            at = None
        if at is None:
            return False
        if at < 0 or name is None:  # it was no call
            self._state = "text"
            self._release(max(_skip(self._head, held, 0) or 0, 1))
            return True
        self._out.append(CallDelta(self.n_calls, name[0], ""))
        self.n_calls += 1
        self._held, self._white = held[at - 1 :], ""
        self._state, self._object = "arguments", _ObjectScan()
        return True

    def _arguments(self) -> bool:
        n = self._object.feed(self._held)
        if n:
            self._out.append(CallDelta(self.n_calls - 1, None, self._held[:n]))
        self._held = self._held[n:]
        if self._object.complete:
            self._state = "close"
        return self._object.complete

    def _close(self) -> bool:
        at = _skip(self._form.item[2], self._held, 0)
        if at is None:
            return False
        self._held = self._held[max(at, 0) :]
        self._state = "between" if at >= 0 else "text"
        return True

    def _between(self) -> bool:
        form, held = self._form, self._held
        end = _skip(form.end, held, 0) if form.end else -1
        more = _skip(form.between, held, 0) if form.between is not None else -1
        if end is not None and end >= 0:
            self._held, self._state = held[end:], "text"
        elif more is not None and more >= 0:
            self._state, self._head = "open", form.between or ""
        elif end is None or more is None:
            return False
        else:
            self._state = "text"
        return True

    def _release(self, n: int) -> None:
        text, self._held = self._held[:n], self._held[n:]
        self._content(text)

    def _content(self, text: str) -> None:
        if self._white is not None:
            text = self._white + text
            self._white = None if text.strip() else text
        if text and self._white is None:
            self._out.append(text)


def _skip(literal: str, text: str, at: int | None) -> int | None:
    """Where `text` goes on after the words of `literal`, white space between them aside; -1: it
    has others, None: it ends before. An `at` that is no position is returned as it is."""
    if at is None or at < 0:
        return at
    for word in WORD.findall(literal):
        white = _WHITE.match(text, at)
        assert white is not None
        rest = text[white.end() : white.end() + len(word)]
        if rest != word:
            return None if word.startswith(rest) else -1
        at = white.end() + len(word)
    return at


class _ObjectScan:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escaped = False

    @property
    def complete(self) -> bool:
        return self._depth < 0

    def feed(self, text: str) -> int:
        """How much of the text belongs to it."""
        for i, char in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._string:
                self._escaped, self._string = char == "\\", char != '"'
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._depth = -1
                    return i + 1
        return len(text)


def parse(form: CallFormat, text: str) -> tuple[str, list[tuple[str, str]]]:
    """(content, calls as name and arguments) of a whole reply."""
    parser = CallParser(form)
    content, calls = "", list[tuple[str, str]]()
    for piece in [*parser.push(text), *parser.finish()]:
        if isinstance(piece, str):
            content += piece
        elif piece.name is not None:
            calls.append((piece.name, ""))
        else:
            name, given = calls[piece.index]
            calls[piece.index] = name, given + piece.arguments
    return content, calls
