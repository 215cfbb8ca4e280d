"""Cards of the agents of a replica: written once the rows that they name are stored.

Without a local tier a commit goes to the shared store; with one it goes there, and the shared store
follows (see replicator). Commits run on the persister's thread, in order with the rows. What a
commit could not store is tried again, without a turn of the agent's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterable
from concurrent.futures import Future
from dataclasses import replace

from actors.branches import AgentMemory, Branch, BranchState, Run, card_of, note_committed, state_of
from actors.faults import Faults
from actors.outage import Outage
from actors.persister import Persister
from actors.replicator import Replicator, Snapshot
from actors.rows import Rows
from actors.unsaved import Unsaved
from storage.card import AgentId, BranchCard
from storage.errors import Fenced, StoreUnavailable
from storage.spec import Part
from storage.tiers import Tiers

_MOST_AHEAD = 4  # jobs of the persister's: so few let a turn's rows pass soon


class Commits:
    def __init__(
        self,
        rows: Rows,
        tiers: Tiers,
        persister: Persister,
        faults: Faults,
        outage: Outage,
        lost: Callable[[AgentMemory], None],
    ) -> None:
        """`lost` is told of an agent that another replica has claimed."""
        self._tiers, self._rows, self._window = tiers, rows, rows.windows.size
        self._persister, self._faults, self._lost = persister, faults, lost
        self._outage, self._unsaved = outage, Unsaved()
        outage.on_end = self._unsaved.soon
        self._lock = threading.Lock()  # of the agents' commits_queued
        self.replicator = Replicator(tiers, faults, lost) if tiers.local is not None else None

    def later(self, memory: AgentMemory) -> None:
        """Write a card once everything handed over so far is stored; one commit serves several
        calls that wait together."""
        if memory.card is None:
            return
        with self._lock:
            memory.commits_queued += 1
        branches = [(branch, card_of(branch)) for branch in memory.branches]
        self._persister.submit(lambda: self._commit(memory, branches))

    def again(self, busy: Container[AgentId], *, at_once: bool = False) -> None:
        """Commit what could not be stored before: a few now and then, or all at once, but for
        agents that are busy: their turn's end does. On the thread that changes their branches."""
        if at_once:
            unsaved = self._unsaved.all()
        elif self._outage.lasts:
            return
        else:
            unsaved = self._unsaved.due(_MOST_AHEAD - self._persister.pending)
        for memory in unsaved:
            if memory.commits_queued or memory.agent in busy:
                continue
            if memory.state == "owned":
                self.later(memory)

    def _commit(self, memory: AgentMemory, branches: list[tuple[Branch, BranchCard]]) -> None:
        """Write the next card; counts faults, raises nothing of storage."""
        with self._lock:
            memory.commits_queued -= 1
        if memory.card is None or memory.state == "released" or memory.commits_queued:
            return
        states = []
        for branch, card in branches:
            self._rows.store_again(memory, branch)
            states.append(state_of(branch, card))
        memory.changed = time.time()
        new = replace(
            memory.card, generation=memory.card.generation + 1, updated=memory.changed, branches=()
        )
        snapshot = Snapshot(memory, new, tuple(states))
        try:
            if self.replicator is None:
                complete = snapshot.complete("shared", self._window)
                memory.shared = self._tiers.shared.commit(complete)
                memory.card = memory.shared.card
                note_committed(states, memory.card)
                memory.changed = time.time()  # it is reported again
                self._note(memory, states)
            else:
                memory.card = self.replicator.commit(snapshot)
        except Fenced as error:
            if memory.state != "frozen":  # else its release, or its own claim, follows
                self._faults.count("fenced", error)
                self._lost(memory)
        except StoreUnavailable as error:
            self._faults.count("store_unavailable", error)
            if self.replicator is None:
                self._add(memory)
            memory.card = replace(memory.card, generation=new.generation)  # it may be taken now

    def _note(self, memory: AgentMemory, states: list[BranchState]) -> None:
        """The card is written; whether it could name all there is."""
        if any(_lacking(state.runs) for state in states):
            self._add(memory)
        else:
            self._unsaved.discard(memory)

    def _add(self, memory: AgentMemory) -> None:
        self._unsaved.add(memory)
        if memory.state == "released":  # while its commit was under way: forget() came before this
            self._unsaved.discard(memory)

    def settle(self, memory: AgentMemory | None = None, *, near: bool = False) -> Future[None]:
        """Done when everything handed over so far, or of one agent, is in the shared store, or
        could not be brought there; see is_stored. `near`: on this node's disk, if it has one."""
        done: Future[None] = Future()

        def handed_over() -> None:
            if memory is not None and memory.commits_queued:
                self._persister.submit(handed_over)  # a commit that serves ours is still to come
            elif self.replicator is not None and not near:
                self.replicator.flush(done, memory.agent if memory is not None else None)
            elif done.set_running_or_notify_cancel():
                done.set_result(None)

        self._persister.submit(handed_over)
        return done

    def is_stored(self, memory: AgentMemory) -> bool:
        """Whether the shared store has all of an agent that was handed over."""
        if self.replicator is not None:
            return not self.replicator.lags(memory.agent)
        return memory not in self._unsaved

    def lag(self) -> tuple[int, int]:
        """(agents of which the shared store lacks something, bytes of it in RAM), where there is
        no local tier to say so."""
        branches = [branch for memory in self._unsaved.all() for branch in list(memory.branches)]
        missing = {item for branch in branches for item in _lacking(branch.runs)}
        return len(self._unsaved), sum(map(self._tiers.pool.size_of, missing))

    def busy(self, memory: AgentMemory) -> bool:
        """Whether something of an agent is on its way."""
        return memory.commits_queued > 0 or not self.is_stored(memory)

    def forget(self, memory: AgentMemory) -> None:
        """What is queued for the agent is not committed."""
        self._unsaved.discard(memory)
        if self.replicator is not None:
            self.replicator.forget(memory)

    def close(self, timeout: float) -> None:
        """Store what is queued, at most `timeout` seconds long each. No turn runs any more."""
        self.again((), at_once=True)
        self._persister.close(timeout)
        if self.replicator is not None:
            self.replicator.close(timeout)


def _lacking(runs: Iterable[Run]) -> list[tuple[str, Part]]:
    """(run, part) that the shared store lacks of a branch."""
    wanted: dict[bool, tuple[Part, ...]] = {False: ("full",), True: ("full", "sliding")}
    return [(r.id, p) for r in runs for p in wanted[r.has_window] if p not in r.shared]
