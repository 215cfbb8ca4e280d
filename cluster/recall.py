"""What a router that has just started learns from the store: the agents nobody runs."""

from __future__ import annotations

import logging

from actors.config import ReplicaConfig
from actors.models import open_store
from storage.errors import StorageError
from storage.spec import CompatibilityKey
from storage.store import LoadedCard

logger = logging.getLogger(__name__)


def stored_agents(config: ReplicaConfig, key: CompatibilityKey) -> list[LoadedCard]:
    """The newest card of every agent of this model; none, and a warning, if it cannot be read."""
    try:
        store = open_store(config)
        return list(store.cards(store.tenants(), key))
    except StorageError as error:
        logger.warning("cannot read the store's agents: %s", error)
        return []
