"""A node's disk for the other nodes: an actor of its own, which reads the block files under one
folder. A process apart, so that serving them takes nothing of the replica's; pinned to the node.

Bytes only, by names that are checked here; whoever reads them verifies them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.blocks import block_name
from storage.card import TENANT_PATTERN, BlockRef
from storage.errors import StoreUnavailable

NAMESPACE = "kvferry"
MAX_BLOCK_BYTES = 1 << 30
_CALLS = 4  # that one disk answers at a time
_WAITING = 32  # calls of one caller that wait for an answer
_ANSWER_S, _SLOWEST = 2.0, 4e6  # seconds for an answer to begin; bytes per second at the least
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


class NodeDisk:
    """Hosted by Ray as a named, detached actor with a few threads."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def block(self, tenant: str, block_id: str, part: str, digest: str, size: int) -> bytes | None:
        """A block's file, as it is stored; None when there is none of this size. Raises
        ValueError for what is no block's name."""
        named = TENANT_PATTERN.match(tenant) and part in ("full", "sliding")
        if not (named and _DIGEST.match(block_id) and _DIGEST.match(digest)):
            raise ValueError(f"no block's name: {tenant!r} {block_id!r} {part!r} {digest!r}")
        folder = self._folder / "blocks" / tenant / block_id[:3]
        path = folder / block_name(block_id, part, digest)
        try:
            if path.stat().st_size != size or size > MAX_BLOCK_BYTES:
                return None
            return path.read_bytes()
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class RemoteDisk:
    """A storage.peers.BlockSource: the disk of a node, from any process of the cluster."""

    node: str
    actor: Any

    def get(self, tenant: str, ref: BlockRef, part: str) -> bytes | None:
        """Blocks its thread, to its deadline at the most. Raises StoreUnavailable."""
        import ray
        from ray.exceptions import RayError

        stored = ref.parts[part]
        timeout = _ANSWER_S + stored.size / _SLOWEST
        try:
            called = self.actor.block.remote(tenant, ref.id, part, stored.sha256, stored.size)
            raw: bytes | None = ray.get(called, timeout=timeout)
        except (RayError, OSError) as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise StoreUnavailable(f"the disk of {self.node}", reason) from error
        return raw


def open_disk(node: str, ray_id: str, folder: str) -> RemoteDisk:
    """The disk of a node, whose actor is started if there is none. Asks nothing of it yet."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actor: Any = ray.remote(NodeDisk)
    started = actor.options(
        name=f"disk-{ray_id}",
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=_CALLS,
        max_pending_calls=_WAITING,
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray_id, soft=False),
    ).remote(folder)
    return RemoteDisk(node, started)
