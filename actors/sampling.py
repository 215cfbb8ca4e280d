"""From logits to a token: the sampler chain, the draw, log probabilities.

    bias, penalties -> (grammar) -> top-k -> top-p -> min-p -> temperature -> draw

is llama.cpp's default chain, each step with its meaning there. Pure numpy, the same on every
engine: the token at a position depends on logits, parameters, the ids before it and the position
alone, so a turn that moves to another replica draws what it would have drawn. What a sampler
remembers is rebuilt from those ids. Knows nothing of text, batches or streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Ids

import numpy as np
from numpy.typing import NDArray

from actors.engines.base import Logits, Vocab
from actors.errors import InvalidRequest
from actors.grammar import Grammar
from actors.turn import SamplingParams, TokenLogprob

Indices = NDArray[np.intp]
_LEAST = -9999.0  # a log probability that JSON can carry; OpenAI's own floor
_REACH = (9.0, 12.0, np.inf)  # below the largest logit: where a nucleus is looked for


def check(params: SamplingParams, vocab: Vocab) -> None:
    """Raises InvalidRequest for what only a vocabulary can tell: ids it does not have."""
    for param, ids in (
        ("logit_bias", [token for token, _ in params.logit_bias]),
        ("stop_token_ids", params.stop_token_ids),
    ):
        for token in ids:
            if not 0 <= token < vocab.size:
                raise InvalidRequest(
                    f"{param}: {token} is no token of this model, which has {vocab.size}",
                    param,
                    "invalid_value",
                )


def sample(
    logits: Logits,
    params: SamplingParams,
    position: int,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """Draw the token at `position`, of the `allowed` ones. Greedy at temperature 0."""
    ids, logits = _only(logits, allowed)
    if params.temperature == 0:
        chosen = int(logits.argmax())
    else:
        kept = truncated(logits, params)
        if kept is not None:
            ids, logits = kept if ids is None else ids[kept], logits[kept]
        chosen = _draw(logits, params, position)
    return chosen if ids is None else int(ids[chosen])


def _only(logits: Logits, allowed: NDArray[np.bool_] | None) -> tuple[Indices | None, Logits]:
    """(ids, their logits); None: all ids."""
    if allowed is None:
        return None, logits
    ids = np.flatnonzero(allowed[: len(logits)])
    return ids, logits[ids]


def _draw(logits: Logits, params: SamplingParams, position: int) -> int:
    temperature = np.float32(max(params.temperature, 1e-6))
    mass = np.exp((logits - logits.max()) / temperature).astype(np.float64).cumsum()
    chosen = int(np.searchsorted(mass, _uniform(params.seed, position) * mass[-1], side="right"))
    return min(chosen, len(mass) - 1)


def _uniform(seed: int, position: int) -> float:
    """In [0, 1): a hash, so that it depends on these two and on no library's generators."""
    key = (seed % 2**128).to_bytes(16, "big")  # any integer is a seed
    digest = hashlib.blake2b(position.to_bytes(8, "big"), key=key, digest_size=8).digest()
    return float((int.from_bytes(digest, "big") >> 11) * 2.0**-53)


def truncated(logits: Logits, params: SamplingParams) -> Indices | None:
    """Indices that top-k, then top-p, then min-p leave, rising; None: all."""
    kept: Indices | None = None
    if 0 < params.top_k < len(logits):
        kept = _heaviest(logits, params.top_k)
        logits = logits[kept]
    if params.top_p < 1:
        nucleus = _nucleus(logits, params.top_p)
        kept, logits = nucleus if kept is None else kept[nucleus], logits[nucleus]
    if params.min_p > 0:
        probable = np.flatnonzero(logits >= logits.max() + np.float32(np.log(params.min_p)))
        kept = probable if kept is None else kept[probable]
    return kept


def _heaviest(logits: Logits, k: int) -> Indices:
    """The k largest, in the order of their indices; of equal ones the first, so that the machine
    does not matter."""
    if k >= len(logits):
        return np.arange(len(logits))
    near = np.flatnonzero(logits >= _at_most_kth(logits, k))
    heavy = logits[near]
    return near[_from(heavy, np.partition(heavy, len(heavy) - k)[len(heavy) - k], k)]


def _at_most_kth(logits: Logits, k: int) -> np.float32:
    """A bound that at least k logits reach, and few of a large vocabulary: ordering those few is
    quick. The k-th largest of the largest ones of many groups is one."""
    n_groups = max(512, 2 * k)
    per_group = len(logits) // n_groups
    if per_group < 2:
        return np.float32(-np.inf)
    largest = logits[: n_groups * per_group].reshape(per_group, n_groups).max(axis=0)
    bound: np.float32 = np.partition(largest, n_groups - k)[n_groups - k]
    return bound


def _from(logits: Logits, bound: np.float32, k: int) -> Indices:
    """The k largest, of which `bound` is the least."""
    kept = np.flatnonzero(logits >= bound)
    if len(kept) > k:
        ties = np.flatnonzero(logits[kept] == bound)
        kept = np.delete(kept, ties[k - len(kept) :])
    return kept


def _nucleus(logits: Logits, top_p: float) -> Indices:
    """The fewest tokens, heaviest first, that together hold top_p of the mass."""
    peak = logits.max()
    weights = logits - peak
    np.exp(weights, out=weights)
    wanted = top_p * weights.sum(dtype=np.float64)
    for reach in _REACH:
        heavy = np.flatnonzero(logits >= peak - np.float32(reach))
        near = logits[heavy]
        falling = np.sort(near)[::-1]
        up_to = np.exp(falling - peak).astype(np.float64).cumsum()
        if up_to[-1] >= wanted:
            break
    last = min(int(np.searchsorted(up_to, wanted)), len(falling) - 1)
    return heavy[_from(near, falling[last], last + 1)]


class Sampler:
    """The chain of one sequence, with what it remembers of the ids so far.

    repetition_penalty counts prompt and reply, presence and frequency the reply alone (as vLLM;
    OpenAI has only the latter two). Bias comes before the penalties, a grammar after them.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab: Vocab,
        prompt: Ids[int],
        reply: Ids[int],
        grammar: Grammar | None = None,
    ) -> None:
        """`grammar` has accepted `reply` already."""
        self.params, self.grammar = params, grammar
        self._vocab = vocab
        bias = dict(params.logit_bias)
        if params.ignore_eos:
            bias |= dict.fromkeys(vocab.eog, -np.inf)
        self._biased = np.array(list(bias), np.intp)
        self._bias = np.array(list(bias.values()), np.float32)
        self._seen: NDArray[np.bool_] | None = None  # (n_vocab,) in prompt or reply
        self._counts: NDArray[np.float32] | None = None  # (n_vocab,) of the reply
        if params.repetition_penalty != 1:
            self._seen = np.zeros(vocab.size, np.bool_)
            self._seen[[*prompt, *reply]] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = np.bincount(reply, minlength=vocab.size).astype(np.float32)

    def draw(self, logits: Logits, position: int) -> int:
        """The token at `position`. Raises InvalidRequest when the grammar has become too complex
        to go on."""
        allowed = self.grammar.mask() if self.grammar is not None else None
        if self._seen is not None or self._counts is not None or not len(self._biased):
            return sample(self.adjusted(logits), self.params, position, allowed)
        own = logits[self._biased]  # put back afterwards: a copy of all takes as long as the draw
        logits[self._biased] += self._bias
        try:
            return sample(logits, self.params, position, allowed)
        finally:
            logits[self._biased] = own

    def accept(self, token: int) -> None:
        """The reply goes on with this token."""
        if self._seen is not None:
            self._seen[token] = True
        if self._counts is not None:
            self._counts[token] += 1
        if self.grammar is not None:
            self.grammar.accept(token)

    @property
    def complete(self) -> bool:
        """The grammar lets nothing follow."""
        return self.grammar is not None and self.grammar.complete

    def adjusted(self, logits: Logits) -> Logits:
        """With bias and penalties; the same array where nothing is set, else a copy."""
        if not len(self._biased) and self._seen is None and self._counts is None:
            return logits
        logits = logits.copy()
        logits[self._biased] += self._bias
        if self._seen is not None:
            penalty = np.float32(self.params.repetition_penalty)
            seen = logits[self._seen]
            logits[self._seen] = np.where(seen > 0, seen / penalty, seen * penalty)
        if self._counts is not None:
            logits -= self._counts * np.float32(self.params.frequency_penalty)
            logits -= (self._counts > 0) * np.float32(self.params.presence_penalty)
        return logits

    def logprob(self, logits: Logits, token: int) -> TokenLogprob:
        """Of the model's own distribution: before bias, penalties, grammar and temperature."""
        assert self.params.logprobs is not None
        top = _heaviest(logits, self.params.logprobs) if self.params.logprobs else np.arange(0)
        top = top[np.argsort(-logits[top], kind="stable")]
        peak = float(logits.max())
        total = peak + float(np.log(np.exp(logits - logits.max()).sum(dtype=np.float64)))

        def of(i: int) -> tuple[bytes, float]:
            return self._vocab.token_bytes(i), max(float(logits[i]) - total, _LEAST)

        raw, logprob = of(token)
        return TokenLogprob(raw, logprob, tuple(of(int(i)) for i in top))
