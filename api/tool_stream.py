"""A reply's text as OpenAI's message: content and tool calls, whole or in deltas.

The text comes as the replica's ids say it, so a turn that fails over says the same calls with the
same ids.
"""

from __future__ import annotations

from typing import Any

from actors.tool_parser import CallDelta, CallParser
from actors.tools import FORMATS


class Said:
    """`call_format` "": the text holds no calls."""

    def __init__(self, turn_id: str, call_format: str) -> None:
        self._turn_id = turn_id
        self._parser = CallParser(FORMATS[call_format]) if call_format else None
        self._content = ""
        self._calls: list[dict[str, Any]] = []

    def push(self, text: str) -> list[dict[str, Any]]:
        """The deltas that the next piece of text makes."""
        if self._parser is None:
            return self._deltas([text] if text else [])
        return self._deltas(self._parser.push(text))

    def finish(self) -> list[dict[str, Any]]:
        """The deltas of what was held back."""
        return self._deltas(self._parser.finish() if self._parser is not None else [])

    def _deltas(self, pieces: list[str | CallDelta]) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, str):
                self._content += piece
                deltas.append({"content": piece})
            else:
                deltas.append({"tool_calls": [self._call(piece)]})
        return deltas

    def _call(self, piece: CallDelta) -> dict[str, Any]:
        if piece.name is None:
            self._calls[piece.index]["function"]["arguments"] += piece.arguments
            return {"index": piece.index, "function": {"arguments": piece.arguments}}
        call_id = f"call_{self._turn_id}_{piece.index}"
        function = {"name": piece.name, "arguments": ""}
        self._calls.append({"id": call_id, "type": "function", "function": function})
        return {"index": piece.index, **self._calls[-1], "function": dict(function)}

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self._content, "refusal": None}
        if self._calls:
            message |= {"content": self._content or None, "tool_calls": self._calls}
        return message

    def reason(self, reason: str) -> str:
        """OpenAI's finish_reason. A call whose arguments were cut is none to run."""
        whole = self._parser is not None and self._calls and not self._parser.cut
        return "tool_calls" if whole and reason == "stop" else reason
