"""Speculative decoding: which drafts go into a step, and what became of them.

A decode becomes a chunk of the last token and the drafted ones; the sampler draws at each of their
positions as it would have, so drafts change how many steps a reply takes and nothing else. Rows of
refused drafts are cut from the engine before anything else looks at them (actors.stepper). None are
drafted where that might be refused, where cells are short, or where it does not pay.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Literal

from actors.cells import Cells
from actors.draft_model import DraftModel
from actors.drafts import Acceptance, Drafting
from actors.engines.base import Engine
from actors.payoff import Offer, Payoff
from actors.scheduler import Scheduled
from actors.sequence import Sequence

Kind = Literal["off", "ngram", "draft"]
_SURE = 0.8  # of a draft that takes a prompt token's place
_HOPE = 0.6  # of a draft model's acceptance, when it is tried again


@dataclass(frozen=True)
class SpeculationConfig:
    kind: Kind = "off"
    draft_tokens: int = 8  # for one sequence in one step, at most


class Speculator:
    """Used by the loop's thread. `draft`: the engine of the draft model, for kind "draft"."""

    def __init__(
        self,
        config: SpeculationConfig,
        engine: Engine,
        cells: Cells,
        max_step_s: float,
        draft: Engine | None = None,
    ) -> None:
        if (config.kind == "draft") != (draft is not None):
            raise ValueError("a draft model and speculation = draft come together")
        self._config, self._engine, self._cells = config, engine, cells
        self._model = DraftModel(draft) if draft is not None else None
        self._rates: dict[int, Acceptance] = {}  # of all sequences, by length of the match
        self.payoff = Payoff(max_step_s)
        self.drafted = self.accepted = 0

    def plan(self, decodes: Ids[Sequence], room: int, *, alone: bool) -> dict[int, list[int]]:
        """Drafts of the next step, by id(sequence); `room`: tokens in all. Not `alone`: prompts
        are prefilled in it, too, and only drafts that are nearly sure take their place."""
        if self._config.kind == "off" or not decodes:
            return {}
        offers = [self._offer(sequence, room // len(decodes)) for sequence in decodes]
        if alone:
            counts = self.payoff.choose(offers)
        else:
            counts = [0 if self._model else _sure(offer) for offer in offers]
        chosen = zip(decodes, counts, strict=True)
        wanted = [(s, n) for s, k in chosen if (n := self._allowed(s, k))]
        if self._model is not None:
            guesses = self._model.draft(wanted) if wanted else {}
            for sequence, _ in wanted:
                _drafting(sequence).guess = guesses.get(sequence.seq_id, [])
            self.payoff.draft_s = self._model.step_s or 0.0
        drafts = {id(s): _drafting(s).guess[:n] for s, n in wanted}
        return {key: ids for key, ids in drafts.items() if ids}

    def _offer(self, sequence: Sequence, room: int) -> Offer:
        drafting, tokens = _drafting(sequence), sequence.tokens
        drafting.n_tokens, drafting.guess, drafting.match = len(tokens), [], 0
        left = sequence.max_tokens - (len(tokens) - sequence.n_prompt)
        most = max(0, min(self._config.draft_tokens, room, left - 1))
        if self._model is None:  # made even if it is not sent: so its worth is known for nothing
            if drafting.ngrams.follow(tokens):
                found = drafting.ngrams.draft(tokens, self._config.draft_tokens)
                drafting.guess, drafting.match = found
            rate = self._rate(drafting).rate
            return Offer(rate, min(most, len(drafting.guess)), rate)
        return Offer(self._rate(drafting).rate, 0 if self._model.broken else most, _HOPE)

    def _rate(self, drafting: Drafting) -> Acceptance:
        shared = self._rates.setdefault(drafting.match, Acceptance())
        return drafting.rate(drafting.match, shared.rate)

    def _allowed(self, sequence: Sequence, k: int) -> int:
        """Of k drafts those that have cells, and whose rows can be taken back."""
        engine, rows = self._engine, sequence.n_rows
        if k and engine.window:
            # A block's end is never jumped over: the window there is kept when it is reached.
            size = engine.key.spec.block_tokens
            k = min(k, -(rows + 1) % size)
            if rows + k + 2 > engine.window:
                # Does it keep more rows than the window, as many as drafts may push out of it?
                k = k if rows - k >= engine.window and self._can_cut(sequence, rows - k) else 0
        return self._cells.for_drafts(sequence, k) if k else 0

    def _can_cut(self, sequence: Sequence, n_rows: int) -> bool:
        return self._engine.can_truncate(sequence.seq_id, n_rows)

    def record(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """A step has gone by: the sequence's tokens say what its guess was worth."""
        if self._config.kind == "off" or sequence.drafting is None:
            return
        drafting = sequence.drafting
        hits, misses = drafting.check(sequence.tokens)
        if hits or misses:
            for acceptance in (self._rate(drafting), self._rates[drafting.match]):
                acceptance.record(hits, misses)
        self.drafted += drafted
        self.accepted += accepted

    def measure(self, scheduled: Ids[Scheduled], seconds: float) -> None:
        """A step of these chunks took so long."""
        if self._config.kind != "off" and all(entry.n_tokens == 1 for entry in scheduled):
            drafted = sum(len(entry.draft) for entry in scheduled)
            self.payoff.measure(len(scheduled), drafted, seconds)

    @property
    def model_s(self) -> float:
        """Spent in the draft model so far."""
        return self._model.busy_s if self._model is not None else 0.0

    @property
    def kv_bytes(self) -> int:
        """Allocated for the draft model's cells."""
        return self._model.kv_bytes if self._model is not None else 0

    def close(self) -> None:
        if self._model is not None:
            self._model.close()


def _drafting(sequence: Sequence) -> Drafting:
    if sequence.drafting is None:
        sequence.drafting = Drafting()
    return sequence.drafting


def _sure(offer: Offer) -> int:
    n, chance = 0, offer.rate
    while n < offer.most and chance >= _SURE:
        n, chance = n + 1, chance * offer.rate
    return n
