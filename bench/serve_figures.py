"""What `kvferry bench serve` measures, in numbers: a figure of both sides, ratios, agreement.

Pure arithmetic; knows no server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from actors.engines.base import Vocab
from actors.sequence import visible_ids

# Nats between the two likeliest tokens. A prompt in other chunks is computed by other kernels: in
# one engine (SmolLM2, 200 tokens) that moves single logits by 0.7 and this gap by 0.3.
NEAR_TIE = 0.5
_MOST_PARTINGS = 8  # looked into, of one comparison: each costs the prefill of its prompt


@dataclass
class Answer:
    """One request as its client saw it; times are of one clock."""

    began: float
    first: float = 0.0  # text
    ended: float = 0.0
    text: str = ""
    head: int = 0  # characters that came first, at once
    tokens: int = 0
    prefilled: int = 0  # prompt tokens that were computed
    ids: list[int] = field(default_factory=list)  # llama-server only

    @property
    def prefill_s(self) -> float:
        return self.first - self.began

    @property
    def decode_tokens_per_s(self) -> float:
        """Of what came after the first text, by characters: it may be several tokens. Where all
        came at once, prefill counts as well."""
        if self.ended <= self.first:
            return self.tokens / (self.ended - self.began)
        return self.tokens * (1 - self.head / len(self.text)) / (self.ended - self.first)


@dataclass
class Compared:
    """One figure, an entry per run and side; the runs were interleaved. `target` is for the ratio
    ours / theirs: a least one, or with `at_most` a greatest one; None: for information."""

    name: str
    unit: str
    peer: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    target: float | None = None
    at_most: bool = False

    @property
    def ratio(self) -> float | None:
        """Of the medians; None without a peer."""
        return median(self.ours) / median(self.theirs) if self.theirs else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The least and the greatest ratio of neighbouring runs: how noisy the machine was."""
        pairs = [a / b for a, b in zip(self.ours, self.theirs, strict=False)]
        return (min(pairs), max(pairs)) if pairs else None

    @property
    def met(self) -> bool | None:
        """None where there is nothing to meet."""
        return meets(self.ratio, self.target, at_most=self.at_most)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "unit": self.unit, "peer": self.peer, "ours": self.ours,
            "theirs": self.theirs, "ratio": self.ratio, "spread": self.spread,
            "target": self.target, "at_most": self.at_most, "met": self.met,
        }  # fmt: skip


def meets(value: float | None, target: float | None, *, at_most: bool) -> bool | None:
    if value is None or target is None:
        return None
    return value <= target if at_most else value >= target


@dataclass
class Agreement:
    """Greedy replies of both sides to equal prompts."""

    replies: int = 0
    equal: int = 0
    near: int = 0  # part at a near tie
    unchecked: int = 0
    apart: list[str] = field(default_factory=list)  # what parts elsewhere: a fault

    def add(self, ours: str, theirs: str, gap: Callable[[], float]) -> None:
        """`gap` finds out how near a tie the place is where they part."""
        self.replies += 1
        if ours == theirs:
            self.equal += 1
        elif self.near + len(self.apart) >= _MOST_PARTINGS:
            self.unchecked += 1
        elif (nats := gap()) < NEAR_TIE:
            self.near += 1
        else:
            common = _common(ours, theirs)
            self.apart.append(
                f"after {common[-40:]!r}: {ours[len(common) :][:20]!r} and "
                f"{theirs[len(common) :][:20]!r}, {nats:.2f} nats apart"
            )

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def parting(vocab: Vocab, ids: Sequence[int], ours: str, theirs: str) -> list[int]:
    """Numbers of `ids` (of the text `theirs`) after which the replies may have parted, likeliest
    first: the last common characters can be one token here and the beginning of one there."""
    n, _ = visible_ids(vocab, ids, _common(ours, theirs))
    return [n, n - 1] if n else [n]


def _common(a: str, b: str) -> str:
    """What both begin with."""
    n = min(len(a), len(b))
    return a[: next((i for i in range(n) if a[i] != b[i]), n)]
