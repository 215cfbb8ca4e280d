"""Encoded rows: out of the engine into pool and store, and back again.

Rows are encoded once, by one background thread (the Persister), which is also the only writer of a
branch's `blocks` and `tail`. Jobs run in the order they were submitted. Token ids are copied at
submission, rows are the branch's when the job runs: so they always belong together, whatever the
next turn does. Knows no engine, no card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from actors.branches import AgentMemory, Branch, Run, positions
from actors.faults import Faults
from actors.persister import Persister
from storage.cache_file import Chain
from storage.codec import Codec, Tensors, concat_rows, count_rows, encode_rows, slice_rows
from storage.errors import CorruptData, StoreUnavailable
from storage.spec import CompatibilityKey, KVRows
from storage.store import CacheStore
from storage.tiers import Tiers


class Rows:
    """The rows of all agents of a replica, for one key and codec."""

    def __init__(
        self,
        store: CacheStore,
        key: CompatibilityKey,
        codec: Codec,
        tiers: Tiers,
        persister: Persister,
        faults: Faults,
    ) -> None:
        self._store, self._key, self._codec, self._tiers = store, key, codec, tiers
        self._persister, self._faults = persister, faults

    # ---- from the loop's thread

    def append(self, memory: AgentMemory, branch: Branch, start: int, rows: KVRows) -> None:
        """Hand over rows start, start + 1, …; returns at once. branch.exported moves on."""
        branch.exported = start + rows[0].k.shape[1]
        ids = branch.tokens[: branch.exported]
        self._persister.submit(lambda: self._append(memory, branch, start, rows, ids))

    def cut(self, memory: AgentMemory, branch: Branch, keep: int) -> None:
        """Forget the rows after the first `keep`."""
        branch.exported = min(branch.exported, keep)
        ids = branch.tokens[:keep]
        self._persister.submit(lambda: self._take(memory, branch, branch, ids))

    def fork(self, memory: AgentMemory, source: Branch, branch: Branch, keep: int) -> None:
        """The branch, new, begins with the first `keep` rows of `source`."""
        branch.exported = min(source.exported, keep)
        ids = branch.tokens[:keep]
        self._persister.submit(lambda: self._take(memory, branch, source, ids))

    # ---- on the persister's thread

    def _append(
        self, memory: AgentMemory, branch: Branch, start: int, rows: KVRows, ids: list[int]
    ) -> None:
        have = branch.rows
        if start > have:  # an earlier run was lost: the next turn exports from there again
            branch.exported = have
            return
        tensors = encode_rows(self._key.spec, self._codec, rows)
        tensors = slice_rows(tensors, have - start, count_rows(tensors))
        while count := count_rows(tensors):
            filled = sum(run.rows for run in branch.tail)
            take = min(count, self._key.spec.block_tokens - filled)
            piece, tensors = slice_rows(tensors, 0, take), slice_rows(tensors, take, count)
            if filled + take < self._key.spec.block_tokens:
                self._add_segment(memory, branch, piece, ids)
            elif not self._seal(memory, branch, piece, ids):
                return

    def _seal(self, memory: AgentMemory, branch: Branch, piece: Tensors, ids: list[int]) -> bool:
        """Join the tail and the piece that fills it up to a block, code by code."""
        pieces = []
        for run in branch.tail:
            tensors = self._tensors(memory, run)
            if tensors is None:
                branch.tail = []
                branch.exported = branch.rows
                return False
            pieces.append(tensors)
        size = self._key.spec.block_tokens
        start = size * len(branch.blocks)
        parent = branch.blocks[-1].id if branch.blocks else ""
        run = Run(self._chain(memory).block_id(parent, ids[start : start + size]), size)
        self._keep(memory, run, concat_rows([*pieces, piece]))
        branch.blocks = [*branch.blocks, run]
        branch.tail = []
        return True

    def _add_segment(
        self, memory: AgentMemory, branch: Branch, tensors: Tensors, ids: list[int]
    ) -> None:
        start = self._key.spec.block_tokens * len(branch.blocks)
        filled, rows = sum(run.rows for run in branch.tail), count_rows(tensors)
        parent = branch.blocks[-1].id if branch.blocks else ""
        in_block = ids[start : start + filled + rows]
        run = Run(self._chain(memory).segment_id(parent, in_block, filled), rows)
        self._keep(memory, run, tensors)
        branch.tail = [*branch.tail, run]

    def _chain(self, memory: AgentMemory) -> Chain:
        salt = memory.card.cache_salt if memory.card else ""
        return Chain(self._key.digest, self._codec.name, memory.agent.tenant, salt)

    def _keep(self, memory: AgentMemory, run: Run, tensors: Tensors) -> None:
        """Rows into the pool and the store. If the store fails they stay in RAM while there is
        room, and every commit tries again."""
        self._tiers.put(run.id, tensors, pinned=True)
        try:
            run.ref = self._tiers.write(memory.agent.tenant, run.id, run.rows, tensors)
        except StoreUnavailable as error:
            self._faults.count("store_unavailable", error)
        finally:
            self._tiers.unpin(run.id)

    def _take(self, memory: AgentMemory, branch: Branch, source: Branch, ids: list[int]) -> None:
        """The branch gets the rows that `source` has of its first tokens, `ids`; codes are copied.
        Whole blocks and whole segments are shared, the one that is cut in the middle is sliced."""
        size, keep = self._key.spec.block_tokens, len(ids)
        runs, source_rows = list(positions(source)), source.rows
        branch.blocks = source.blocks[: keep // size]
        branch.tail = []
        for start, run in runs:
            if start < size * len(branch.blocks):
                continue
            if start >= keep:
                break
            if run.rows < size and start + run.rows <= keep:
                branch.tail = [*branch.tail, run]
                continue
            tensors = self._tensors(memory, run)
            if tensors is None:
                break
            self._add_segment(memory, branch, slice_rows(tensors, 0, keep - start), ids)
        if branch.rows < min(keep, source_rows):  # some could not be read: export them again
            branch.exported = min(branch.exported, branch.rows)

    def _tensors(self, memory: AgentMemory, run: Run) -> Tensors | None:
        """A run's rows, or None after counting why not."""
        try:
            tensors = self._tiers.read(memory.agent.tenant, run.id, run.rows, run.ref)
        except CorruptData as error:
            self._faults.count("corrupt", error)
            return None
        except StoreUnavailable as error:
            self._faults.count("store_unavailable", error)
            return None
        if tensors is None:
            path = run.id
            if run.ref is not None:
                path = self._store.block_path(memory.agent.tenant, run.ref, "full")
            self._faults.count("missing", CorruptData(path, "the block is missing"))
        return tensors

    def store_again(self, memory: AgentMemory, branch: Branch) -> None:
        """Try to store what the store refused before."""
        for run in branch.runs:
            tensors = self._tiers.resident(run.id) if run.ref is None else None
            if tensors is not None:
                self._keep(memory, run, tensors)

    # ---- from a worker

    def read(self, memory: AgentMemory, branch: Branch, keep: int) -> Iterator[Tensors]:
        """The encoded rows of the first `keep` tokens, run by run in order. Stops early at a run
        that is missing or cannot be trusted; the branch then forgets it and what follows."""
        for start, run in list(positions(branch)):
            if start >= keep:
                return
            tensors = self._tensors(memory, run)
            if tensors is None:
                self.cut(memory, branch, start)
                return
            if start + run.rows > keep:
                tensors = slice_rows(tensors, 0, keep - start)
            yield tensors

    # ---- reports

    def in_ram(self, branch: Branch, keep: int | None = None) -> bool:
        """Whether the encoded rows of the first `keep` tokens, or all, are in the pool."""
        needed = [run for at, run in positions(branch) if keep is None or at < keep]
        return all(self._tiers.size_of(run.id) for run in needed)

    def ram_bytes(self, branches: Sequence[Branch]) -> int:
        """Bytes of the branches' rows in the pool, shared ones counted once."""
        return sum(self._tiers.size_of(i) for i in {run.id for b in branches for run in b.runs})
