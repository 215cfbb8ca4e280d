"""The cast of `kvferry demo migrate | failover`: agents that read, speak and are asked again."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console

from bench.client import Endpoint, EndpointError, Reply
from bench.demo import CheckFailed
from bench.stage import Speaker, Stage
from bench.texts import TRADES, context

REPLY_TOKENS = 96
_QUESTIONS = ("Write a story about these people.", "Thank you. Who was it about?")
_SUMMARY_TOKENS = 8


class Play:
    """Speakers, what they were answered, and what did not hold."""

    def __init__(self, endpoint: Endpoint, console: Console, title: str, n: int, tokens: int):
        self.endpoint, self.failures = endpoint, list[str]()
        self.speakers = [_speaker(number, tokens) for number in range(n)]
        self.stage = Stage(console, f"{title} · {endpoint.url}", self.speakers)
        self.replies: dict[str, Reply] = {}

    def nodes(self) -> list[Any]:
        """Those that are ready, two or more. Raises CheckFailed."""
        self.stage.look(self.endpoint)
        nodes = [node for node in self.stage.nodes if node["replica"] == "ready"]
        if len(nodes) < 2:
            raise CheckFailed(f"it takes two device nodes that are ready; there are {len(nodes)}")
        return nodes

    def introduce(self) -> None:
        """Everybody reads: the memory that is kept later."""
        for speaker in self.speakers:
            speaker.state = "reads"
            reply = self._turn(speaker, "Sum these notes up in one sentence.", 8)
            speaker.text, speaker.state = "", "waits"
            self.stage.event(
                f"{speaker.name} has read {reply.prompt_tokens} tokens on {reply.node}"
            )

    def speak(self, speaker: Speaker, on_delta: Callable[[Reply], None]) -> threading.Thread:
        """A long answer, on a thread of its own."""

        def turn() -> None:
            try:
                self._turn(speaker, _QUESTIONS[0], REPLY_TOKENS, on_delta, ignore_eos=True)
            except (EndpointError, CheckFailed) as error:
                self.failures.append(f"{speaker.name}: {error}")
            speaker.state = "has spoken"

        thread = threading.Thread(target=turn, daemon=True)
        thread.start()
        return thread

    def _turn(
        self,
        speaker: Speaker,
        question: str,
        n_tokens: int,
        on_delta: Callable[[Reply], None] | None = None,
        **more: Any,
    ) -> Reply:
        speaker.messages.append({"role": "user", "content": question})

        def show(reply: Reply) -> None:
            speaker.node, speaker.state = speaker.node or reply.node, "speaks"
            if on_delta is not None:
                on_delta(reply)
            speaker.text += reply.deltas[-1]

        reply = self.endpoint.chat(
            speaker.messages, session=speaker.session, max_tokens=n_tokens, on_delta=show, **more
        )
        speaker.messages.append({"role": "assistant", "content": reply.text})
        speaker.tokens = reply.prompt_tokens + reply.completion_tokens
        self.replies[speaker.name] = reply
        return reply

    def check_whole(self, speaker: Speaker) -> None:
        """All of the long answer came, and the agent still knows everything."""
        reply = self.replies[speaker.name]
        if reply.reason != "length" or reply.completion_tokens != REPLY_TOKENS:
            self.failures.append(f"{speaker.name}: the answer is not whole")
        held, said = speaker.tokens, speaker.text
        after = self._turn(speaker, _QUESTIONS[1], _SUMMARY_TOKENS)
        if after.cached_tokens < held - 1:  # the last token of a reply is never computed
            self.failures.append(
                f"{speaker.name}: of {held} tokens only {after.cached_tokens} were remembered"
            )
        speaker.text, speaker.state = said, f"remembers {after.cached_tokens} tokens"
        self.replies[speaker.name] = reply


def _speaker(number: int, tokens: int) -> Speaker:
    trade = TRADES[number % len(TRADES)]
    seed = secrets.randbits(32)
    notes = context(seed - seed % len(TRADES) + number, tokens)
    system = f"You answer questions about the notes of a {trade.name}. The notes:\n{notes}"
    session = f"demo-{secrets.token_hex(4)}-{trade.name}"
    return Speaker(trade.name, session, [{"role": "system", "content": system}])
