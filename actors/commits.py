"""Cards of the agents of a replica: written once the rows that they name are stored.

Without a local tier a commit goes to the shared store; with one it goes there, and the shared store
follows (see replicator). Commits run on the persister's thread, in order with the rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from actors.branches import AgentMemory, Branch, card_of, note_committed, state_of
from actors.faults import Faults
from actors.persister import Persister
from actors.replicator import Replicator, Snapshot
from actors.rows import Rows
from storage.card import BranchCard
from storage.errors import Fenced, StoreUnavailable
from storage.store import CacheStore
from storage.tiers import Tiers


class Commits:
    def __init__(
        self,
        store: CacheStore,
        rows: Rows,
        tiers: Tiers,
        persister: Persister,
        faults: Faults,
        lost: Callable[[AgentMemory], None],
    ) -> None:
        """`lost` is told of an agent that another replica has claimed."""
        self._store, self._rows, self._window = store, rows, rows.windows.size
        self._persister, self._faults, self._lost = persister, faults, lost
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
                memory.shared = self._store.commit(complete)
                memory.card = memory.shared.card
                note_committed(states, memory.card)
                memory.changed = time.time()  # it is reported again
            else:
                memory.card = self.replicator.commit(snapshot)
            memory.unsaved = False
        except Fenced as error:
            if memory.state != "frozen":  # else its release, or its own claim, follows
                self._faults.count("fenced", error)
                self._lost(memory)
        except StoreUnavailable as error:
            self._faults.count("store_unavailable", error)
            memory.unsaved = True
            memory.card = replace(memory.card, generation=new.generation)  # it may be taken now

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
        return not memory.unsaved

    def busy(self, memory: AgentMemory) -> bool:
        """Whether something of an agent is on its way."""
        lags = self.replicator is not None and self.replicator.lags(memory.agent)
        return memory.commits_queued > 0 or lags

    def forget(self, memory: AgentMemory) -> None:
        """What is queued for the agent is not committed."""
        if self.replicator is not None:
            self.replicator.forget(memory)

    def close(self, timeout: float) -> None:
        """Store what is queued, at most `timeout` seconds long each."""
        self._persister.close(timeout)
        if self.replicator is not None:
            self.replicator.close(timeout)
