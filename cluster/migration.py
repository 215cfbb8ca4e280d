"""Moving an agent: stop at a token boundary, commit, the target claims, the source releases.

Never two runners: the target runs only after its claim, and a frozen source goes on only after it
has itself claimed the next epoch, which then fails for the target. Whatever message is lost, one of
the two claims wins. Knows replicas only as handles with the calls of actors.replica.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

from actors.errors import ActorError
from cluster.errors import MigrationFailed
from cluster.remote import ReplicaLost, call
from storage.card import AgentId
from storage.errors import StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Migration:
    """What a migration did. freeze_s: from the freeze to the claim, what a stream would feel."""

    source: str | None
    target: str
    epoch: int
    freeze_s: float


async def migrate(
    agent: AgentId,
    source: tuple[str, Any] | None,
    target: tuple[str, Any],
    timeout: float = 10.0,
    *,
    prefetch: bool = True,
) -> Migration:
    """(node, handle) of both; without a source the target claims what the store has. `prefetch`:
    unless the target is to prefill.

    Raises MigrationFailed; the agent is then served where its next claim succeeds.
    """
    # Before anything stops: most of what the target will need. What this misses it reads later.
    if prefetch:
        await _quietly(call(target[1].prefetch.remote(agent), timeout))
    began = time.monotonic()
    frozen = False
    if source is not None:
        try:
            await call(source[1].freeze.remote(agent), timeout)
            frozen = True
        except StorageError as error:  # the target would miss what the store lacks
            await _quietly(call(source[1].thaw.remote(agent), timeout))
            raise MigrationFailed(f"{source[0]} could not hand over {agent}: {error}") from error
        except ActorError as error:
            # Not its owner any more, or its engine is dead: the target's claim decides.
            logger.warning("agent %s cannot be frozen on %s: %s", agent, source[0], error)
        except ReplicaLost as error:
            if not error.dead:  # it may still be running the agent, or freeze it when it wakes
                source[1].thaw.remote(agent)
                raise MigrationFailed(f"{source[0]} does not answer: {error}") from error
    try:
        epoch = await call(target[1].adopt.remote(agent), timeout)
    except (ReplicaLost, ActorError, StorageError) as error:
        if frozen and source is not None:
            await _quietly(call(source[1].thaw.remote(agent), timeout))
        raise MigrationFailed(f"{target[0]} could not take agent {agent}: {error}") from error
    freeze_s = time.monotonic() - began
    if frozen and source is not None:
        # A lost release heals itself: the source's claim fails at its deadline, and it releases.
        await _quietly(call(source[1].release.remote(agent), timeout))
    return Migration(source[0] if source else None, target[0], epoch, freeze_s)


async def _quietly(pending: Any) -> None:
    try:
        await pending
    except (ReplicaLost, ActorError, StorageError) as error:
        logger.warning("after a migration: %s", error)
