"""Stored rows back into the engine, while the others decode.

A worker decodes block by block what others read and verify, one block ahead of the loop, which
loads one per round. An engine that takes the codec's tensors gets them as they are stored.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from actors.book import Book, Restore, Turn
from actors.engines.base import Engine
from actors.errors import EngineFault
from actors.memory import Memory
from actors.prepare import Prepared
from actors.rates import Rates
from actors.residency import Residency
from actors.turn import CacheState
from storage.codec import Tensors, decode_rows, merge_parts
from storage.spec import KVRows

logger = logging.getLogger(__name__)


class Restorer:
    """`wake` makes the loop look again; `alive` says whether it still does."""

    def __init__(
        self,
        engine: Engine,
        memory: Memory,
        residency: Residency,
        book: Book,
        rates: Rates,
        workers: ThreadPoolExecutor,
        wake: Callable[[], None],
        alive: Callable[[], bool],
        timeout_s: float,
    ) -> None:
        self._engine, self._memory, self._residency = engine, memory, residency
        self._book, self._rates = book, rates
        self._workers, self._wake, self._alive = workers, wake, alive
        self._timeout_s = timeout_s

    def begin(
        self, turn: Turn, seq_id: int, keep: int, cache: CacheState, away: CacheState
    ) -> None:
        """Start to fill the sequence up with the first `keep` rows of the turn's branch; some it
        may share with another already. `away`: where those are that have left RAM since."""
        begin = self._engine.n_rows(seq_id)
        restore = turn.restore = Restore(seq_id, cache, away, begin, begin)
        self._book.restoring.append(turn)
        self._workers.submit(self._read, turn.ready, restore, begin, keep)

    def poll(self) -> tuple[bool, list[Turn]]:
        """Load what has arrived. (whether there was anything to do, turns whose rows are all there
        or that need no more). One that is cancelled waits for no reader."""
        loaded, complete = False, []
        for turn in list(self._book.restoring):
            restore = turn.restore
            assert restore is not None
            if not turn.cancelled:
                try:
                    rows = restore.rows.get_nowait()
                except queue.Empty:
                    continue
                restore.room.release()
                loaded = True
                if rows is not None and self._load(restore, rows):
                    continue
            restore.abandoned = True
            self._book.restoring.remove(turn)
            self._complete(restore, whole=not turn.cancelled)
            complete.append(turn)
        return loaded or bool(complete), complete

    def _complete(self, restore: Restore, *, whole: bool) -> None:
        """No more rows come; unless it is `whole`, because nobody wants them."""
        seq_id, engine = restore.seq_id, self._engine
        if not engine.can_truncate(seq_id, engine.n_rows(seq_id)):  # its window is missing
            self._residency.truncate(seq_id, 0)
            restore.loaded = restore.begin = 0
        restored = restore.loaded - restore.begin
        if not restored:
            restore.cache = "hot" if restore.loaded else "cold"
        elif whole:
            took, from_ram = time.monotonic() - restore.began, restore.cache == "hot"
            self._rates.restore(restored, took, from_ram=from_ram)

    def _load(self, restore: Restore, rows: KVRows | Tensors) -> bool:
        try:
            if isinstance(rows, dict):
                self._engine.load_encoded(restore.seq_id, restore.loaded, rows)
            else:
                self._engine.load(restore.seq_id, restore.loaded, rows)
        except EngineFault as error:
            self._memory.faults.count("engine_refused", error)
            return False
        restore.loaded = self._engine.n_rows(restore.seq_id)
        return True

    # ---- on a worker

    def _read(self, ready: Prepared, restore: Restore, begin: int, keep: int) -> None:
        memory = self._memory
        try:
            memory.persister.flush().result(self._timeout_s)
            if restore.abandoned:  # while it waited for a worker
                return
            branch = ready.match.branch
            if not memory.rows.in_ram(branch, keep, begin):  # what was pinned may be gone
                restore.cache = restore.away
            for full, sliding in memory.rows.read(ready.memory, branch, keep, begin):
                if not self._has_room(restore):
                    return
                restore.rows.put(self.loadable(full, sliding))
                self._wake()
        except Exception:
            logger.exception("restoring %s failed; the rest is prefilled", ready.memory.agent)
        restore.rows.put(None)
        self._wake()

    def loadable(self, full: Tensors, sliding: Tensors | None) -> KVRows | Tensors:
        """A run's rows in the form that the engine takes."""
        spec, codec = self._memory.key.spec, self._memory.codec
        if self._engine.loads_encoded == codec.name:
            return full | (sliding or {})
        rows = decode_rows(spec, codec, full, executor=self._memory.rows.codec_threads)
        if sliding is not None:
            rows = merge_parts(spec, rows, decode_rows(spec, codec, sliding, "sliding"))
        return rows

    def _has_room(self, restore: Restore) -> bool:
        """Wait until the loop has taken the block before; False when nobody will take another."""
        while self._alive() and not restore.abandoned:
            if restore.room.acquire(timeout=0.1):
                return True
        return False
