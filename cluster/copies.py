"""Blocks that have lost a copy get another: what a node that left, or a damaged file, leaves short.

For a store on the cluster's own disks. One pass after every change of the nodes, and one now and
then; a copy at a time, at a bounded rate, from disk to disk. Lives in the router actor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from actors.config import ReplicaConfig
from cluster.disks import SCHEME, RemoteDisk, parse_url
from cluster.remote import ReplicaLost, call
from storage.buddies import missing_copies

logger = logging.getLogger(__name__)
RATE = 32e6  # bytes per second, on the average
_LOOK_S = 1.0
_GRACE_S = 10.0  # a node that comes back so soon need not be replaced
_AGAIN_S = 60.0  # between two passes without a change
_LIST_S, _COPY_S = 30.0, 30.0


class Copies:
    """`disks()`: of the living nodes, by name. `short`: blocks with fewer copies than wanted, as of
    the last pass; None before the first."""

    def __init__(
        self,
        replicas: int,
        disks: Callable[[], Mapping[str, RemoteDisk]],
        *,
        rate: float = RATE,
        grace_s: float = _GRACE_S,
    ) -> None:
        self.replicas = replicas
        self.short: int | None = None
        self._disks, self._rate, self._grace_s = disks, rate, grace_s
        self._nodes: frozenset[str] = frozenset()
        self._due = float("-inf")

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.look(time.monotonic())
            except Exception:
                logger.exception("copying blocks failed; it is tried again")
                self._due = time.monotonic() + self._grace_s

    async def look(self, now: float) -> bool:
        """A pass, if one is due; whether there was one."""
        nodes = frozenset(self._disks())
        if nodes != self._nodes:
            self._nodes, self._due = nodes, now + self._grace_s
        if now < self._due or not nodes:
            return False
        self._due = now + _AGAIN_S
        try:
            await self._pass()
        except (ReplicaLost, OSError) as error:
            logger.warning("blocks are not copied now: %s", error)
            self._due = time.monotonic() + self._grace_s
        return True

    async def _pass(self) -> None:
        """Raises ReplicaLost, OSError: a disk does not answer, and what it has is not known."""
        disks = dict(self._disks())
        listed = [call(disk.actor.blocks.remote(), _LIST_S) for disk in disks.values()]
        holdings: dict[str, dict[str, int]] = dict(
            zip(disks, await asyncio.gather(*listed), strict=True)
        )
        copies, short = missing_copies(holdings, self.replicas)
        if short and short != self.short:
            logger.warning("%d blocks have fewer than %d copies", short, self.replicas)
        self.short = short
        left: dict[str, int] = {}
        for copy in copies:
            left[copy.path] = left.get(copy.path, 0) + 1
        for copy in copies:
            if frozenset(self._disks()) != self._nodes:
                return  # another pass follows
            size, began = holdings[copy.source][copy.path], time.monotonic()
            target, source = disks[copy.target], disks[copy.source]
            made = await call(target.actor.copy.remote(source, copy.path), _COPY_S)
            left[copy.path] -= int(made)
            self.short = short = short - int(
                made and not left[copy.path] and len(disks) >= self.replicas
            )
            await asyncio.sleep(max(0.0, size / self._rate - (time.monotonic() - began)))
        if copies:
            logger.info("blocks were copied again; %d lack a copy", short)


def copies_of(
    config: ReplicaConfig, disks: Callable[[], Mapping[str, RemoteDisk]]
) -> Copies | None:
    """None where a shared store has its own way of keeping what it is given."""
    if not config.store.startswith(SCHEME):
        return None
    return Copies(parse_url(config.store)[1], disks)


def copies_json(copies: Copies | None) -> dict[str, Any] | None:
    """For reports."""
    if copies is None:
        return None
    return {"replicas": copies.replicas, "short_blocks": copies.short}
