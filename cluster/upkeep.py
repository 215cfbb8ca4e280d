"""What `kvferry up` does for its store now and then: quota, time to live, garbage.

Elsewhere a cron job runs `kvferry gc`. A thread of its own; the store's lease lets one collector in
at a time, wherever it runs.
"""

from __future__ import annotations

import logging
import threading

from storage.collector import CollectOptions, collect
from storage.errors import Busy, StorageError
from storage.retention import RetentionPolicy, apply_retention
from storage.store import CacheStore

logger = logging.getLogger(__name__)
_FIRST_S = 60.0  # after the start: serving comes first


class Upkeep:
    """Use as a context manager; interval_s 0: never."""

    def __init__(self, store: CacheStore, policy: RetentionPolicy, interval_s: float) -> None:
        self._store, self._policy, self._interval_s = store, policy, interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def __enter__(self) -> Upkeep:
        if self._interval_s:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """A run that is under way may be cut off anywhere: the next one goes on from there."""
        self._stop.set()

    def _run(self) -> None:
        pause = min(_FIRST_S, self._interval_s)
        while not self._stop.wait(pause):
            self.once()
            pause = self._interval_s

    def once(self) -> None:
        """One round; faults are logged, the next round tries again."""
        try:
            kept = apply_retention(self._store, self._policy)
            report = collect(self._store, CollectOptions())
        except Busy as error:
            logger.info("upkeep: %s", error)
        except StorageError as error:
            logger.warning("upkeep of %s: %s", self._store.url, error)
        else:
            for name, reason in (kept.skipped | report.skipped).items():
                logger.warning("upkeep skipped %s: %s", name, reason)
