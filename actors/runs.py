"""The encoded rows of one run, a block or a segment: into pool and disk or store, and back.

Called on the persister's thread to write, on any to read. Knows nothing of branches' order.
"""

from __future__ import annotations

from actors.branches import AgentMemory, Branch, Run
from actors.faults import Faults
from storage.codec import Tensors
from storage.errors import CorruptData, StorageError, StoreUnavailable
from storage.spec import Part
from storage.tiers import Tiers


class Runs:
    def __init__(self, tiers: Tiers, faults: Faults) -> None:
        self._tiers, self._faults = tiers, faults

    def keep(self, memory: AgentMemory, run: Run, part: Part, tensors: Tensors) -> None:
        """Rows into the pool and onto a disk. If that fails they stay in RAM while there is room,
        and every commit tries again."""
        pool = self._tiers.pool
        pool.put((run.id, part), tensors, pinned=True)
        if memory.state == "released":  # another replica's: not ours to store
            pool.unpin((run.id, part))
            return
        try:
            ref = self._tiers.write(memory.agent, run.id, part, tensors)
            if ref is not None:
                run.note("local" if self._tiers.local else "shared", part, ref)
        except StoreUnavailable as error:
            self._faults.count("store_unavailable", error)
        finally:
            pool.unpin((run.id, part))

    def tensors(self, memory: AgentMemory, run: Run, part: Part) -> Tensors | None:
        """One part of a run's rows, or None after counting why not."""
        tenant, local, shared = memory.agent.tenant, run.stored("local"), run.stored("shared")
        try:
            found = self._tiers.read(tenant, run.id, run.rows, part, local, shared, memory.peer)
        except CorruptData as error:
            self._faults.count("corrupt", error)
            return None
        except StorageError as error:
            self._faults.count("store_unavailable", error)
            return None
        if found is None:
            ref = next((ref for ref in (shared, local) if part in ref.parts), None)
            path = self._tiers.shared.block_path(tenant, ref, part) if ref else run.id
            self._faults.count("missing", CorruptData(path, "the block is missing"))
        return found

    def bring(self, memory: AgentMemory, branch: Branch) -> None:
        """Read what the shared store lacks of a branch from the peer, to be had here."""
        for run in branch.runs:
            parts: tuple[Part, ...] = ("full", "sliding")
            for part in (p for p in parts if p in run.local and p not in run.shared):
                self.tensors(memory, run, part)
