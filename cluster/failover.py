"""One stream over several attempts: what was emitted, and how another replica goes on from there.

Pure. The log accepts only the current attempt and the next index, so that a replica that was given
up too early (it was paused, or its node cut off) can add nothing to the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from actors.turn import Resume, Tokens, TurnFinished, TurnRequest, TurnStarted


@dataclass
class TurnLog:
    """The life of one turn at the ingress."""

    request: TurnRequest
    started: TurnStarted | None = None
    ids: list[int] = field(default_factory=list)
    attempt: int = 0
    failovers: int = 0  # attempts that ended in a loss
    moves: int = 0  # attempts that ended in a migration
    again_tokens: int = 0  # of prompt and reply that later attempts prefilled

    def next_request(self) -> TurnRequest:
        """The request of a new attempt, with what earlier ones fixed."""
        self.attempt += 1
        resume = None
        if self.started is not None:
            resume = Resume(self.started.prompt_ids, tuple(self.ids))
        return replace(self.request, attempt=self.attempt, resume=resume)

    def accept_start(self, item: TurnStarted) -> bool:
        """Whether this is the turn's first start, which the client is told of."""
        if item.attempt != self.attempt:
            return False
        first = self.started is None
        if first:
            self.started = item
        else:
            self.again_tokens += len(item.prompt_ids) + len(self.ids) - item.rows
        return first

    def accept(self, item: Tokens | TurnFinished) -> bool:
        """Whether the item is the next one; its ids are then in the log."""
        if item.attempt != self.attempt or item.index != len(self.ids):
            return False
        if isinstance(item, Tokens):
            self.ids.extend(item.ids)
        return True
