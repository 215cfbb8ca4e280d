"""Rows that another agent of the tenant has stored: a new branch begins with its blocks.

An equal block id says equal tokens, tenant, cache salt, key and codec, so the rows are the ones
that a prefill would give, and the agent's card may name the files. Looks in RAM first, then on the
node's disk, then in the shared store. Runs on workers; may reach the store.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.branches import Run
from actors.faults import Faults
from actors.outage import Outage
from actors.rows import Rows
from actors.turn import CacheState
from storage.errors import StorageError
from storage.tiers import Tiers

_FAR: dict[CacheState, int] = {"hot": 0, "warm": 1, "remote": 2}


class Adoption:
    def __init__(self, rows: Rows, tiers: Tiers, faults: Faults, outage: Outage) -> None:
        self._rows, self._tiers, self._faults = rows, tiers, faults
        self._outage = outage

    def find(self, tenant: str, block_ids: Sequence[str]) -> tuple[list[Run], CacheState]:
        """(the first of these blocks that are stored, without a gap; the farthest place)."""
        runs: list[Run] = []
        state: CacheState = "hot"
        for block_id in block_ids:
            found = self._known(block_id) or self._found(tenant, block_id)
            if found is None:
                break
            run, place = found
            runs.append(run)
            state = max(state, place, key=lambda s: _FAR[s])
        return runs, state

    def _known(self, block_id: str) -> tuple[Run, CacheState] | None:
        """A block of an agent here."""
        run = self._rows.known.get(block_id)
        if run is None or not ("full" in run.local or "full" in run.shared):
            return None
        near: CacheState = "hot" if self._in_pool(block_id) else "warm"
        if near != "hot" and self._tiers.local and "full" not in run.local:
            near = "remote"
        return run.lent(), near

    def _found(self, tenant: str, block_id: str) -> tuple[Run, CacheState] | None:
        """A block of another replica's agent, or of one that left its rows in the pool: where they
        are stored is asked for then, too, for they may leave the pool before they are written."""
        found = self._stored(tenant, block_id)
        if self._in_pool(block_id):
            return found[0] if found else self._run(block_id), "hot"
        return found

    def _in_pool(self, block_id: str) -> bool:
        return bool(self._tiers.pool.size_of((block_id, "full")))

    def _stored(self, tenant: str, block_id: str) -> tuple[Run, CacheState] | None:
        run, local = self._run(block_id), self._tiers.local
        ref = None
        try:
            ref = local.store.find_block(tenant, block_id, "full") if local else None
            if ref is not None:
                run.note("local", "full", ref)
                return run, "warm"
            if not self._outage.lasts:
                ref = self._tiers.shared.find_block(tenant, block_id, "full")
        except StorageError as error:
            self._faults.count("store_unavailable", error)
            self._outage.began()
        if ref is None:
            return None
        run.note("shared", "full", ref)
        return run, "remote"

    def _run(self, block_id: str) -> Run:
        return Run(block_id, self._rows.block_tokens)
