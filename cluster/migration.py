"""Moving an agent while it speaks: pre-copy, freeze, claim, release.

Pre-copy: in rounds, the source stores what the shared store lacks, and the target loads what is
stored into RAM and engine, until few rows are left. Freeze: the source stops at a token boundary;
those few rows are computed again, as part of the target's first step, because that is faster than
to ship them. Only where too many are left does the freeze wait for the store. Claim: the target
verifies that what it has loaded is what the claimed card says. Release: the source's turns end, the
stream goes on at the target. So the freeze does not depend on the length of the context.

Never two runners: the target runs only after its claim, and a frozen source goes on only after it
has itself claimed the next epoch, which then fails for the target. Whatever message is lost, one of
the two claims wins. Knows replicas only as handles with the calls of actors.replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from actors.errors import ActorError
from actors.handoff import FEW_ROWS, Copied
from actors.preload import Fetched
from cluster.errors import MigrationFailed
from cluster.remote import ReplicaLost, call
from storage.card import AgentId
from storage.errors import StorageError

logger = logging.getLogger(__name__)
_MAX_ROUNDS = 5
_MOST_ROWS = 256  # computed again rather than stored in the freeze


@dataclass(frozen=True)
class Migration:
    """What a migration did. freeze_s: from the freeze to the release, what a stream feels of it.
    rows: those of the agent's last branch that the target had before the freeze, `loaded` of them
    in its engine. n_bytes: that came to the target's node."""

    source: str | None
    target: str
    epoch: int
    freeze_s: float
    total_s: float = 0.0
    rounds: int = 0
    rows: int = 0
    loaded: int = 0
    n_bytes: int = 0


@dataclass
class _Shipped:
    """What the rounds of pre-copy did. most: rows that the freeze need not store."""

    rounds: int = 0
    rows: int = 0
    loaded: int = 0
    n_bytes: int = 0
    most: int = FEW_ROWS


async def migrate(
    agent: AgentId,
    source: tuple[str, Any] | None,
    target: tuple[str, Any],
    timeout: float = 10.0,
    *,
    prefetch_s: float = 30.0,
) -> Migration:
    """(node, handle) of both; without a source the target claims what the store has. `prefetch_s`:
    for all rounds of pre-copy, whose rest the target reads after its claim; 0 if it is to prefill.

    Raises MigrationFailed; the agent is then served where its next claim succeeds. May be cancelled
    at any time: until the claim that is a failure, after it nothing.
    """
    began = time.monotonic()
    shipped = _Shipped()
    if prefetch_s:
        await _precopy(agent, source, target, timeout, prefetch_s, shipped)
    froze, frozen = time.monotonic(), False
    try:
        frozen = source is not None and await _freeze(agent, source, shipped.most, timeout)
        epoch = await call(target[1].adopt.remote(agent), timeout)
    except (ReplicaLost, ActorError, StorageError) as error:
        if frozen and source is not None:
            await _quietly(call(source[1].thaw.remote(agent), timeout))
        raise MigrationFailed(f"{target[0]} could not take agent {agent}: {error}") from error
    except asyncio.CancelledError:
        if source is not None:
            source[1].thaw.remote(agent)  # nothing to one that is not frozen
        raise
    if frozen and source is not None:
        # A lost release heals itself: the source's claim fails at its deadline, and it releases.
        with contextlib.suppress(asyncio.CancelledError):  # it has moved
            await _quietly(call(source[1].release.remote(agent), timeout))
    now = time.monotonic()
    return Migration(
        source[0] if source else None, target[0], epoch, now - froze, now - began,
        shipped.rounds, shipped.rows, shipped.loaded, shipped.n_bytes,
    )  # fmt: skip


async def _freeze(agent: AgentId, source: tuple[str, Any], most: int, timeout: float) -> bool:
    """Whether the source has the agent, frozen."""
    name, replica = source
    try:
        await call(replica.freeze.remote(agent, most), timeout)
        return True
    except StorageError as error:  # the target would miss what the store lacks
        await _quietly(call(replica.thaw.remote(agent), timeout))
        raise MigrationFailed(f"{name} could not hand over {agent}: {error}") from error
    except ActorError as error:
        # Not its owner any more, or its engine is dead: the target's claim decides.
        logger.warning("agent %s cannot be frozen on %s: %s", agent, name, error)
    except ReplicaLost as error:
        if not error.dead:  # it may still be running the agent, or freeze it when it wakes
            replica.thaw.remote(agent)
            raise MigrationFailed(f"{name} does not answer: {error}") from error
    return False


async def _precopy(
    agent: AgentId,
    source: tuple[str, Any] | None,
    target: tuple[str, Any],
    timeout: float,
    prefetch_s: float,
    shipped: _Shipped,
) -> None:
    """Rounds until one has shipped few rows, or no fewer than the one before. What fails is read,
    or computed, after the claim. Raises MigrationFailed when the source is silent."""
    deadline, before = time.monotonic() + prefetch_s, None
    while shipped.rounds < _MAX_ROUNDS and time.monotonic() < deadline:
        began = time.monotonic()
        copied = await _copied(agent, source, timeout) if source is not None else None
        store_s = time.monotonic() - began
        fetched: Fetched | None = await _quietly(
            call(target[1].prefetch.remote(agent), deadline - time.monotonic())
        )
        if fetched is None:
            return
        shipped.rounds += 1
        shipped.rows, shipped.loaded = fetched.rows, fetched.loaded
        shipped.n_bytes += fetched.n_bytes
        if copied is None:
            return
        # So many rows the target computes in the time that the source takes to store some.
        few = int(store_s * fetched.prefill_tokens_per_s)
        shipped.most = max(FEW_ROWS, min(_MOST_ROWS, few))
        lacked = copied.lacked
        if lacked is not None and (lacked <= FEW_ROWS or (before is not None and lacked >= before)):
            return
        before = lacked


async def _copied(agent: AgentId, source: tuple[str, Any], timeout: float) -> Copied | None:
    """None: the source does not own the agent, or is dead."""
    try:
        copied: Copied = await call(source[1].precopy.remote(agent), timeout)
        return copied
    except (ActorError, StorageError) as error:
        logger.warning("agent %s is not copied from %s: %s", agent, source[0], error)
    except ReplicaLost as error:
        if not error.dead:
            raise MigrationFailed(f"{source[0]} does not answer: {error}") from error
    return None


async def _quietly(pending: Any) -> Any:
    """The answer; None when there is none."""
    try:
        return await pending
    except (ReplicaLost, ActorError, StorageError) as error:
        logger.warning("in a migration: %s", error)
        return None
