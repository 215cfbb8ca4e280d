"""The disks of the nodes, for one another: an actor on each, which reads and writes files under one
folder. A process apart, so that serving them takes nothing of the replica's; pinned to its node.

With a local tier, that is its folder: others read blocks from there (storage.peers). With a store
at cluster://<folder>[?replicas=<n>], it is the node's part of that store (storage.disks); the head
has a disk of its own there, for cards and claims. Files are named by paths that are checked here,
and read by those who verify them.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.config import ReplicaConfig
from cluster.nodes import named
from storage.blocks import block_name
from storage.card import TENANT_PATTERN, BlockRef
from storage.disks import Disk, DisksBackend, FolderDisk
from storage.errors import StoreUnavailable

NAMESPACE = "kvferry"
SCHEME = "cluster://"
DEFAULT_REPLICAS = 2
MAX_BLOCK_BYTES = 1 << 30
_CALLS = 4  # that one disk answers at a time
_WAITING = 64  # calls of one caller that wait for an answer
_ANSWER_S, _SLOWEST = 2.0, 4e6  # seconds for an answer to begin; bytes per second at the least
_WRITTEN_S = 10.0  # and of a write, which nobody waits for
_LARGE_BLOCK = 16 << 20  # bytes; of a file whose size is not known
# Answers up to this many bytes come with the reply itself. What is larger goes through the object
# stores of both nodes, which takes twice as long, and more than twice the processor time.
_IN_REPLY = (10 << 20) - (64 << 10)  # all that Ray lets a reply carry is 10 MB
_MEMBERS_S = 2.0  # so old may be what is known of the cluster's nodes
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_HEAD = "node:__internal_head__"  # the resource that Ray gives the head


class NodeDisk(FolderDisk):
    """Hosted by Ray as a named, detached actor with a few threads."""

    def block(self, tenant: str, block_id: str, part: str, digest: str, size: int) -> bytes | None:
        """A block's file, as it is stored; None when there is none of this size. Raises
        ValueError for what is no block's name."""
        named = TENANT_PATTERN.match(tenant) and part in ("full", "sliding")
        if not (named and _DIGEST.match(block_id) and _DIGEST.match(digest)):
            raise ValueError(f"no block's name: {tenant!r} {block_id!r} {part!r} {digest!r}")
        path = f"blocks/{tenant}/{block_id[:3]}/{block_name(block_id, part, digest)}"
        try:
            if Path(self._path(path)).stat().st_size != size or size > MAX_BLOCK_BYTES:
                return None
            return self.read(path)
        except FileNotFoundError:
            return None

    def sample(self, size: int) -> bytes:
        """Bytes that mean nothing, at most those of a large block."""
        return os.urandom(min(size, _LARGE_BLOCK))

    def copy(self, source: Disk, path: str) -> bool:
        """Fetch a block's file from another node; False if it is gone there, or not sound. Raises
        OSError."""
        try:
            raw = source.read(path, 0, None)
        except FileNotFoundError:
            return False
        return self.keep(path, raw)


@dataclass(frozen=True)
class RemoteDisk:
    """The disk of a node, from any process of the cluster: a storage.disks.Disk and a
    storage.peers.BlockSource. Calls block their thread, to a deadline at the most."""

    node: str
    actor: Any

    def get(self, tenant: str, ref: BlockRef, part: str) -> bytes | None:
        """Raises StoreUnavailable."""
        stored = ref.parts[part]
        name = (tenant, ref.id, part, stored.sha256, stored.size)
        raw: bytes | None = self._told("block", *name, size=stored.size)
        return raw

    def sample(self, size: int) -> bytes:
        """Raises StoreUnavailable."""
        raw: bytes = self._told("sample", size, size=size)
        return raw

    def _told(self, method: str, *arguments: Any, size: int) -> Any:
        """As a BlockSource: raises StoreUnavailable."""
        try:
            return self._call(method, *arguments, size=size)
        except OSError as error:
            raise StoreUnavailable(f"the disk of {self.node}", str(error)) from error

    def names(self, folder: str) -> list[str]:
        found: list[str] = self._call("names", folder)
        return found

    def entries(self, folder: str) -> list[tuple[str, int, float]]:
        found: list[tuple[str, int, float]] = self._call("entries", folder)
        return found

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        raw: bytes = self._call("read", path, start, stop, size=_LARGE_BLOCK)
        return raw

    def create(self, path: str, raw: bytes) -> None:
        self._call("create", path, raw, size=len(raw), answer_s=_WRITTEN_S)

    def rename(self, path: str, target: str) -> None:
        self._call("rename", path, target)

    def remove(self, path: str) -> None:
        self._call("remove", path)

    def clock(self) -> float:
        now: float = self._call("clock")
        return now

    def _call(
        self, method: str, *arguments: Any, size: int = 0, answer_s: float = _ANSWER_S
    ) -> Any:
        """Raises what the disk raised; TimeoutError or ConnectionError where nobody answers."""
        from ray.exceptions import RayError, RayTaskError

        timeout = answer_s + size / _SLOWEST
        try:
            # Not ray.get, which in an asynchronous actor warns whatever the thread.
            return getattr(self.actor, method).remote(*arguments).future().result(timeout)
        except RayTaskError as error:
            raise error.cause if error.cause is not None else error from error
        except TimeoutError as error:
            raise TimeoutError(f"no answer in {timeout:.1f} s") from error
        except RayError as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ConnectionError(f"{type(error).__name__}: {reason}") from error


def open_disk(node: str, ray_id: str, folder: str) -> RemoteDisk:
    """The disk of a node, whose actor is started if there is none. Asks nothing of it yet."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    pinned = NodeAffinitySchedulingStrategy(ray_id, soft=False)
    return RemoteDisk(node, _actor(f"disk-{ray_id}", folder, scheduling_strategy=pinned))


def _actor(name: str, folder: str, **where: Any) -> Any:
    import ray

    actor: Any = ray.remote(NodeDisk)
    return actor.options(
        name=name,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=_CALLS,
        max_pending_calls=_WAITING,
        runtime_env={"env_vars": {"RAY_max_direct_call_object_size": str(_IN_REPLY)}},
        **where,
    ).remote(folder)


# ---- a store on them


def parse_url(url: str) -> tuple[str, int]:
    """(folder, replicas) of cluster://<folder>[?replicas=<n>]. Raises ValueError."""
    match = re.fullmatch(r"cluster://(/[^?]*?)/*(?:\?replicas=([1-9]\d?))?", url)
    if match is None:
        raise ValueError(f"store {url!r}: wants cluster:///a/folder, on every node")
    return match[1], int(match[2] or DEFAULT_REPLICAS)


def open_backend(url: str) -> DisksBackend:
    """For storage.files. Opens no connection. Raises ValueError."""
    folder, replicas = parse_url(url)
    return DisksBackend(ClusterDisks(folder), replicas)


class ClusterDisks:
    """Who has a disk, as Ray says; each node's is the part of the folder that has its name."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._head: RemoteDisk | None = None
        self._opened: dict[str, RemoteDisk] = {}  # by Ray's id of the node
        self._living: dict[str, RemoteDisk] = {}  # by its name
        self._own: tuple[str, Disk] | None = None
        self._looked = float("-inf")
        self._lock = threading.Lock()

    def head(self) -> Disk:
        with self._lock:
            if self._head is None:
                _connect()
                folder = f"{self._folder}/head-cards"
                self._head = RemoteDisk(
                    "head", _actor("disk-cards", folder, resources={_HEAD: 0.001})
                )
            return self._head

    def own(self) -> tuple[str, Disk] | None:
        with self._lock:
            if self._looked == float("-inf"):
                self._look()
            return self._own

    def living(self) -> Mapping[str, Disk]:
        with self._lock:
            if time.monotonic() - self._looked > _MEMBERS_S:
                self._look()
            return dict(self._living)

    def _look(self) -> None:
        import ray

        _connect()
        here = ray.get_runtime_context().get_node_id()
        list_nodes: Any = ray.nodes  # has no types
        nodes = [node for node in named(list_nodes()).values() if node.has_device]
        self._opened = {
            node.ray_id: self._opened.get(node.ray_id)
            or open_disk(node.id, node.ray_id, node_folder(self._folder, node.id))
            for node in nodes
        }
        self._living = {node.id: self._opened[node.ray_id] for node in nodes}
        for node in nodes:
            if node.ray_id == here:
                self._own = node.id, FolderDisk(node_folder(self._folder, node.id))
        self._looked = time.monotonic()


def disk_folder(config: ReplicaConfig) -> str:
    """Where nodes have a disk for others, each below its name; "": they have none."""
    if config.store.startswith(SCHEME):
        return parse_url(config.store)[0]
    return config.local if config.local_bytes else ""


def node_folder(folder: str, node: str) -> str:
    """Where a node keeps its part of a store at cluster://<folder>, or of a local tier."""
    return f"{folder}/{node}"


def _connect() -> None:
    """A program beside the cluster, such as `kvferry gc`, joins it first. Raises OSError."""
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"{SCHEME} is there while its cluster runs: {error}") from error
