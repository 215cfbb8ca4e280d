"""Which disks keep a file, and which are to get a copy of it. Pure; used by `disks` and by the
cluster's background copies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def ranked(name: str, nodes: Iterable[str]) -> list[str]:
    """The nodes in the order in which they are to keep a file (rendezvous hashing): one that joins
    or leaves changes nothing about the order of the others."""

    def weight(node: str) -> bytes:
        return hashlib.sha256(f"{node}/{name}".encode()).digest()

    return sorted(nodes, key=weight)


@dataclass(frozen=True)
class Copy:
    """A file to be copied from one node's disk to another's."""

    path: str
    source: str
    target: str


def missing_copies(
    holdings: Mapping[str, Mapping[str, int]], replicas: int
) -> tuple[list[Copy], int]:
    """`holdings`: of every living node, path -> bytes. (what to copy, so that every file is on as
    many disks as there can be; how many files have fewer than `replicas` now)."""
    holders: dict[str, list[str]] = {}
    for node in sorted(holdings):
        for path in holdings[node]:
            holders.setdefault(path, []).append(node)
    copies, short = [], 0
    for path, has in holders.items():
        lacks = replicas - len(has)
        if lacks <= 0:
            continue
        short += 1
        order = ranked(path.rsplit("/", 1)[-1], holdings.keys() - set(has))
        copies += [Copy(path, has[0], target) for target in order[:lacks]]
    return copies, short
