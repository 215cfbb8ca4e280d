"""Write-behind: from the node's local tier to the shared store.

A commit puts the agent's card into the local tier and queues the agent; one thread uploads what the
shared store lacks, then commits there. Several commits of one agent that wait together become one.
A store that fails is tried again, ever less often; serving goes on. When the shared store has
caught up, the local card goes, and the local blocks are a cache.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from actors.branches import AgentMemory, BranchState, Place, Run, note_committed, with_runs
from actors.faults import Faults
from storage.card import AgentId, CacheCard
from storage.errors import Fenced, StorageError
from storage.spec import Part
from storage.tiers import Tiers

logger = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True)
class Snapshot:
    """What the next card of an agent says; its runs are stored by and by."""

    memory: AgentMemory
    card: CacheCard  # without branches
    states: tuple[BranchState, ...]

    def complete(self, place: Place, window: int) -> CacheCard:
        """The card as far as one place holds its runs."""
        return replace(self.card, branches=tuple(with_runs(s, place, window) for s in self.states))


class Replicator:
    def __init__(self, tiers: Tiers, faults: Faults, lost: Callable[[AgentMemory], None]) -> None:
        """`lost` is told of an agent that another replica has claimed."""
        assert tiers.local is not None
        self._local, self._shared, self._tiers = tiers.local, tiers.shared, tiers
        self._window = tiers.local.key.spec.window
        self._faults, self._lost = faults, lost
        self._pending: OrderedDict[AgentId, Snapshot] = OrderedDict()
        self._waiting: list[tuple[Future[None], AgentId | None]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="replicator", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Agents of which the shared store lacks something."""
        return len(self._pending)

    def lags(self, agent: AgentId) -> bool:
        return agent in self._pending

    def commit(self, snapshot: Snapshot) -> CacheCard:
        """Write the card into the local tier and queue the rest. Raises StoreUnavailable: then
        only the shared store will have it."""
        card = snapshot.complete("local", self._window)
        try:
            self._local.write_card(card)
        finally:
            with self._changed:
                self._pending[snapshot.memory.agent] = snapshot
                self._changed.notify()
        return card

    def forget(self, memory: AgentMemory) -> None:
        """The agent is not this replica's any more: nothing of it is committed."""
        with self._changed:
            self._drop(memory)
        try:
            if memory.card is not None:
                self._local.forget(memory.agent, memory.card.epoch)
        except StorageError as error:
            self._faults.count("store_unavailable", error)

    def _drop(self, memory: AgentMemory) -> None:
        waiting = self._pending.get(memory.agent)
        if waiting is not None and waiting.memory is memory:
            del self._pending[memory.agent]

    def flush(self, done: Future[None], agent: AgentId | None = None) -> None:
        """`done` when everything queued so far, or of one agent, has been tried."""
        with self._changed:
            self._waiting.append((done, agent))
            self._changed.notify()

    def close(self, timeout: float) -> bool:
        """Try what is queued once more, then stop; False if it took longer than `timeout` s."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- the thread

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                if pause:
                    self._changed.wait_for(self._is_urgent, pause)
                self._changed.wait_for(lambda: self._is_urgent() or self._pending)
                waiting, self._waiting = self._waiting, []
                batch = list(self._pending.values())
                agents = {agent for _, agent in waiting}
                if waiting and None not in agents:  # those that are waited for come first
                    batch = [s for s in batch if s.memory.agent in agents]
            failed = sum(not self._tried(snapshot) for snapshot in batch)
            longer = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * pause))
            pause = longer * random.uniform(0.5, 1.0) if failed else 0.0
            for done, _ in waiting:
                if done.set_running_or_notify_cancel():  # else nobody waits any more
                    done.set_result(None)
            if self._stopping and not self._waiting:
                return

    def _is_urgent(self) -> bool:
        return self._stopping or bool(self._waiting)

    def _tried(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot needs no second try."""
        try:
            self._replicate(snapshot)
        except Fenced as error:
            return self._fenced(snapshot, error)
        except StorageError as error:
            self._faults.count("store_unavailable", error)
            return False
        except Exception:
            logger.exception("replicating %s failed", snapshot.memory.agent)
            return False
        return True

    def _fenced(self, snapshot: Snapshot, error: Fenced) -> bool:
        """A newer claim: another's, then the agent is lost, or our own after a migration that
        failed, whose commits follow. While the agent is frozen, that is not known yet."""
        memory = snapshot.memory
        if memory.state == "frozen":
            return False
        if memory.card is not None and memory.card.epoch > snapshot.card.epoch:
            with self._changed:
                if self._pending.get(memory.agent) is snapshot:
                    del self._pending[memory.agent]
            return True
        self._faults.count("fenced", error)
        self._lost(memory)
        return True

    def _replicate(self, snapshot: Snapshot) -> None:
        memory = snapshot.memory
        if memory.state == "released":
            self.forget(memory)
            return
        missing = [
            (run, part)
            for state in snapshot.states
            for run in state.runs
            for part in self._parts(run)
            if part not in run.shared
        ]
        for _ in self._shared.files.map(lambda x: self._upload(memory, *x), missing):
            pass
        committed = self._shared.commit(snapshot.complete("shared", self._window))
        note_committed(snapshot.states, committed.card)
        memory.changed = time.time()  # it is reported again
        if memory.shared is None or memory.shared.ref.epoch <= committed.ref.epoch:
            memory.shared = committed  # else it was claimed again meanwhile
        with self._changed:
            if self._pending.get(memory.agent) is snapshot:
                del self._pending[memory.agent]
                self._local.drop_card(snapshot.card)

    @staticmethod
    def _parts(run: Run) -> tuple[Part, ...]:
        return ("full", "sliding") if run.has_window else ("full",)

    def _upload(self, memory: AgentMemory, run: Run, part: Part) -> None:
        ref = self._tiers.upload(memory.agent.tenant, run.id, part, run.stored("local"))
        if ref is not None:
            run.note("shared", part, ref)
        else:  # gone before it was stored: see Rows.store_again
            run.local = {k: v for k, v in run.local.items() if k != part}
