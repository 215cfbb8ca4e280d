"""The engine's new rows to the persister: filled blocks during a turn, the rest after its end, or
when it would take long to compute it again.

A turn's answer never waits for this. While the persister's queue is full, rows stay in the engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

from actors.book import Turn
from actors.engines.base import Engine
from actors.memory import Memory
from actors.rates import Rates
from actors.residency import Residency
from storage.codec import Tensors, count_rows, encode_rows, slice_rows
from storage.spec import KVRows

_MOST_AT_RISK_S = 0.7  # of prefill
_LOOK = 8  # rows, between two looks at that: a look takes as long as all else of a token here


@dataclass(frozen=True)
class Held:
    """What the target of a migration has of an agent: the first `rows` of a branch."""

    branch_id: int
    rows: int


@dataclass(frozen=True)
class Tail:
    """The last rows of a turn under way, encoded: those of tokens `start` and after, of a branch
    whose rows all belong to `tokens`. `sliding`: of these, those that windows need."""

    branch_id: int
    tokens: list[int]
    start: int
    full: Tensors
    sliding: Tensors = field(default_factory=dict)

    def after(self, n: int) -> tuple[Tensors, Tensors | None]:
        """(rows `n` and after, of all layers but the sliding ones; of these)."""
        stop = len(self.tokens)
        full = slice_rows(self.full, n - self.start, stop - self.start)
        held = count_rows(self.sliding)
        return full, slice_rows(self.sliding, max(0, held - (stop - n)), held) or None


class Exporter:
    def __init__(self, engine: Engine, memory: Memory, residency: Residency, rates: Rates) -> None:
        self._engine, self._memory, self._residency = engine, memory, residency
        self._rates = rates
        self._windows = memory.rows.windows

    def stops(self, turn: Turn, n_rows: int) -> tuple[int, ...]:
        """Where the prefill of a turn that begins with n_rows pauses so that windows can be kept:
        at the end of the system prompt, and at the ends of the blocks in which that and the last
        checkpoint lie. Elsewhere the engine drops sliding rows as it goes on."""
        if not self._windows.size or turn.ready.memory.card is None:
            return ()
        opening = self._windows.opening(turn.ready.opening)
        wanted = {opening, *map(self._windows.block_end, (opening, n_rows))}
        return tuple(sorted(at for at in wanted if n_rows < at < len(turn.ready.tokens)))

    def filled(self, turn: Turn) -> None:
        """Hand over the blocks that a running turn has filled, what lies before a stop, and what
        whoever takes the turn over would compute for long."""
        sequence = turn.sequence
        if sequence is None or sequence.finish_reason or turn.ready.memory.card is None:
            return
        size = self._memory.key.spec.block_tokens
        stopped = sequence.n_rows in sequence.stops
        before = turn.ready.match.branch.exported
        looks = sequence.n_rows // _LOOK > turn.looked // _LOOK  # a step may be of several rows
        turn.looked = sequence.n_rows
        long = looks and not sequence.is_prefill and self._long(turn, before, sequence.n_rows)
        filled = sequence.n_rows if stopped or long else sequence.n_rows // size * size
        if filled > before and self.export(turn, filled, wait=True):
            if stopped or (filled == sequence.n_rows and not sequence.is_prefill):
                self.checkpoint(turn)
            if long or filled // size > before // size:
                self._memory.commits.later(turn.ready.memory)

    def _long(self, turn: Turn, start: int, stop: int) -> bool:
        if turn.ready.memory.moving > monotonic():
            return False
        return self._rates.again_s(start, stop, self._engine.tile) > _MOST_AT_RISK_S

    def export(self, turn: Turn, stop: int, *, wait: bool) -> bool:
        """Hand over the rows up to `stop`, at most a block at a time; False if the queue is full
        (with `wait`) and some are left."""
        branch, sequence = turn.ready.match.branch, turn.sequence
        assert sequence is not None
        size = self._memory.key.spec.block_tokens
        while branch.exported < stop:
            if wait and not self._memory.persister.has_room:
                return False
            start = branch.exported
            end = min(stop, (start // size + 1) * size)
            rows = self._rows(sequence.seq_id, start, end)
            self._memory.rows.append(turn.ready.memory, branch, start, end, rows)
        return True

    def _rows(self, seq_id: int, start: int, stop: int) -> KVRows | Tensors:
        if self._engine.exports_encoded == self._memory.codec.name:
            return self._engine.export_encoded(seq_id, start, stop)
        return self._engine.export(seq_id, start, stop)

    def tail(self, turn: Turn, held: Held, most: int) -> Tail | None:
        """The rows after those that are held; None where these are of another branch, and where
        they are none, more than `most`, not in cells, or in part such as came from codes: those
        are not encoded again."""
        branch, sequence = turn.ready.match.branch, turn.sequence
        assert sequence is not None
        seq_id, start, stop = sequence.seq_id, held.rows, sequence.n_rows
        if turn.preempted or branch.id != held.branch_id or self._engine.n_rows(seq_id) < stop:
            return None
        if not 0 < stop - start <= most or start < sequence.n_loaded:
            return None
        spec, codec = self._memory.key.spec, self._memory.codec
        rows, sliding = self._rows(seq_id, start, stop), {}
        if not isinstance(rows, dict):
            rows = encode_rows(spec, codec, rows, executor=self._memory.rows.codec_threads)
        if self._windows.size:
            window = self._engine.export_window(seq_id, start, stop)
            sliding = encode_rows(spec, codec, window, "sliding")
        return Tail(branch.id, branch.tokens[:stop], start, rows, sliding)

    def checkpoint(self, turn: Turn) -> None:
        """Keep the window before the turn's present end, so that the branch can go on from there.
        All its rows have been handed over."""
        branch, sequence = turn.ready.match.branch, turn.sequence
        assert sequence is not None
        at, windows = branch.exported, self._windows
        if turn.preempted or not windows.size or not at or at == branch.windowed:
            return
        if at > self._engine.n_rows(sequence.seq_id):
            return  # of a turn that ended before it came as far as the one it repeats
        start = windows.first_needed(branch, at)
        if start < max(self._engine.window_start(sequence.seq_id), 0):
            return  # a reply was cut, and with it the window's end: the checkpoint before counts
        rows = self._engine.export_window(sequence.seq_id, start, at)
        opening = windows.opening(turn.ready.opening)
        self._memory.rows.checkpoint(turn.ready.memory, branch, start, rows, opening)

    def drain(self, turn: Turn) -> bool:
        """Hand over what a finished turn has left and give its sequence up; False: not yet."""
        memory, sequence = turn.ready.memory, turn.sequence
        assert sequence is not None
        if memory.card is None or memory.state == "released":
            if not turn.preempted:
                self._residency.free(sequence.seq_id)
            return True
        if not self.export(turn, sequence.n_rows, wait=True):
            return False
        seq_id = sequence.seq_id
        whole = not turn.preempted and self._engine.n_rows(seq_id) == sequence.n_rows
        if whole:
            self.checkpoint(turn)
        if memory.state == "owned":  # a frozen agent's card is written, maybe claimed
            self._memory.commits.later(memory)
        if whole:
            self._residency.park(seq_id)
        elif not turn.preempted:  # it could not be cut to what the client saw
            self._residency.free(seq_id)
        return True
