"""Agents of one tenant and cache salt whose prompts begin alike: which sequence in the engine holds
that beginning, or will soon.

Prompts are found by the ids of their blocks (storage.cache_file.Chain), which tenants and salts
never share; what follows the last common block is compared token by token. Used by the loop's
thread only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from actors.book import Book, Turn
from actors.branches import AgentMemory, Branch
from actors.engines.base import Engine
from actors.matching import MIN_SHARED
from actors.residency import Residency

_STRIDE = 256  # tokens compared at once


@dataclass(frozen=True)
class Source:
    """A sequence that has the first `n` tokens of a prompt; those still missing when not `ready`
    are on their way into it."""

    seq_id: int
    memory: AgentMemory
    branch: Branch
    n: int
    ready: bool


@dataclass(frozen=True)
class _Entry:
    turn: Turn  # the last one that was placed there
    computed: bool  # here, from the first token on

    @property
    def branch(self) -> Branch:
        return self.turn.ready.match.branch


class Sharing:
    def __init__(self, engine: Engine, residency: Residency, book: Book) -> None:
        self._engine, self._residency, self._book = engine, residency, book
        self._block = engine.key.spec.block_tokens
        self._entries: dict[int, _Entry] = {}  # seq_id -> who was placed there last
        self._by_id: dict[str, set[int]] = {}  # prefix id -> seq_ids

    def note(self, seq_id: int, turn: Turn) -> None:
        """The turn was placed in a sequence, with the rows it has there."""
        turn.awaits = None
        before = self._entries.pop(seq_id, None)
        for name in before.turn.ready.prefixes if before else ():
            self._by_id[name].discard(seq_id)
            if not self._by_id[name]:
                del self._by_id[name]
        computed = not self._engine.n_rows(seq_id) and not turn.ready.match.branch.exported
        self._entries[seq_id] = _Entry(turn, computed)
        for name in turn.ready.prefixes:
            self._by_id.setdefault(name, set()).add(seq_id)

    def find(self, turn: Turn, least: int, stored: int) -> Source | None:
        """Where the most of a turn's prompt is, or will be: more than `least` tokens by at least
        MIN_SHARED. `stored` of its rows could be restored instead of waiting for a prefill."""
        now: Source | None = None
        later: Source | None = None
        for seq_id, entry, common in self._alike(turn):
            n_rows, branch = self._engine.n_rows(seq_id), entry.branch
            expected = min(common, self._expected(seq_id, entry))
            n = min(common, n_rows)
            memory = entry.turn.ready.memory
            if n > (now.n if now else 0) and self._engine.can_truncate(seq_id, n):
                now = Source(seq_id, memory, branch, n, True)
            restoring = entry.turn in self._book.restoring
            enough = least if restoring else max(least, stored)
            farther = expected > max(n, enough + MIN_SHARED - 1, later.n if later else 0)
            if farther and self._may_await(turn, entry, restoring=restoring):
                later = Source(seq_id, memory, branch, expected, False)
        if later is not None and later.n >= (now.n if now else 0) + MIN_SHARED:
            turn.awaits = self._entries[later.seq_id].turn
            return later
        if now is None or now.n < least + MIN_SHARED:
            return None
        same = now.branch.tokens[: now.n] == turn.ready.tokens[: now.n]  # not the ids' word alone
        return now if same else None

    def _alike(self, turn: Turn) -> Iterator[tuple[int, _Entry, int]]:
        """(sequence, entry, tokens in common, all but the last of the prompt), best first."""
        ready, seen = turn.ready, set[int]()
        limit = len(ready.tokens) - 1
        for level in range(len(ready.prefixes) - 1, -1, -1):
            known = level * self._block or MIN_SHARED
            for seq_id in self._by_id.get(ready.prefixes[level], set()) - seen:
                seen.add(seq_id)
                entry = self._entries[seq_id]
                if entry.turn is turn or not self._lends(seq_id, entry, ready.memory):
                    continue
                common = _common(entry.branch.tokens, ready.tokens, known)
                yield seq_id, entry, min(limit, common)

    def _lends(self, seq_id: int, entry: _Entry, to: AgentMemory) -> bool:
        """Whether the sequence still has what was noted, and its rows may go on in `to`: those of
        a one-off agent that were decoded from storage would be encoded a second time."""
        if self._residency.branch(seq_id) is not entry.branch:
            return False
        return entry.turn.ready.memory.card is not None or to.card is None or entry.computed

    def _expected(self, seq_id: int, entry: _Entry) -> int:
        """Rows the sequence has when its prefill or restore is through."""
        sequence = entry.turn.sequence
        if entry.turn in self._book.restoring:
            moves = not self._engine.window  # else it will not have the windows in between
        else:
            moves = sequence is not None and not (sequence.paused or sequence.finish_reason)
            moves = moves and not self._residency.is_idle(seq_id)
        return len(entry.branch.tokens) if moves else self._engine.n_rows(seq_id)

    def _may_await(self, turn: Turn, entry: _Entry, *, restoring: bool) -> bool:
        """Where a window may have slid on before it can be shared, wait for one sequence only."""
        return restoring or not self._engine.window or turn.awaits in (None, entry.turn)


def _common(a: Sequence[int], b: Sequence[int], start: int) -> int:
    """Length of the common prefix of two lists that are equal up to `start`."""
    n, at = min(len(a), len(b)), start
    while at < n and a[at : at + _STRIDE] == b[at : at + _STRIDE]:
        at += _STRIDE
    while at < n and a[at] == b[at]:
        at += 1
    return min(at, n)
