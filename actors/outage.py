"""A shared store that does not answer, known as such: nobody waits for its deadline a second time.

The call that fails says so; from then on one thread asks again and again, until there is an answer.
Called by actors.memory and actors.adoption.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from storage.errors import StorageError

logger = logging.getLogger(__name__)
_PAUSE_S = 1.0


class Outage:
    """`ask()` reaches the store, or raises StorageError; `on_end` is called when it has answered
    again. Thread-safe."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask = ask
        self.on_end: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._lasts = False

    @property
    def lasts(self) -> bool:
        return self._lasts

    def began(self) -> None:
        """A call got no answer before its deadline."""
        with self._lock:
            if self._lasts:
                return
            self._lasts = True
        threading.Thread(target=self._run, name="outage", daemon=True).start()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            while not self._answers():
                time.sleep(_PAUSE_S)
            logger.info("the store answers, after %.1f s", time.monotonic() - began)
        finally:
            self._lasts = False
            self.on_end()

    def _answers(self) -> bool:
        try:
            self._ask()
        except StorageError:
            return False
        return True
