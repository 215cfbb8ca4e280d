"""The living nodes of the cluster, by name. Pure; Ray's list goes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DEVICE = "kvferry_device"  # the Ray resource of a node that carries a device
NODE_LABEL = "kvferry.io/node"  # optional Ray label: the node's name, else its host name
ENGINE_LABEL = "kvferry.io/engine"  # optional Ray label: the node's engine, else the configured one


@dataclass(frozen=True)
class Node:
    """A living Ray node."""

    id: str  # its name in kvferry
    ray_id: str
    address: str
    has_device: bool
    engine: str = ""  # its own, if it has one


def named(entries: list[dict[str, Any]]) -> dict[str, Node]:
    """Living Ray nodes by name; several on one host without a label get their Ray id appended."""
    nodes: dict[str, Node] = {}
    for entry in sorted(entries, key=lambda e: str(e["NodeID"])):
        if not entry["Alive"]:
            continue
        name = entry.get("Labels", {}).get(NODE_LABEL) or entry["NodeManagerHostname"]
        if name in nodes:
            name = f"{name}-{entry['NodeID'][:8]}"
        nodes[name] = Node(
            name,
            entry["NodeID"],
            entry["NodeManagerAddress"],
            DEVICE in entry["Resources"],
            entry.get("Labels", {}).get(ENGINE_LABEL, ""),
        )
    return nodes
