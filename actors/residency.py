"""Which branch sits in which of the engine's sequences, and who leaves when room is needed.

A busy sequence has a turn in it and a reservation of cells; an idle one keeps its rows for the
agent's next turn until another needs the place. A sequence may begin with another's cells; those
are counted once. Used by the loop's thread only; the counts may be read from others.
"""

from __future__ import annotations

from collections import OrderedDict

from actors.branches import Branch
from actors.engines.base import Engine
from actors.shares import Shares

_IDLE_TOKENS = 64  # see Residency.charge


class Residency:
    """Least recently used idle branches are evicted; their rows are encoded already."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._free = list(range(engine.n_seq_max))[::-1]
        self._idle: OrderedDict[int, Branch] = OrderedDict()  # seq_id -> branch, oldest first
        self._busy: dict[int, tuple[Branch, int]] = {}  # seq_id -> (branch, reserved cells)
        self._shares = Shares()
        self._computed = 0  # tokens
        self._parked: dict[int, int] = {}  # seq_id -> tokens computed when it became idle
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
        return self._cells(list(self._busy))

    @property
    def cells_used(self) -> int:
        """Cells that idle sequences fill and busy ones have reserved."""
        return self._cells([*self._idle, *self._busy])

    def find(self, branch: Branch) -> int | None:
        """The sequence that holds an idle branch's rows. Any thread may ask."""
        idle = list(self._idle.items())
        return next((seq_id for seq_id, b in idle if b is branch), None)

    def branch(self, seq_id: int) -> Branch | None:
        """Whose rows a sequence holds."""
        busy = self._busy.get(seq_id)
        return busy[0] if busy else self._idle.get(seq_id)

    def is_idle(self, seq_id: int) -> bool:
        return seq_id in self._idle

    def resume(self, seq_id: int, cells: int, keep: int | None = None) -> bool:
        """Make an idle sequence busy again, cut to its first `keep` rows, with `cells` reserved;
        False if they do not fit."""
        if not self._make_room(cells, seq_id, keep):
            return False
        branch = self._idle.pop(seq_id)
        if keep is not None:
            self.truncate(seq_id, keep)
        self._busy[seq_id] = (branch, cells)
        return True

    def acquire(self, branch: Branch, cells: int) -> int | None:
        """An empty sequence with `cells` reserved, or None."""
        if not self._make_room(cells, need_sequence=True):
            return None
        seq_id = self._free.pop()
        self._busy[seq_id] = (branch, cells)
        return seq_id

    def fork(self, source: int, branch: Branch, cells: int, n: int) -> int | None:
        """A sequence with `cells` reserved that begins with the first `n` rows of `source`, whose
        cells it shares; or None. An idle source that leaves no room gives up its own place. Raises
        EngineFault."""
        if not self._make_room(cells - n, keep_seq=source, need_sequence=True):
            return self._inherit(source, branch, cells, n)
        seq_id = self._free[-1]
        self._engine.fork(source, seq_id, n)
        self._shares.share(source, seq_id, n)
        self._free.pop()
        self._busy[seq_id] = (branch, cells)
        return seq_id

    def _inherit(self, source: int, branch: Branch, cells: int, n: int) -> int | None:
        if source not in self._idle or not self.resume(source, cells, n):
            return None
        self.evictions += 1
        self._busy[source] = (branch, cells)
        return source

    def grow(self, seq_id: int, cells: int) -> bool:
        """Reserve `cells` in all for a busy sequence; False if they do not fit."""
        branch, reserved = self._busy[seq_id]
        if cells > reserved:
            if not self._make_room(cells, seq_id):
                return False
            self._busy[seq_id] = (branch, cells)
        return True

    def reserved(self, seq_id: int) -> int:
        """Cells of a busy sequence."""
        return self._busy[seq_id][1]

    def truncate(self, seq_id: int, n_rows: int) -> None:
        """Cut a sequence in the engine and here. Raises EngineFault unless can_truncate."""
        self._engine.truncate(seq_id, n_rows)
        self._shares.cut(seq_id, n_rows)

    def park(self, seq_id: int) -> None:
        """The turn is over: the sequence stays, idle, with its rows."""
        branch, _ = self._busy.pop(seq_id)
        self._idle[seq_id] = branch
        self._parked[seq_id] = self._computed
        self.changes += 1

    def charge(self, n_tokens: int) -> None:
        """So many tokens were computed. Where idle rows slow a sequence down that runs alone, they
        leave once that has cost about what bringing them back from RAM does: on two cores, an idle
        row costs 1.4 us for a token alone, 0.2 us for one of a batch, and its return 40 us. Beside
        others nobody leaves: rows would go on in the cells that came free, before those they
        follow."""
        if self._engine.idle_rows_cost and len(self._busy) == 1:
            self._computed += n_tokens
            late = self._computed - _IDLE_TOKENS
            self._leave([i for i in self._idle if self._parked[i] <= late])

    def make_way(self, *stay: int | None) -> None:
        """A turn begins, or is about to come. Where idle rows cost, and it is alone, all leave but
        those that are needed."""
        if self._engine.idle_rows_cost and not self._busy:
            self._leave([i for i in self._idle if i not in stay])

    def _leave(self, seq_ids: list[int]) -> None:
        self.evictions += len(seq_ids)
        for seq_id in seq_ids:
            self.free(seq_id)

    def give(self, seq_id: int, branch: Branch) -> None:
        """An idle sequence's rows are this branch's now."""
        self._idle[seq_id] = branch
        self.changes += 1

    def free(self, seq_id: int) -> None:
        """Empty a sequence, idle or busy."""
        self._idle.pop(seq_id, None)
        self._busy.pop(seq_id, None)
        self.truncate(seq_id, 0)
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

    # ---- counting

    def _cells(
        self, seq_ids: list[int], change: int | None = None, cells: int = 0, keep: int | None = None
    ) -> int:
        """What these sequences hold, shared cells once; sequence `change` as if it held `cells`,
        and of those it has now the first `keep`."""
        sizes = (cells if seq_id == change else self._size(seq_id) for seq_id in seq_ids)
        return sum(sizes) - self._shares.saved(seq_ids, change, keep)

    def _size(self, seq_id: int) -> int:
        busy = self._busy.get(seq_id)
        return busy[1] if busy else self._engine.n_rows(seq_id)

    def _make_room(
        self,
        cells: int,
        seq_id: int | None = None,
        keep: int | None = None,
        *,
        keep_seq: int | None = None,
        need_sequence: bool = False,
    ) -> bool:
        """Room for `cells` more; or, with `seq_id`, for that sequence to hold `cells` in all, the
        first `keep` of those it has now among them. `keep_seq` must stay."""
        more = 0 if seq_id is not None else cells
        stay = [i for i in self._idle if i in (seq_id, keep_seq)]
        busy = [*self._busy, *stay]
        if self._cells(busy, seq_id, cells, keep) + more > self._engine.n_cells:
            return False  # nobody leaves for what cannot fit anyway
        if need_sequence and not self._free and len(stay) == len(self._idle):
            return False
        while True:
            held = self._cells([*self._idle, *self._busy], seq_id, cells, keep) + more
            lacks = held > self._engine.n_cells
            if not lacks and (self._free or not need_sequence):
                return True
            self._evict(stay, lacks=lacks)

    def _evict(self, stay: list[int], *, lacks: bool) -> None:
        """The oldest leaves; of those whose cells are wanted, the oldest that has some alone."""
        oldest = [i for i in self._idle if i not in stay]
        alone = [i for i in oldest if self._engine.n_rows(i) > self._shares.shared(i)]
        self.evictions += 1
        self.free(alone[0] if lacks and alone else oldest[0])
