"""SIGKILL of a device node of this machine: its raylet and the replica that the raylet started.

Refuses, with a reason, whatever is not plainly a Ray node that runs here: process ids come from a
report, and the report may be another machine's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from typing import Any


class KillRefused(Exception):
    """Nothing was killed, and why."""


def check_node(node: Any) -> None:
    """`node` is an entry of /v1/cluster. Raises KillRefused unless it may be killed."""
    name, raylet, replica = node["id"], node["raylet_pid"], node["pid"]
    if not raylet or not replica:
        raise KillRefused(f"{name} has no replica")
    if not _is_local(node["address"]):
        raise KillRefused(f"{name} ({node['address']}) is not on this machine")
    _, command = _process(raylet)
    if command != "raylet":
        raise KillRefused(f"process {raylet} on this machine is no raylet but {command!r}")
    parent, command = _process(replica)
    if parent != raylet:
        raise KillRefused(f"process {replica} ({command!r}) was not started by raylet {raylet}")


def kill_node(node: Any) -> None:
    """As a power cut would: no process of the node says goodbye. Raises KillRefused."""
    check_node(node)
    try:
        for pid in (node["raylet_pid"], node["pid"]):
            os.kill(pid, signal.SIGKILL)
    except PermissionError as error:
        raise KillRefused(f"{node['id']} belongs to another user") from error
    except ProcessLookupError:
        return  # the replica went with its raylet


def _is_local(address: str) -> bool:
    """Only an address of this machine can be bound to."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _process(pid: int) -> tuple[int, str]:
    """(parent, command name). Raises KillRefused when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            before, _, after = file.read().rpartition(")")
        return int(after.split()[1]), before.partition("(")[2]
    except FileNotFoundError:
        pass  # no such process, or no /proc
    ps = ["ps", "-o", "ppid=,comm=", "-p", str(pid)]
    try:
        found = subprocess.run(ps, capture_output=True, text=True, check=True).stdout.split(None, 1)
    except (OSError, subprocess.CalledProcessError) as error:
        raise KillRefused(f"there is no process {pid} on this machine") from error
    return int(found[0]), os.path.basename(found[1].strip())
