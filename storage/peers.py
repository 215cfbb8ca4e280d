"""Blocks from the local tiers of other nodes.

A peer is a BlockSource that the cluster supplies; here is only when it is asked, and how long it is
left alone after it did not answer. What it sends is verified by the caller. Thread-safe; used by
`tiers`.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

from storage.card import BlockRef
from storage.errors import StorageError
from storage.links import PROBE_BYTES, Link, LinkRate

logger = logging.getLogger(__name__)
PAUSE_S = 30.0  # a peer that did not answer is not asked so long
_MAX_PEERS = 256  # whose links are remembered
_MAX_PROBED = 8  # in a large cluster the first read from others measures
_APART_S = 0.1  # times those that are probed: how far replicas are apart when they begin


class BlockSource(Protocol):
    """The block files of one node, by their names. Every call ends at a deadline of its own."""

    @property
    def node(self) -> str: ...

    def get(self, tenant: str, ref: BlockRef, part: str) -> bytes | None:
        """The bytes of one part as they are stored, not verified; None when the node does not have
        them. Raises StoreUnavailable."""

    def sample(self, size: int) -> bytes:
        """So many bytes that mean nothing, as fast as those of a block. Raises StoreUnavailable."""


class Peers:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._links: OrderedDict[str, Link] = OrderedDict()  # by node, the latest used last
        self._silent_until: dict[str, float] = {}
        self._lock = threading.Lock()
        self._meeting = ThreadPoolExecutor(1, "meet-peers")
        self.n_bytes = 0  # that came from peers

    def meet(self, sources: Iterable[BlockSource]) -> Future[None]:
        """Measure the links to those that are new, behind the caller's back: the first bytes from a
        node take several times as long as others, and a link that looks slow is not used again."""
        return self._meeting.submit(self._measure, list(sources))

    def _measure(self, sources: list[BlockSource]) -> None:
        """One by one, and not all replicas of a cluster that starts the same ones at once."""
        new = [source for source in sources if not self.seconds(source.node, 1)]
        new = random.sample(new, min(len(new), _MAX_PROBED))
        time.sleep(random.uniform(0.0, _APART_S * len(new)))
        for source in new:
            if (link := self._link(source.node)) is not None:
                try:
                    link.probe(partial(source.sample, PROBE_BYTES))
                except StorageError as error:
                    logger.warning("the link to %s is not measured: %s", source.node, error)

    def get(self, source: BlockSource, tenant: str, ref: BlockRef, part: str) -> bytes | None:
        """The stored bytes, not verified; None when they are not there, or nobody answers."""
        link = self._link(source.node)
        if link is None:
            return None
        try:
            raw = link.timed(lambda: source.get(tenant, ref, part))
        except StorageError as error:
            logger.warning("peer %s is left alone for %g s: %s", source.node, PAUSE_S, error)
            with self._lock:
                self._silent_until[source.node] = self._clock() + PAUSE_S
            return None
        with self._lock:
            self.n_bytes += len(raw or b"")
        return raw

    def seconds(self, node: str, size: int) -> float:
        """How long a read of so many bytes takes; 0 before the first, which then measures."""
        with self._lock:
            link = self._links.get(node)
        return link.seconds(size) if link is not None else 0.0

    def rates(self) -> dict[str, LinkRate]:
        """Of the nodes that were read from."""
        with self._lock:
            links = list(self._links.items())
        return {node: rate for node, link in links if (rate := link.rate)}

    def _link(self, node: str) -> Link | None:
        """None while the node is left alone."""
        with self._lock:
            if self._clock() < self._silent_until.get(node, float("-inf")):
                return None
            self._silent_until.pop(node, None)
            link = self._links.setdefault(node, Link())
            self._links.move_to_end(node)
            if len(self._links) > _MAX_PEERS:
                self._links.popitem(last=False)
            return link
