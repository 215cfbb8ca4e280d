"""One running turn as the scheduler sees it: token ids, rows in the engine, sampling, text.

Knows neither agents nor storage.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from actors.drafts import Drafting
from actors.engines.base import Logits, Vocab
from actors.grammar import Grammar
from actors.sampling import Sampler
from actors.turn import FinishReason, SamplingParams, TokenLogprob


def text_of(vocab: Vocab, ids: Ids[int]) -> str:
    """The visible text of token ids; what is no UTF-8 becomes U+FFFD."""
    return b"".join(map(vocab.token_bytes, ids)).decode("utf-8", "replace")


class TextStream:
    """Token ids -> visible text: whole characters only, nothing of a stop string or its beginning.

    After `push` returns with `stopped` set, the text is complete and ends before the stop string.
    """

    def __init__(self, vocab: Vocab, stop: Ids[str]) -> None:
        self.vocab = vocab
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.text = ""  # all that was made visible
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that becomes visible with this token."""
        self._held += self._decoder.decode(self.vocab.token_bytes(token_id))
        return self._release(final=False)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        hits = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if hits:
            self.stopped = True
            visible, self._held = self._held[: min(hits)], ""
        else:
            keep = 0 if final else self._partial_stop()
            cut = len(self._held) - keep
            visible, self._held = self._held[:cut], self._held[cut:]
        self.text += visible
        return visible

    def _partial_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stop):
                return size
        return 0


def visible_ids(vocab: Vocab, ids: Ids[int], visible: str) -> tuple[int, str]:
    """(n, tail): the first n ids lie wholly inside the visible text, `tail` is the rest of it."""
    n = len(ids)
    while n and not visible.startswith(text_of(vocab, ids[:n])):
        n -= 1
    return n, visible[len(text_of(vocab, ids[:n])) :]


@dataclass
class Sequence:
    """tokens = prompt, then the reply; n_rows of them are in the engine at sequence seq_id."""

    id: str
    tokens: list[int]
    n_prompt: int
    params: SamplingParams
    max_tokens: int
    text: TextStream
    seq_id: int
    n_rows: int
    paused: bool = False  # frozen for a migration: takes no part in steps
    finish_reason: FinishReason | None = None
    grammar: Grammar | None = None  # has accepted the reply so far
    new_ids: list[int] = field(default_factory=list)  # sampled, not yet sent
    new_logprobs: list[TokenLogprob] = field(default_factory=list)  # of new_ids, if asked for
    priority: int = 0
    drafting: Drafting | None = None  # of a sequence that has been drafted for
    stops: tuple[int, ...] = ()  # positions at which a chunk of the prefill ends, in order
    n_loaded: int = 0  # rows that were not computed since it entered the engine
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(
            self.params, self.text.vocab, self.tokens[: self.n_prompt], self.reply, self.grammar
        )

    @property
    def is_prefill(self) -> bool:
        """More than the last token is missing in the engine."""
        return len(self.tokens) - self.n_rows > 1

    @property
    def next_stop(self) -> int:
        """Where the next chunk of its prefill has to end."""
        return next((at for at in self.stops if at > self.n_rows), len(self.tokens))

    @property
    def reply(self) -> list[int]:
        return self.tokens[self.n_prompt :]

    @property
    def complete(self) -> bool:
        """Nothing may follow what the reply has: a stop string, or the end of its grammar."""
        return self.text.stopped or self.sampler.complete

    def take(self, logits: Logits, eog: frozenset[int]) -> str:
        """Draw the next token and accept it. Raises InvalidRequest when its grammar fails."""
        token = self.sampler.draw(logits, len(self.tokens))
        n_ids = len(self.new_ids)
        visible = self.accept(token, eog)
        if self.params.logprobs is not None and len(self.new_ids) > n_ids:
            self.new_logprobs.append(self.sampler.logprob(logits, token))
        return visible

    def accept(self, token: int, eog: frozenset[int]) -> str:
        """Take one sampled token; returns the text it makes visible. Sets finish_reason."""
        if token in eog or token in self.params.stop_token_ids:
            self.finish_reason = "stop"
            return self.text.finish()
        self.tokens.append(token)
        self.new_ids.append(token)
        self.sampler.accept(token)
        visible = self.text.push(token)
        if self.complete:
            self.finish_reason = "stop"
            visible += self.text.finish()
        elif len(self.tokens) - self.n_prompt >= self.max_tokens:
            self.finish_reason = "length"
            visible += self.text.finish()
        return visible
