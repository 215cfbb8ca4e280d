"""Which sequences lie in one batch of caches, and the moves between batches.

A sequence is always in exactly one batch, mostly alone. Sequences that decode in one step are put
together and stay so while they go on; what leaves or joins is cut out of or added to the arrays,
which copies them. Padding is bounded: sequences of very unlike lengths stay apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.engines.mlx_float_cache import BatchKVCache

_PADDING = 256  # rows that a sequence's padding may always take


@dataclass(eq=False)
class Batch:
    """`members[i]` is the i-th sequence of every cache; one cache per layer."""

    members: list[int]
    caches: list[BatchKVCache]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def lengths(self) -> list[int]:
        return [self.caches[0].n_rows(i) for i in range(len(self.members))]


class Batches:
    def __init__(self, n_seq_max: int, new: Callable[[], list[BatchKVCache]]) -> None:
        """new: one empty sequence's caches, one per layer."""
        self._new = new
        self._of = [Batch([i], new()) for i in range(n_seq_max)]

    @property
    def nbytes(self) -> int:
        batches = {id(batch): batch for batch in self._of}.values()
        return sum(cache.nbytes for batch in batches for cache in batch.caches)

    def find(self, seq_id: int) -> tuple[list[BatchKVCache], int]:
        """(the caches it lies in, its place in them)."""
        batch = self._of[seq_id]
        return batch.caches, batch.members.index(seq_id)

    def n_rows(self, seq_id: int) -> int:
        caches, place = self.find(seq_id)
        return caches[0].n_rows(place)

    def alone(self, seq_id: int) -> list[BatchKVCache]:
        """The sequence's caches, which hold no other from now on."""
        batch = self._of[seq_id]
        if len(batch.members) > 1:
            place = batch.members.index(seq_id)
            self._of[seq_id] = Batch([seq_id], [cache.extract(place) for cache in batch.caches])
            self._leave(batch, place)
        return self._of[seq_id].caches

    def replace(self, seq_id: int, caches: list[BatchKVCache]) -> None:
        """Other caches for a sequence that is alone."""
        self._of[seq_id] = Batch([seq_id], caches)

    def empty(self, seq_id: int) -> None:
        batch = self._of[seq_id]
        if len(batch.members) > 1:
            self._leave(batch, batch.members.index(seq_id))
        self._of[seq_id] = Batch([seq_id], self._new())

    def fork(self, source: int, target: int, n_rows: int) -> None:
        """`target` becomes the first rows of `source`; arrays are shared until one is written."""
        caches, place = self.find(source)
        copies = [cache.extract(place) for cache in caches]
        for cache in copies:
            cache.trim(cache.n_rows(0) - n_rows)
        self._of[target] = Batch([target], copies)

    def together(self, seq_ids: Sequence[int]) -> list[Batch]:
        """These sequences, and no others, in as few batches as padding allows."""
        wanted = set(seq_ids)
        for seq_id in range(len(self._of)):
            batch = self._of[seq_id]
            if len(batch.members) < 2:
                continue
            if seq_id in wanted and not _fits(batch.lengths):
                self._split(batch)
            elif seq_id not in wanted and wanted & set(batch.members):
                self.alone(seq_id)
        found = {id(self._of[i]): self._of[i] for i in seq_ids}.values()
        joined: list[Batch] = []
        for batch in sorted(found, key=lambda batch: batch.longest, reverse=True):
            other = next((x for x in joined if _fits(x.lengths + batch.lengths)), None)
            if other is None:
                joined.append(batch)
                continue
            for cache, more in zip(other.caches, batch.caches, strict=True):
                cache.extend(more)
            other.members += batch.members
            for seq_id in batch.members:
                self._of[seq_id] = other
        return joined

    def _leave(self, batch: Batch, place: int) -> None:
        rest = [i for i in range(len(batch.members)) if i != place]
        for cache in batch.caches:
            cache.filter(rest)
        del batch.members[place]

    def _split(self, batch: Batch) -> None:
        for seq_id in batch.members[1:]:
            self.alone(seq_id)


def _fits(lengths: Sequence[int]) -> bool:
    """At most half of a batch is padding, or little of it."""
    return max(lengths) * len(lengths) <= 2 * sum(lengths) + _PADDING * len(lengths)
