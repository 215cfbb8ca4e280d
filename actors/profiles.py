"""Measured profiles in files: one per model, machine and settings; and who may measure.

A file that is broken, of another machine or of another version is no profile: it is measured again
and overwritten. Replicas of one machine that start together measure one after another, under a lock
that ends with its holder; the second finds the first one's file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actors.engines.options import WAITING
from actors.tuning import Profile, from_json

logger = logging.getLogger(__name__)
_VERSION = 1
_POLL_S = 0.05
_MAX_BYTES = 1 << 16  # of a file

Key = Mapping[str, Any]  # of JSON values: everything that changes the figures


def default_folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "kvferry" / "profiles"


def machine() -> dict[str, Any]:
    """What the figures depend on of this machine."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        # how threads wait, which is told to OpenMP before it starts
        "waiting": [os.environ.get(name, "").lower() for name in WAITING],
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return _mac("machdep.cpu.brand_string") or platform.processor() or platform.machine()
    names = ("model name", "CPU implementer", "CPU part", "CPU variant")
    found = (re.split(r"\s*:\s*", line, maxsplit=1) for line in lines)
    seen = dict.fromkeys(x[1] for x in found if len(x) == 2 and x[0] in names)
    return ", ".join(seen) or platform.machine()


def physical_cores() -> int:
    """Cores without their hyper-threads; of a Mac those for performance. All, if unknown."""
    siblings = set()
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"):
        with contextlib.suppress(OSError):
            siblings.add(path.read_text())
    count = len(siblings) or int(_mac("hw.perflevel0.physicalcpu") or 0)
    return count or os.cpu_count() or 1


def _mac(name: str) -> str:
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode().strip()


def load(folder: Path, key: Key) -> Profile | None:
    """None if there is none, or what is there is no profile of this key."""
    path = _path(folder, key)
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("cannot read %s: %s", path, error)
        return None
    try:
        raw = json.loads(text)
        if raw["version"] != _VERSION or raw["key"] != dict(key):
            return None
        return from_json(raw["profile"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning("%s is no profile and is measured again: %r", path, error)
        return None


def save(folder: Path, key: Key, profile: Profile) -> None:
    """Whole or not at all. A place that cannot be written costs the next start its seconds."""
    path = _path(folder, key)
    text = json.dumps({"version": _VERSION, "key": dict(key), "profile": asdict(profile)}, indent=1)
    temporary = path.with_suffix(f".{secrets.token_hex(4)}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        logger.warning("cannot keep the profile in %s: %s", path, error)


def _path(folder: Path, key: Key) -> Path:
    text = json.dumps(dict(key), sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


@contextlib.contextmanager
def alone(folder: Path, timeout_s: float) -> Iterator[bool]:
    """Inside, no other process of this machine measures; False if one still does after
    `timeout_s`. Where nothing can be written or locked there is no lock, and True."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]", "_", platform.node()) or "machine"
        file = (folder / f"{name}.lock").open("a")
    except OSError as error:
        logger.warning("measuring without a lock: %s", error)
        yield True
        return
    with file:
        yield _locked(file.fileno(), time.monotonic() + timeout_s)


def _locked(descriptor: int, until: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:  # somebody measures
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL_S)
        except OSError as error:  # of a file system without locks
            logger.warning("measuring without a lock: %s", error)
            return True
