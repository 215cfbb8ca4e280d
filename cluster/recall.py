"""What a router that has just started learns from the store: the agents nobody runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from actors.config import ReplicaConfig
from actors.models import open_store
from storage.errors import StorageError
from storage.spec import CompatibilityKey
from storage.store import LoadedCard

logger = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Recall:
    """Tells `found` of every card. `tried` is set when the store has been read, or has failed."""

    def __init__(self, config: ReplicaConfig, found: Callable[[LoadedCard], None]) -> None:
        self._config, self._found = config, found
        self.tried = asyncio.Event()

    async def run(self, key: CompatibilityKey) -> None:
        """Read the store's agents of this model, as soon as it answers."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                cards = await asyncio.to_thread(stored_agents, self._config, key)
                break
            except StorageError as error:
                logger.warning("the store's agents; next try in %g s: %s", pause_s, error)
            self.tried.set()  # nobody waits for a store that is gone
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
        for card in cards:
            self._found(card)
        self.tried.set()


def stored_agents(config: ReplicaConfig, key: CompatibilityKey) -> list[LoadedCard]:
    """The newest card of every agent of this model. Raises StoreUnavailable."""
    store = open_store(config)
    return list(store.cards(store.tenants(), key))
