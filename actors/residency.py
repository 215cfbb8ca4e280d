"""Which branch sits in which of the engine's sequences, and who leaves when room is needed.

A busy sequence has a turn in it and a reservation of cells; an idle one keeps its rows for the
agent's next turn until another needs the place. Used by the loop's thread only.
"""

from __future__ import annotations

from collections import OrderedDict

from actors.branches import Branch
from actors.engines.base import Engine


class Residency:
    """Least recently used idle branches are evicted; their rows are encoded already."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._free = list(range(engine.n_seq_max))[::-1]
        self._idle: OrderedDict[int, Branch] = OrderedDict()  # seq_id -> branch, oldest first
        self._busy: dict[int, tuple[Branch, int]] = {}  # seq_id -> (branch, reserved cells)
        self.evictions = 0
        self.changes = 0  # that may have made room

    @property
    def n_idle(self) -> int:
        return len(self._idle)

    @property
    def has_place(self) -> bool:
        """Whether any sequence is empty or idle."""
        return bool(self._free or self._idle)

    @property
    def cells_reserved(self) -> int:
        """Cells of busy sequences."""
        return sum(cells for _, cells in self._busy.values())

    @property
    def cells_used(self) -> int:
        """Cells that idle sequences fill and busy ones have reserved."""
        idle = sum(self._engine.n_rows(seq_id) for seq_id in self._idle)
        return idle + self.cells_reserved

    def find(self, branch: Branch) -> int | None:
        """The sequence that holds an idle branch's rows."""
        return next((seq_id for seq_id, b in self._idle.items() if b is branch), None)

    def resume(self, seq_id: int, cells: int) -> bool:
        """Make an idle sequence busy again with `cells` reserved; False if they do not fit."""
        branch = self._idle.pop(seq_id)
        if not self._make_room(cells, need_sequence=False):
            self._idle[seq_id] = branch
            return False
        self._busy[seq_id] = (branch, cells)
        return True

    def acquire(self, branch: Branch, cells: int, keep: int | None = None) -> int | None:
        """An empty sequence with `cells` reserved, or None; `keep` is a sequence not to evict."""
        kept, rows = None, 0
        if keep is not None:
            kept, rows = self._idle.pop(keep), self._engine.n_rows(keep)
        fits = self._make_room(rows + cells, need_sequence=True)
        if kept is not None and keep is not None:
            self._idle[keep] = kept
        if not fits:
            return None
        seq_id = self._free.pop()
        self._busy[seq_id] = (branch, cells)
        return seq_id

    def grow(self, seq_id: int, cells: int) -> bool:
        """Reserve `cells` in all for a busy sequence; False if they do not fit."""
        branch, reserved = self._busy[seq_id]
        if cells > reserved:
            if not self._make_room(cells - reserved, need_sequence=False):
                return False
            self._busy[seq_id] = (branch, cells)
        return True

    def reserved(self, seq_id: int) -> int:
        """Cells of a busy sequence."""
        return self._busy[seq_id][1]

    def park(self, seq_id: int) -> None:
        """The turn is over: the sequence stays, idle, with its rows."""
        branch, _ = self._busy.pop(seq_id)
        self._idle[seq_id] = branch
        self.changes += 1

    def free(self, seq_id: int) -> None:
        """Empty a sequence, idle or busy."""
        self._idle.pop(seq_id, None)
        self._busy.pop(seq_id, None)
        self._engine.truncate(seq_id, 0)
        self._free.append(seq_id)
        self.changes += 1

    def drop(self, branch: Branch) -> None:
        """Empty the idle sequence of a branch, if it has one."""
        seq_id = self.find(branch)
        if seq_id is not None:
            self.free(seq_id)

    def evict_idle(self) -> int:
        """Empty every idle sequence; returns how many."""
        seq_ids = list(self._idle)
        for seq_id in seq_ids:
            self.free(seq_id)
        return len(seq_ids)

    def free_all(self) -> None:
        """Empty every sequence, busy ones too: the engine broke."""
        for seq_id in [*self._idle, *self._busy]:
            self.free(seq_id)

    def _make_room(self, cells: int, *, need_sequence: bool) -> bool:
        if self.cells_reserved + cells > self._engine.n_cells:
            return False  # nobody leaves for what cannot fit anyway
        if need_sequence and not self._free and not self._idle:
            return False
        while self.cells_used + cells > self._engine.n_cells or (need_sequence and not self._free):
            self.evictions += 1
            self.free(next(iter(self._idle)))
        return True
