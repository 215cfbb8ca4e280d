"""The target's side of a migration, before it owns the agent: what the shared store or the source's
disk has of it comes into RAM and into an idle sequence of the engine, while others run.

Between two blocks the sequence is idle as any other: it may be evicted, and then what is missing is
restored when the agent's turn comes. It gets no step before its agent is claimed; nobody finds it
by its branch until then. `fetch` and `extend` run on workers, everything else on the loop's
thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from actors.book import Book
from actors.branches import UNKNOWN, Before, Branch, positions
from actors.engines.base import Engine
from actors.engines.base import count_rows as count_loadable
from actors.errors import EngineFault
from actors.exporter import Held, Tail
from actors.futures import done
from actors.memory import Memory
from actors.prompt import common_prefix
from actors.residency import Residency
from storage.card import AgentId
from storage.codec import Tensors, count_rows
from storage.spec import KVRows, Part

T = TypeVar("T")
_LOOP_S = 30.0  # for the loop to take a block
_LATELY_S = 2.0  # between a claim and the turn that follows it
Loadable = Callable[[Tensors, Tensors | None], KVRows | Tensors]


@dataclass(frozen=True)
class Fetched:
    """What is in RAM of the agent's last branch, how many rows of it are in the engine, and the
    bytes that came to this node in this round, `peer_bytes` of them from the source's disk."""

    held: Held
    loaded: int
    n_bytes: int
    peer_bytes: int = 0


@dataclass(eq=False)
class _Preload:
    branch: Branch  # the sequence's, until the agent is claimed; its tokens are the rows' ids
    deadline: float
    fails: bool = False  # evicted, refused by the engine, or no room: rows stay in RAM only


class Preloader:
    """`loadable` brings rows into the form the engine takes; `call` runs a function on the loop's
    thread; what nobody claims is dropped `timeout_s` after its last block."""

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        residency: Residency,
        book: Book,
        loadable: Loadable,
        call: Callable[[Callable[[], Any]], Future[Any]],
        timeout_s: float,
    ) -> None:
        self._engine, self._memory, self._residency = engine, memory, residency
        self._book, self._loadable = book, loadable
        self._call, self._timeout_s = call, timeout_s
        self._preloads: dict[AgentId, _Preload] = {}
        self._lately: list[tuple[float, Branch]] = []  # claimed, and until when expected to run

    @property
    def n_preloads(self) -> int:
        return len(self._preloads)

    # ---- on a worker

    def fetch(self, agent: AgentId, was: Before = UNKNOWN) -> Fetched:
        """Bring what the store, or the peer's disk with its card, has of the agent's last branch,
        and has not been brought before. Raises StoreUnavailable, EngineFault."""
        memory = self._memory.stored(agent, was)
        if memory is None:
            return Fetched(Held(0, 0), 0, 0)
        branch, rows = memory.branches[0], self._memory.rows
        preload, begin = self._on_loop(partial(self._begin, agent, branch))
        n_bytes, at, loads = self._away_bytes(agent, branch, begin), begin, True
        peers, loading = self._memory.tiers.peers, done(True)
        before = peers.n_bytes
        for full, sliding in rows.read(memory, branch, branch.rows, begin):
            if loads:
                loadable = self._loadable(full, sliding)  # while the loop loads the one before
                loads = _answer(loading)
                loading = self._call(partial(self._load, agent, preload, at, loadable))
            at += count_rows(full)
        _answer(loading)
        for other in memory.branches[1:]:
            rows.runs.bring(memory, other)
        loaded = self._on_loop(partial(self._loaded, preload))
        held = Held(branch.id, at)
        return Fetched(held, loaded, n_bytes, min(n_bytes, peers.n_bytes - before))

    def extend(self, agent: AgentId, tail: Tail | None) -> None:
        """Append the rows that came with the freeze, while the claim is under way. Raises
        EngineFault when the loop does not answer."""
        found = self._on_loop(partial(self._begin_tail, agent, tail)) if tail is not None else None
        if found is not None and tail is not None:
            preload, n = found
            loadable = self._loadable(*tail.after(n))
            self._on_loop(partial(self._load, agent, preload, n, loadable))

    def _away_bytes(self, agent: AgentId, branch: Branch, begin: int) -> int:
        """Of the branch's stored rows from `begin` on that are not on this node."""
        pool, local = self._memory.tiers.pool, self._memory.tiers.local
        parts: tuple[Part, ...] = ("full", "sliding")
        total = 0
        runs = [run for at, run in positions(branch) if begin < at + run.rows]
        for ref in (run.ref("local") for run in runs):
            if ref is None:
                continue
            for part in (part for part in parts if part in ref.parts):
                here = local is not None and local.has(agent.tenant, ref, part)
                if not here and not pool.size_of((ref.id, part)):
                    total += ref.parts[part].size
        return total

    def _on_loop(self, function: Callable[[], T]) -> T:
        asked: Future[T] = self._call(function)
        return _answer(asked)

    # ---- on the loop's thread

    def _begin(self, agent: AgentId, branch: Branch) -> tuple[_Preload, int]:
        """(the agent's preload, rows that it has)."""
        preload, deadline = self._preloads.get(agent), time.monotonic() + self._timeout_s
        if preload is not None:
            n = self._loaded(preload)
            same = preload.branch.id == branch.id
            if same and branch.tokens[:n] == preload.branch.tokens[:n] and n <= branch.rows:
                preload.fails |= n < preload.branch.exported
                preload.branch.tokens, preload.deadline = list(branch.tokens), deadline
                return preload, n
            self.drop(agent)
        if branch.turn is not None and not self._book.active:  # soon it is the one that runs here
            self._residency.make_way(*map(self._residency.find, self._expected()))
        preload = _Preload(Branch(branch.id, list(branch.tokens)), deadline)
        self._preloads[agent] = preload
        return preload, 0

    def _expected(self) -> list[Branch]:
        """Branches whose turns are about to come."""
        return [*(p.branch for p in self._preloads.values()), *(b for _, b in self._lately)]

    def _begin_tail(self, agent: AgentId, tail: Tail) -> tuple[_Preload, int] | None:
        """(the agent's preload, rows that it has), if the tail goes on from there."""
        preload = self._preloads.get(agent)
        if preload is None or preload.branch.id != tail.branch_id:
            return None
        n, tokens = self._loaded(preload), preload.branch.tokens
        if not tail.start <= n < len(tail.tokens) or tokens[:n] != tail.tokens[:n]:
            return None
        preload.branch.tokens = list(tail.tokens)
        return preload, n

    def _loaded(self, preload: _Preload) -> int:
        seq_id = self._residency.find(preload.branch)
        return self._engine.n_rows(seq_id) if seq_id is not None else 0

    def _load(self, agent: AgentId, preload: _Preload, start: int, rows: KVRows | Tensors) -> bool:
        """Append a block; False: no more of them."""
        if self._preloads.get(agent) is not preload or preload.fails:
            return False
        n = count_rows(rows) if isinstance(rows, dict) else count_loadable(rows)
        seq_id = self._sequence_for(preload, start, n)
        if seq_id is None:
            preload.fails = True
            return False
        try:
            if isinstance(rows, dict):
                self._engine.load_encoded(seq_id, start, rows)
            else:
                self._engine.load(seq_id, start, rows)
        except EngineFault as error:
            self._memory.faults.count("engine_refused", error)
            self._residency.free(seq_id)
            preload.fails = True
            return False
        self._residency.park(seq_id)
        preload.branch.exported = self._engine.n_rows(seq_id)
        preload.deadline = time.monotonic() + self._timeout_s
        return True

    def _sequence_for(self, preload: _Preload, start: int, n: int) -> int | None:
        """The preload's sequence, of `start` rows, with room for n more; None: it is not there."""
        seq_id = self._residency.find(preload.branch)
        if self._loaded(preload) != start:
            return None
        if seq_id is None:
            return self._residency.acquire(preload.branch, n)
        return seq_id if self._residency.resume(seq_id, start + n) else None

    def claimed(self, agent: AgentId, tail: Tail | None = None) -> int:
        """The agent is owned here: the rows of the tail become its branch's, if they go on from it,
        and the preloaded ones, if that begins with them. Returns how many these are."""
        preload = self._preloads.pop(agent, None)
        if tail is not None:
            self._own(agent, tail)
        seq_id = self._residency.find(preload.branch) if preload is not None else None
        if preload is None or seq_id is None:
            return 0
        n, branch = self._engine.n_rows(seq_id), self._branch(agent, preload.branch.id)
        if (
            branch is None
            or agent in self._book.active  # it brings its rows itself
            or self._residency.find(branch) is not None
            or n > branch.exported
            or branch.tokens[:n] != preload.branch.tokens[:n]
            or not self._engine.can_truncate(seq_id, n)
        ):
            self._residency.free(seq_id)
            return 0
        self._residency.give(seq_id, branch)
        self._lately.append((time.monotonic() + _LATELY_S, branch))
        return n

    def _own(self, agent: AgentId, tail: Tail) -> None:
        """Store what the claimed card does not name, as if it had been computed here."""
        memory, branch = self._memory.get(agent), self._branch(agent, tail.branch_id)
        if memory is None or branch is None or agent in self._book.active:
            return
        n, stop = branch.exported, len(tail.tokens)
        same = common_prefix(branch.tokens, tail.tokens) == min(len(branch.tokens), stop)
        if not tail.start <= n < stop or not same:
            return
        if len(branch.tokens) < stop:
            branch.tokens = list(tail.tokens)
        # Arrays of a message lie in memory that is not ours to keep.
        rows = {name: field.copy() for name, field in tail.after(n)[0].items()}
        self._memory.rows.append(memory, branch, n, stop, rows)
        self._memory.commits.later(memory)

    def _branch(self, agent: AgentId, branch_id: int) -> Branch | None:
        memory = self._memory.get(agent)
        branches = memory.branches if memory is not None else ()
        return next((b for b in branches if b.id == branch_id), None)

    def drop(self, agent: AgentId) -> None:
        """The claim failed, or is none: free the cells."""
        preload = self._preloads.pop(agent, None)
        if preload is not None:
            self._residency.drop(preload.branch)

    def drop_overdue(self) -> None:
        """Preloads that nobody has claimed, and word of claims that no turn followed."""
        now = time.monotonic()
        self._lately = [(until, branch) for until, branch in self._lately if until > now]
        for agent in [a for a, preload in self._preloads.items() if now > preload.deadline]:
            self.drop(agent)


def _answer(asked: Future[T]) -> T:
    """Of the loop. Raises EngineFault when there is none."""
    try:
        return asked.result(_LOOP_S)
    except TimeoutError as error:
        raise EngineFault("the replica's loop does not answer") from error
