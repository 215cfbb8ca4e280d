"""Sliding-window rows: kept at a branch's checkpoints only.

A model with sliding windows can continue from position c when its sliding layers have the rows of
the window before c. Those rows are kept for the ends of the last turns and of the system prompt
(checkpoints), so most sliding rows are never stored. A run's sliding part holds the last rows of
the run, from where the oldest window that needs it begins: of a block in which a checkpoint lies
also those behind it. Runs on the persister's thread, `restorable` on a worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actors.branches import AgentMemory, Branch, Run, positions
from storage.codec import Tensors, concat_rows, count_rows, slice_rows
from storage.pool import Key
from storage.spec import ModelCacheSpec, Part

_TURN_STARTS = 2  # checkpoints kept besides the branch's end

Read = Callable[[AgentMemory, Run, Part], Tensors | None]
Keep = Callable[[AgentMemory, Run, Part, Tensors], None]


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay when another is added."""

    opening: int  # end of the system prompt; 0: there is none
    ends: frozenset[int]  # of turns, of which the last two stay


class Windows:
    """`read` and `keep` are those of actors.rows; `drop` forgets rows in the pool."""

    def __init__(
        self, spec: ModelCacheSpec, read: Read, keep: Keep, drop: Callable[[Key], None]
    ) -> None:
        self.size, self._block = spec.window, spec.block_tokens
        self._read, self._keep, self._drop = read, keep, drop

    def block_end(self, at: int) -> int:
        """Up to where sliding rows are kept for a checkpoint at `at`."""
        return -(-at // self._block) * self._block

    def opening(self, at: int) -> int:
        """The checkpoint of a system prompt that ends at `at`: there, or at the start of its block
        where the window does not reach from there to the block's end."""
        return at if self.block_end(at) - at < self.size else at // self._block * self._block

    def first_needed(self, branch: Branch, at: int) -> int:
        """From where sliding rows must be handed over for a checkpoint at `at`."""
        return max(branch.windowed, at - self.size + 1, 0)

    def checkpoint(
        self,
        memory: AgentMemory,
        branch: Branch,
        start: int,
        at: int,
        sliding: Tensors,
        kept: Kept,
    ) -> None:
        """Add the sliding rows of positions start..at to the runs they belong to."""
        needed = max(0, at - self.size + 1)
        for first, run in positions(branch):
            stop, low = first + run.rows, max(first, needed)
            if stop <= needed or self._covers(memory, run, stop, low):
                continue
            carried, end = run.carried or ({}, 0)
            end += first
            if run.carried and start <= end and end - count_rows(carried) <= low:
                piece = concat_rows([carried, slice_rows(sliding, end - start, stop - start)])
            elif start <= low:
                piece = slice_rows(sliding, low - start, stop - start)
            else:
                return  # rows in between were forgotten meanwhile: no checkpoint here
            run.carried, run.has_window = None, True
            self._drop((run.id, "sliding"))  # another agent's part may hold fewer rows
            self._keep(memory, run, "sliding", piece)
        before = [c for c in branch.checkpoints if c in kept.ends and c != at][-_TURN_STARTS:]
        others = {c for c in branch.checkpoints if c == kept.opening}
        branch.checkpoints = sorted({*others, *before, at})
        self._drop_unneeded(memory, branch)

    def _drop_unneeded(self, memory: AgentMemory, branch: Branch) -> None:
        for first, run in positions(branch):
            kept = [at for b in memory.branches if run in b.runs for at in b.checkpoints]
            needed = (first < at and first + run.rows > at - self.size + 1 for at in kept)
            if run.has_window and not any(needed):
                run.drop_window()
                self._drop((run.id, "sliding"))

    def _covers(self, memory: AgentMemory, run: Run, stop: int, low: int) -> bool:
        """Whether the sliding part that a run has reaches down to position `low`."""
        sliding = self._read(memory, run, "sliding") if run.has_window else None
        return sliding is not None and stop - count_rows(sliding) <= low

    def joined(self, memory: AgentMemory, tail: Sequence[Run]) -> tuple[Tensors, int] | None:
        """The last sliding rows that a tail has when it becomes a block, code by code, and how
        many rows lie before their end."""
        pieces: list[Tensors] = []
        end = sum(run.rows for run in tail)
        for run in reversed(tail):
            piece = self._read(memory, run, "sliding") if run.has_window else None
            if piece is not None:
                pieces.insert(0, piece)
            elif not pieces:
                end -= run.rows
                continue
            if piece is None or count_rows(piece) < run.rows:
                break
        return (concat_rows(pieces), end) if pieces else None

    def cut(self, memory: AgentMemory, run: Run, part: Run) -> None:
        """`part` is the first rows of `run`: it gets those of its sliding rows."""
        if not run.has_window:
            return
        sliding = self._read(memory, run, "sliding")
        first = run.rows - count_rows(sliding) if sliding is not None else run.rows
        if sliding is not None and part.rows > first:
            part.has_window = True
            self._keep(memory, part, "sliding", slice_rows(sliding, 0, part.rows - first))

    def restorable(
        self, memory: AgentMemory, branch: Branch, keep: int
    ) -> tuple[int, dict[int, Tensors]]:
        """(how many of the first `keep` rows can be continued from, start of a run -> its sliding
        rows up to there). Without sliding windows: (keep, {})."""
        if not self.size:
            return keep, {}
        for at in sorted((c for c in branch.checkpoints if c <= keep), reverse=True):
            windows = self._window(memory, branch, at)
            if windows is not None:
                return at, windows
        return 0, {}

    def _window(self, memory: AgentMemory, branch: Branch, at: int) -> dict[int, Tensors] | None:
        """Sliding rows of the window before `at`, by run; None when one is missing."""
        needed = max(0, at - self.size + 1)
        windows = {}
        for first, run in positions(branch):
            stop = first + run.rows
            if stop <= needed or first >= at:
                continue
            sliding = self._read(memory, run, "sliding") if run.has_window else None
            if sliding is None or stop - count_rows(sliding) > max(first, needed):
                return None
            held = stop - count_rows(sliding)
            windows[first] = slice_rows(sliding, 0, min(stop, at) - held)
        return windows
