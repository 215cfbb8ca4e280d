"""One background thread that runs jobs in order, behind a bounded queue.

The engine's thread asks `has_room` before it hands over rows, and keeps them in the engine while
there is none: the end of a turn waits, its response does not.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

logger = logging.getLogger(__name__)
Job = Callable[[], None]


class Persister:
    """Jobs handle what they expect; what still escapes is logged, and the thread goes on."""

    def __init__(self, max_jobs: int = 64) -> None:
        self._max_jobs = max_jobs
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="persister", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        return self._jobs.qsize()

    @property
    def has_room(self) -> bool:
        """Whether rows may be handed over; small bookkeeping jobs need not ask."""
        return self._jobs.qsize() < self._max_jobs

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def flush(self) -> Future[None]:
        """A future that is done when every job submitted so far has run."""
        done: Future[None] = Future()
        self._jobs.put(lambda: done.set_result(None))
        return done

    def close(self, timeout: float) -> bool:
        """Run what is queued, then stop; False if it took longer than `timeout` seconds."""
        self._jobs.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("a persistence job failed")
