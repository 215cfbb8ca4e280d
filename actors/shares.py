"""Cells that several sequences have in common, counted once. Pure; used by actors.residency.

A fork shares the beginning of its source, so whoever shares a span of positions also shares every
span before it. Spans of one holder are none: those cells are its own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(eq=False)
class _Span:
    """Positions start..stop, the same cells for all holders."""

    start: int
    stop: int
    holders: set[int]  # two or more


class Shares:
    def __init__(self) -> None:
        self._spans: dict[int, list[_Span]] = {}  # seq_id -> its spans, from position 0 on

    def share(self, source: int, target: int, n: int) -> None:
        """The empty `target` now holds the first `n` cells of `source`."""
        self._split(source, n)
        spans = self._spans.setdefault(source, [])
        taken = [span for span in spans if span.stop <= n]
        begin = taken[-1].stop if taken else 0
        if begin < n:
            taken.append(_Span(begin, n, {source}))
            spans.append(taken[-1])
        for span in taken:
            span.holders.add(target)
        self._spans[target] = taken

    def cut(self, seq_id: int, n: int) -> None:
        """The sequence keeps its first `n` cells."""
        self._split(seq_id, n)
        spans = self._spans.get(seq_id, [])
        for span in [span for span in spans if span.start >= n]:
            spans.remove(span)
            span.holders.discard(seq_id)
            if len(span.holders) == 1:
                (last,) = span.holders
                self._spans[last].remove(span)

    def _split(self, seq_id: int, n: int) -> None:
        """Let a span end at position `n`."""
        for span in self._spans.get(seq_id, []):
            if span.start < n < span.stop:
                rest = _Span(n, span.stop, set(span.holders))
                span.stop = n
                for holder in rest.holders:
                    spans = self._spans[holder]
                    spans.insert(spans.index(span) + 1, rest)
                return

    def shared(self, seq_id: int) -> int:
        """Cells at the beginning of a sequence that others hold, too."""
        spans = self._spans.get(seq_id)
        return spans[-1].stop if spans else 0

    def saved(
        self, seq_ids: Collection[int], cut: int | None = None, keep: int | None = None
    ) -> int:
        """Cells that these sequences would need besides if they shared none; sequence `cut` counts
        with its first `keep` only."""
        members, saved = set(seq_ids), 0
        for span in {span for seq_id in members for span in self._spans.get(seq_id, [])}:
            held = len(span.holders & members)
            saved += (span.stop - span.start) * (held - 1)
            if keep is not None and cut in span.holders and held > 1:
                saved -= max(0, span.stop - max(span.start, keep))
        return saved
