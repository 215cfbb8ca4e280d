"""Real servers for the tests of remote stores: an S3 endpoint (moto) and an OpenSSH sshd.

Both listen on the loopback address at a port the system chooses and end with the session. Imported
by the test modules that use them; fixtures there.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.require import require

BUCKET = "kvferry-test"


@contextlib.contextmanager
def s3_server() -> Iterator[dict[str, Any]]:
    """fsspec's settings for an S3 endpoint with an empty bucket."""
    for package in ("s3fs", "moto"):
        found = importlib.util.find_spec(package) is not None
        require("s3", found, f"the package {package} is not installed")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
        # What servers of this process held before is moto's still.
        httpx.post(f"{settings['endpoint_url']}/moto-api/reset", timeout=10).raise_for_status()
        import fsspec

        fsspec.filesystem("s3", **settings, skip_instance_cache=True).mkdir(BUCKET)
        yield settings
    finally:
        server.stop()


@dataclass(frozen=True)
class Sshd:
    """A running server. `settings` are fsspec's for it, host keys included; `folder` its keys'."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    settings: dict[str, Any]

    @property
    def url(self) -> str:
        return f"sftp://{getpass.getuser()}@127.0.0.1:{self.port}"

    def kill(self) -> None:
        _signal([*_descendants(self.process.pid), self.process.pid], signal.SIGKILL)

    def stop_connections(self) -> None:
        """They stay open but say no word more; new ones work."""
        _signal(_descendants(self.process.pid), signal.SIGSTOP)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _descendants(pid: int) -> list[int]:
    """Children and theirs; none where the system has no /proc to tell."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            fields = status.read_text().rsplit(")", 1)[1].split()
            parents[int(status.parent.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found[1:]


def _keygen(path: Path) -> str:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)]
    subprocess.run(command, check=True, timeout=20)
    return path.with_suffix(".pub").read_text()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_it_answers(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as sock:
            if sock.recv(4) == b"SSH-":
                return
        assert process.poll() is None, "sshd ended at once"
        assert time.monotonic() < deadline, "sshd does not answer"
        time.sleep(0.02)


@contextlib.contextmanager
def ssh_server(folder: Path, port: int | None = None) -> Iterator[Sshd]:
    """An sshd with a throw-away host key that lets this user in with a throw-away key.

    `folder` keeps the keys: a second server there, at the same `port`, is the same host.
    """
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    require("sshd", sshd is not None, "there is no sshd")
    found = importlib.util.find_spec("paramiko") is not None
    require("sshd", found, "the package paramiko is not installed")
    assert sshd is not None
    port = port or _free_port()
    if os.getuid() == 0:  # where sshd, as root, wants to lock its unprivileged part in
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    if not (folder / "host").exists():
        host_key = _keygen(folder / "host")
        (folder / "authorized").write_text(_keygen(folder / "user"))
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}")
    config = folder / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
        "Subsystem sftp internal-sftp\n"
    )
    with (folder / "log").open("ab") as log:
        command = [sshd, "-D", "-e", "-f", str(config)]
        process = subprocess.Popen(command, stderr=log)
    try:
        _wait_until_it_answers(port, process)
        settings = {
            "key_filename": str(folder / "user"),
            "known_hosts": str(folder / "known_hosts"),
            "look_for_keys": False,
            "allow_agent": False,
        }
        yield Sshd(folder, port, process, settings)
    finally:
        _signal([*_descendants(process.pid), process.pid], signal.SIGKILL)
        process.wait(timeout=10)
