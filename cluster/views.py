"""The router's reports as JSON: agents and nodes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cluster.drain import Drains
from cluster.member import Replica
from cluster.pool import ReplicaPool
from cluster.registry import AgentRecord


def agent_json(record: AgentRecord) -> dict[str, Any]:
    return {
        "id": str(record.agent),
        "node": record.node,
        "state": record.state,
        "epoch": record.epoch,
        "generation": record.generation,
        "branches": record.branches,
        "tokens": record.tokens,
        "durable_tokens": record.durable_rows,
        "bytes": {"ram": record.ram_bytes, "store": record.stored_bytes},
        "last_used": record.last_used,
    }


def nodes_json(pool: ReplicaPool, drains: Drains) -> list[dict[str, Any]]:
    """Every node of the cluster, and what its replica says."""
    errors, refused = pool.errors(), pool.refused()
    return [
        node_json(node.id, node.address, node.has_device, pool.replicas.get(node.id))
        | ({"error": errors[node.id]} if node.id in errors else {})
        | ({"replica": "refused"} if node.id in refused else {})
        | drains.report(node.id)
        for node in sorted(pool.nodes.values(), key=lambda n: n.id)
    ]


def node_json(node: str, address: str, has_device: bool, replica: Replica | None) -> dict[str, Any]:
    info = replica.info if replica else None
    status = replica.status if replica else None
    return {
        "id": node,
        "address": address,
        "replica": "none"
        if not has_device
        else ("ready" if replica and replica.healthy else "not ready"),
        "fetching": asdict(replica.fetching) if replica and replica.fetching else None,
        "pid": info.pid if info else None,
        "raylet_pid": info.raylet_pid if info else None,
        "engine": info.engine if info else None,
        "versions": dict(info.versions) if info else {},
        "device": info.device if info else None,
        "slots": info.slots if info else 0,
        "agents": status.n_agents if status else 0,
        "running": status.running if status else 0,
        "waiting": status.waiting if status else 0,
        "queue_s": status.queue_s if status else 0.0,
        "bytes": {
            "engine": info.kv_bytes if info else 0,
            "pool": status.pool_bytes if status else 0,
            "local": status.local.used_bytes if status and status.local else 0,
        },
        "local": asdict(status.local) if status and status.local else None,
        "lagging": {
            "agents": status.lagging_agents if status else 0,
            "bytes": status.lagging_bytes if status else 0,
        },
        "rates": asdict(status.rates) if status else {},
        "links": {name: asdict(rate) for name, rate in status.links.items()} if status else {},
        "store_answers": status.store_answers if status else None,
        "faults": status.faults if status else {},
        "served": status.served if status else {},
    }
