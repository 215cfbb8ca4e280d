"""Blocks that lost a copy get another: when, how many, how fast."""

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from actors.config import ReplicaConfig
from cluster.copies import Copies, copies_json, copies_of
from cluster.disks import NodeDisk
from storage.cache_file import sha256
from tests.fake_cluster import Handle, lost


class Remote:
    """A cluster.disks.RemoteDisk without Ray."""

    def __init__(self, node: str, disk: NodeDisk) -> None:
        self.node, self.disk, self.actor = node, disk, Handle(disk)

    def read(self, path: str, start: int, stop: int | None) -> bytes:
        return self.disk.read(path, start, stop)


class Nodes:
    def __init__(self, folder: Path, names: str = "abc") -> None:
        self.folder = folder
        self.living: dict[str, Any] = {n: Remote(n, NodeDisk(str(folder / n))) for n in names}

    def write(self, raw: bytes, *nodes: str) -> str:
        """A block's file on some nodes' disks; its path."""
        path = f"blocks/acme/3c3/{'3c' * 32}.full.{sha256(raw)}.safetensors"
        for node in nodes:
            self.living[node].disk.create(path, raw)
        return path

    def lose(self, node: str) -> None:
        del self.living[node]
        shutil.rmtree(self.folder / node)

    def holders(self, path: str) -> set[str]:
        return {node for node, remote in self.living.items() if path in remote.disk.blocks()}


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


def copies(nodes: Nodes, replicas: int = 2, **options: float) -> Copies:
    return Copies(replicas, lambda: nodes.living, grace_s=10.0, **options)


def look(made: Copies, now: float) -> bool:
    return asyncio.run(made.look(now))


def test_what_a_node_that_left_had_is_copied_again_after_a_while(nodes: Nodes) -> None:
    paths = [nodes.write(os.urandom(1000), "a", "b") for _ in range(5)]
    made = copies(nodes)
    assert not look(made, 0.0)
    assert look(made, 10.0)
    assert (made.short, not look(made, 20.0)) == (0, True)
    nodes.lose("b")
    assert not look(made, 30.0)
    assert not look(made, 39.0)  # it may come back
    assert look(made, 40.0)
    assert made.short == 0
    assert [nodes.holders(path) for path in paths] == [{"a", "c"}] * 5


def test_more_copies_than_nodes_are_missing_and_are_said_to_be(nodes: Nodes) -> None:
    path = nodes.write(b"rows", "a")
    made = copies(nodes, replicas=4)
    look(made, 0.0)
    assert copies_json(made) == {"replicas": 4, "short_blocks": None}
    look(made, 10.0)
    assert nodes.holders(path) == {"a", "b", "c"}
    assert copies_json(made) == {"replicas": 4, "short_blocks": 1}


def test_a_disk_that_does_not_answer_is_not_taken_for_empty(nodes: Nodes) -> None:
    path = nodes.write(b"rows", "a", "b")
    silent = nodes.living["b"].actor

    def fails() -> dict[str, int]:
        raise lost()

    nodes.living["b"].actor = Handle(type("Dead", (), {"blocks": staticmethod(fails)}))
    made = copies(nodes)
    look(made, 0.0)
    assert look(made, 10.0)
    assert (nodes.holders(path), made.short) == ({"a", "b"}, None)
    nodes.living["b"].actor = silent
    assert look(made, time.monotonic() + 10.0)
    assert made.short == 0


def test_a_damaged_source_is_not_copied(nodes: Nodes) -> None:
    path = nodes.write(b"rows", "a")
    (nodes.folder / "a" / path).write_bytes(b"rowz")
    made = copies(nodes)
    look(made, 0.0)
    look(made, 10.0)
    assert (nodes.holders(path), made.short) == ({"a"}, 1)


def test_copies_are_made_at_a_bounded_rate(nodes: Nodes) -> None:
    for _ in range(4):
        nodes.write(os.urandom(25_000), "a")
    made = copies(nodes, rate=200_000.0)
    look(made, 0.0)
    began = time.monotonic()
    look(made, 10.0)
    assert made.short == 0
    assert time.monotonic() - began >= 0.5


def test_a_shared_store_keeps_its_copies_itself() -> None:
    assert copies_of(ReplicaConfig(), dict) is None
    made = copies_of(ReplicaConfig(store="cluster:///disks?replicas=3"), dict)
    assert made is not None
    assert made.replicas == 3
    assert copies_json(None) is None
