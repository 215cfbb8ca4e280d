"""Moving an agent while it speaks: pre-copy, freeze, claim, release.

Pre-copy: in rounds, the target loads what is stored into RAM and engine, and the source stores what
the shared store lacks, until few rows are left. Freeze: the source stops at a token boundary,
and those few rows go with its answer to the target, which brings them to the store, as it would its
own. Only where too many are left does the freeze wait for the store. Claim: the target verifies
that what it has loaded is what the claimed card says. Release: the source's turns end, the stream
goes on at the target. So the freeze does not depend on the length of the context.

Where the target can read the source's disk, nothing waits for the store: the source writes there,
the target fetches from there what the store lacks, and what it lacks is then the target's to bring.

Never two runners: the target runs only after its claim, and a frozen source goes on only after it
has itself claimed the next epoch, which then fails for the target. Whatever message is lost, one of
the two claims wins. Knows replicas only as handles with the calls of actors.replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from actors.branches import UNKNOWN, Before
from actors.errors import ActorError
from actors.exporter import Held
from actors.handoff import Copied, Frozen
from actors.preload import Fetched
from cluster.errors import MigrationFailed
from cluster.remote import ReplicaLost, call
from storage.card import AgentId, CacheCard
from storage.errors import StorageError
from storage.peers import BlockSource

logger = logging.getLogger(__name__)
_MAX_ROUNDS = 5
_BYTES_PER_S, _TELLING = 12.5e6, 1 << 20  # before a round has shipped enough to tell


@dataclass(frozen=True)
class Migration:
    """What a migration did. freeze_s: from the token at which the agent stopped to the release.
    rows: those of the agent's last branch that the target had before the freeze, `loaded` of them
    in its engine. n_bytes: that came to the target's node, peer_bytes of them from the source's
    disk."""

    source: str | None
    target: str
    epoch: int
    freeze_s: float
    total_s: float = 0.0
    rounds: int = 0
    rows: int = 0
    loaded: int = 0
    n_bytes: int = 0
    peer_bytes: int = 0


@dataclass
class _Shipped:
    """What the rounds of pre-copy did. held: what the target has. disk: the source's, None where
    everything goes through the store. card: what the target fetched last."""

    disk: BlockSource | None
    rounds: int = 0
    held: Held | None = None
    loaded: int = 0
    n_bytes: int = 0
    peer_bytes: int = 0
    card: CacheCard | None = None
    bytes_per_s: float = _BYTES_PER_S  # that come to the target

    @property
    def rows(self) -> int:
        return self.held.rows if self.held is not None else 0

    def fetched(self, fetched: Fetched, took_s: float) -> None:
        self.rounds += 1
        if fetched.n_bytes >= _TELLING:
            self.bytes_per_s = fetched.n_bytes / max(took_s, 0.001)
        self.held, self.loaded = fetched.held, fetched.loaded
        self.n_bytes += fetched.n_bytes
        self.peer_bytes += fetched.peer_bytes


async def migrate(
    agent: AgentId,
    source: tuple[str, Any] | None,
    target: tuple[str, Any],
    timeout: float = 10.0,
    *,
    prefetch_s: float = 30.0,
    disk: BlockSource | None = None,
    whole: bool = False,
) -> Migration:
    """(node, handle) of both; without a source the target claims what the store has. `prefetch_s`:
    for all rounds of pre-copy, whose rest the target reads after its claim; 0 if it is to prefill.
    `disk`: the source's, if the target is to fetch from there; both have one. `whole`: the source
    is not frozen, and this fails, unless pre-copy left no more than goes with the freeze.

    Raises MigrationFailed; the agent is then served where its next claim succeeds. May be cancelled
    at any time: until the claim that is a failure, after it nothing.
    """
    began = time.monotonic()
    shipped, few = _Shipped(disk if source is not None else None), False
    if prefetch_s:
        few = await _precopy(agent, source, target, timeout, prefetch_s, shipped)
    if whole and source is not None and not few:
        raise MigrationFailed(f"pre-copy of agent {agent} is not done")
    froze, frozen = time.monotonic(), None
    try:
        if source is not None:
            frozen = await _freeze(agent, source, shipped, timeout)
            froze += frozen.waited_s if frozen is not None else 0.0
        handed = frozen.card if frozen is not None else None
        if frozen is not None and prefetch_s and _rows(handed) > _rows(shipped.card):
            # Stored since: they are fetched before the claim, or never.
            was = Before(handed, shipped.disk, frozen.latest)
            await _quietly(_fetch(agent, target, timeout, shipped, was))
        epoch = await call(target[1].adopt.remote(agent, frozen, handed and shipped.disk), timeout)
    except (ReplicaLost, ActorError, StorageError) as error:
        if frozen is not None and source is not None:
            await _quietly(call(source[1].thaw.remote(agent), timeout))
        raise MigrationFailed(f"{target[0]} could not take agent {agent}: {error}") from error
    except asyncio.CancelledError:
        if source is not None:
            source[1].thaw.remote(agent)  # nothing to one that is not frozen
        raise
    if frozen is not None and source is not None:
        # A lost release heals itself: the source's claim fails at its deadline, and it releases.
        with contextlib.suppress(asyncio.CancelledError):  # it has moved
            await _quietly(call(source[1].release.remote(agent), timeout))
    now = time.monotonic()
    return Migration(
        source[0] if source else None, target[0], epoch, now - froze, now - began,
        shipped.rounds, shipped.rows, shipped.loaded, shipped.n_bytes, shipped.peer_bytes,
    )  # fmt: skip


def _rows(card: CacheCard | None) -> int:
    return sum(branch.rows for branch in card.branches) if card is not None else 0


async def _fetch(
    agent: AgentId,
    target: tuple[str, Any],
    timeout: float,
    shipped: _Shipped,
    was: Before,
) -> Fetched:
    began = time.monotonic()
    fetched: Fetched = await call(target[1].prefetch.remote(agent, was), timeout)
    shipped.fetched(fetched, time.monotonic() - began)
    shipped.card = was.handed
    return fetched


async def _freeze(
    agent: AgentId, source: tuple[str, Any], shipped: _Shipped, timeout: float
) -> Frozen | None:
    """None: the source does not have the agent. Raises MigrationFailed."""
    name, replica = source
    try:
        freezing = replica.freeze.remote(agent, shipped.held, shipped.disk is not None)
        frozen: Frozen = await call(freezing, timeout)
        return frozen
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
    return None


async def _precopy(
    agent: AgentId,
    source: tuple[str, Any] | None,
    target: tuple[str, Any],
    timeout: float,
    prefetch_s: float,
    shipped: _Shipped,
) -> bool:
    """Whether what is left goes with the freeze. There are rounds while another would ship more
    than a few rows, and fewer than the one before. The first ships what is stored, others have the
    source store the rest first. What fails is read, or computed, after the claim. Raises
    MigrationFailed when the source is silent."""
    deadline, before = time.monotonic() + prefetch_s, math.inf
    while shipped.rounds < _MAX_ROUNDS and time.monotonic() < deadline:
        copied = await _copied(agent, source, shipped, timeout) if source is not None else None
        asked = time.monotonic()
        was = UNKNOWN
        if copied is not None:
            was = Before(copied.card, shipped.disk, copied.latest)
        fetched = await _quietly(_fetch(agent, target, deadline - asked, shipped, was))
        if fetched is None or copied is None:
            return False
        if copied.suffices(fetched.held, time.monotonic() - asked, shipped.bytes_per_s):
            return True
        if copied.lacks is not None:
            if copied.lacks >= before:
                return False
            before = copied.lacks
    return False


async def _copied(
    agent: AgentId, source: tuple[str, Any], shipped: _Shipped, timeout: float
) -> Copied | None:
    """None: the source does not own the agent, or is dead."""
    near, store, precopy = shipped.disk is not None, shipped.rounds > 0, source[1].precopy
    try:
        copied: Copied = await call(precopy.remote(agent, near, store), timeout)
        if near and store and copied.lacks is None:  # its disk takes nothing, now
            shipped.disk = None
            copied = await call(precopy.remote(agent, False, True), timeout)
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
