"""Guesses of what a sequence says next, from the ids it has: prompt lookup. Pure.

Where the last few ids of prompt and reply have occurred before, what followed there is the draft.
The index grows with the ids, so a step costs the same after 32K of them as after 100. Knows neither
engines nor whether a draft pays (actors.payoff).
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

_FADE = 0.95  # of what was seen before, with every token checked
_PRIOR = 2.0  # tokens that the first guess counts as


class NGrams:
    """Every run of `least` .. `most` ids -> where it was followed last."""

    def __init__(self, least: int = 2, most: int = 4) -> None:
        if not 1 <= least <= most:
            raise ValueError(f"n-grams of {least} to {most} ids")
        self._sizes = range(most, least - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index of the id after it
        self._indexed = 0  # ids known as followers

    def follow(self, tokens: Ids[int], at_most: int = 2048) -> bool:
        """Take in ids that were appended since; whether all are."""
        stop = min(len(tokens), self._indexed + at_most)
        for at in range(self._indexed, stop):
            for size in self._sizes:
                if size <= at:
                    self._after[tuple(tokens[at - size : at])] = at
        self._indexed = stop
        return stop == len(tokens)

    def draft(self, tokens: Ids[int], k: int) -> tuple[list[int], int]:
        """(at most k ids that may come next, length of the match they follow). The longest match
        counts, of equal ones the last. `follow` has seen all `tokens`."""
        for size in self._sizes:
            at = self._after.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if at is not None:
                found = list(tokens[at : at + k])
                while len(found) < k:  # the match reaches to the end: it repeats itself
                    found.append(found[len(found) - (len(tokens) - at)])
                return found, size
        return [], 0


@dataclass
class Acceptance:
    """How likely the next drafted token is accepted, if those before it were."""

    rate: float = 0.5
    _weight: float = _PRIOR

    def record(self, hits: int, misses: int) -> None:
        """So many drafted tokens were right; the one after them was not (1) or is not known (0)."""
        for hit in (1.0,) * hits + (0.0,) * misses:
            weight = self._weight * _FADE
            self.rate = (self.rate * weight + hit) / (weight + 1)
            self._weight = weight + 1


@dataclass
class Drafting:
    """What one sequence's drafts have been worth."""

    ngrams: NGrams = field(default_factory=NGrams)
    rates: dict[int, Acceptance] = field(default_factory=dict)  # by length of the match
    guess: list[int] = field(default_factory=list)  # for the step under way, sent or not
    match: int = 0  # what the guess follows
    n_tokens: int = 0  # of the sequence, when it was made

    def rate(self, match: int, first: float) -> Acceptance:
        """`first`: what others of this kind have been worth."""
        return self.rates.setdefault(match, Acceptance(first))

    def check(self, tokens: Ids[int]) -> tuple[int, int]:
        """(hits, misses) of the guess, against what the sequence has become."""
        taken, guess = tokens[self.n_tokens :], self.guess
        self.guess = []
        for hits, (token, guessed) in enumerate(zip(taken, guess, strict=False)):
            if token != guessed:
                return hits, 1
        return min(len(taken), len(guess)), 0
