"""One running turn as the scheduler sees it: token ids, rows in the engine, sampling, text.

Knows neither agents nor storage. Sampling is a pure function of logits, parameters and position.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.engines.base import Logits, Vocab
from actors.turn import FinishReason, SamplingParams


def sample(logits: Logits, params: SamplingParams, position: int) -> int:
    """Draw the token at `position`. Greedy at temperature 0; else softmax, then top-p."""
    if params.temperature == 0:
        return int(logits.argmax())
    temperature = np.float32(max(params.temperature, 1e-6))
    weights = np.exp((logits - logits.max()) / temperature).astype(np.float64)
    candidates = np.arange(len(weights))
    if params.top_p < 1:
        candidates = _nucleus(weights, params.top_p)
    mass = np.cumsum(weights[candidates])
    key = params.seed % 2**128  # any integer is a seed
    draw = np.random.Generator(np.random.Philox(key=key, counter=position)).random()
    chosen = int(np.searchsorted(mass, draw * mass[-1], side="right"))
    return int(candidates[min(chosen, len(candidates) - 1)])


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """The fewest tokens, heaviest first, that together hold top_p of the mass."""
    wanted = top_p * weights.sum()
    for size in (256, len(weights)):  # the few heaviest nearly always suffice
        size = min(size, len(weights))
        heavy = np.argpartition(-weights, size - 1)[:size]
        heavy = heavy[np.lexsort((heavy, -weights[heavy]))]
        mass = np.cumsum(weights[heavy])
        if mass[-1] >= wanted:
            break
    return heavy[: int(np.searchsorted(mass, wanted)) + 1]


def text_of(vocab: Vocab, ids: Ids[int]) -> str:
    """The visible text of token ids; what is no UTF-8 becomes U+FFFD."""
    return b"".join(map(vocab.token_bytes, ids)).decode("utf-8", "replace")


class TextStream:
    """Token ids -> visible text: whole characters only, nothing of a stop string or its beginning.

    After `push` returns with `stopped` set, the text is complete and ends before the stop string.
    """

    def __init__(self, vocab: Vocab, stop: Ids[str]) -> None:
        self._vocab = vocab
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.text = ""  # all that was made visible
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that becomes visible with this token."""
        self._held += self._decoder.decode(self._vocab.token_bytes(token_id))
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
    new_ids: list[int] = field(default_factory=list)  # sampled, not yet sent
    priority: int = 0

    @property
    def is_prefill(self) -> bool:
        """More than the last token is missing in the engine."""
        return len(self.tokens) - self.n_rows > 1

    @property
    def reply(self) -> list[int]:
        return self.tokens[self.n_prompt :]

    def accept(self, token: int, eog: frozenset[int]) -> str:
        """Take one sampled token; returns the text it makes visible. Sets finish_reason."""
        if token in eog:
            self.finish_reason = "stop"
            return self.text.finish()
        self.tokens.append(token)
        self.new_ids.append(token)
        visible = self.text.push(token)
        if self.text.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) - self.n_prompt >= self.max_tokens:
            self.finish_reason = "length"
            visible += self.text.finish()
        return visible
