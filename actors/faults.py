"""Memory that was lost or refused: counted by kind for /metrics, logged with file and reason."""

from __future__ import annotations

import logging
from collections import Counter

from storage.errors import Incompatible, StorageError, StoreUnavailable, Unsupported

logger = logging.getLogger(__name__)


class Faults(Counter[str]):
    """kind -> how often."""

    def count(self, kind: str, error: Exception) -> None:
        self[kind] += 1
        logger.warning("memory not used (%s): %s", kind, error)

    def card(self, error: StorageError) -> None:
        """What CacheStore's on_fault is told: a card or block that could not be used."""
        if isinstance(error, StoreUnavailable):
            self.count("store_unavailable", error)
        else:
            foreign = isinstance(error, (Incompatible, Unsupported))
            self.count("incompatible" if foreign else "corrupt", error)
