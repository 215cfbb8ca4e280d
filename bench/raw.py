"""The engine by itself, in this process: prompts of a given number of tokens, raw prefill speed.

What the benchmarks compare the served figures with; nothing else may run meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from actors.config import ReplicaConfig
from actors.engines.base import Chunk
from actors.models import open_engine
from actors.prompt import ChatTemplate, EmittedReply
from bench.client import Message
from cluster.errors import ConfigError

_CHARS_PER_TOKEN = 8  # more than any text needs


class RawEngine:
    """The engine of a replica without the replica; use as a context manager.

    Raises ModelUnavailable.
    """

    def __init__(self, config: ReplicaConfig) -> None:
        self._engine = open_engine(config)
        self._chunk = config.prefill_chunk
        self._template = ChatTemplate(self._engine.vocab)
        self.vocab = self._engine.vocab
        self.n_ctx = self._engine.n_ctx
        self.f16_row_bytes = self._engine.key.spec.f16_row_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._engine.close()

    def prompt(self, text: str, question: str, n_tokens: int) -> list[Message]:
        """Messages of n_tokens tokens or a few less: as much of the text as fits, and a question.

        Raises ConfigError for a text that is too short.
        """
        vocab = self._engine.vocab
        room = n_tokens - len(self.encode(_messages("", question)))
        ids = vocab.tokenize(text[: _CHARS_PER_TOKEN * n_tokens])[: max(0, room)]
        if room < 1 or len(ids) < room:
            raise ConfigError(f"a text of {len(ids)} tokens cannot fill a context of {n_tokens}")
        while ids:
            cut = b"".join(map(vocab.token_bytes, ids)).decode("utf-8", "ignore")
            messages = _messages(cut, question)
            if len(self.encode(messages)) <= n_tokens:
                return messages
            ids.pop()
        raise ConfigError(f"a context of {n_tokens} tokens holds nothing but the template")

    def prefill_s(self, messages: list[Message]) -> tuple[int, float]:
        """(tokens, seconds) of prefilling a prompt in the replica's chunks."""
        ids = self.encode(messages)
        began = time.perf_counter()
        for start in range(0, len(ids), self._chunk):
            part = ids[start : start + self._chunk]
            self._engine.step([Chunk(0, part, start, int(start + len(part) == len(ids)))])
        seconds = time.perf_counter() - began
        self._engine.truncate(0, 0)
        return len(ids), seconds

    def encode(self, messages: list[Message], replies: Sequence[EmittedReply] = ()) -> list[int]:
        """The prompt's ids, as a replica that gave these replies would have them."""
        return self._template.encode(messages, replies)


def _messages(text: str, question: str) -> list[Message]:
    system = {"role": "system", "content": f"These are your notes:\n{text}"}
    return [system, {"role": "user", "content": question}]
