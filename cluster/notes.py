"""What must outlive the router and is in no replica or store: a note in Ray's own key-value table,
which lives as long as the head does. Called by cluster.drain.
"""

from __future__ import annotations

import json
from typing import Any

from ray.experimental import internal_kv

_KEY, _NAMESPACE = "drains", "kvferry"
_table: Any = internal_kv  # has no types


def read() -> dict[str, Any]:
    """The last note; empty when there is none, or no Ray here."""
    if not _table._internal_kv_initialized():
        return {}
    raw = _table._internal_kv_get(_KEY, namespace=_NAMESPACE)
    note: dict[str, Any] = json.loads(raw) if raw else {}
    return note


def write(note: dict[str, Any]) -> None:
    """In place of the last one."""
    if _table._internal_kv_initialized():
        _table._internal_kv_put(_KEY, json.dumps(note), namespace=_NAMESPACE)
