"""Hosts of their own on one machine: network namespaces, a bridge, limited links, Ray in each.

    store ──┐
    head  ──┤ bridge, in a namespace of its own ├── a, b, … : device nodes, `ray start` in each
            └───────────────────────────────────┘

Every host has an address, a link that can be slowed, cut and healed, and its own directories.
Nothing of it is reachable from outside: clients come through a relay that listens on the loopback
address. Needs root and iproute2; the tests skip without them, and say so. Everything a host started
is ended with it, by process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from storage.card import CacheCard, decode_card
from tests.clusters import ROOT, START, WAIT, Endpoint, alive, until
from tests.require import require
from tests.s3_proxy import Faults
from tests.servers import BUCKET

_SUBNET = "10.77.0"
_GCS, _HTTP, _S3, _REDIS = 6379, 8000, 5000, 6390
_RELAY = """
import asyncio, socket, sys
async def pump(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()
async def serve(reader, writer):
    try:
        there, back = await asyncio.open_connection(sys.argv[2], int(sys.argv[3]))
    except OSError:
        writer.close()
        return
    await asyncio.gather(pump(reader, back), pump(there, writer))
async def main():
    listening = socket.socket(fileno=int(sys.argv[1]))
    server = await asyncio.start_server(serve, sock=listening)
    await server.serve_forever()
asyncio.run(main())
"""


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


@dataclass
class Host:
    """One namespace, `ns`, its address, and the directory that is its disk."""

    name: str
    ns: str
    switch: str  # the bridge's namespace
    port: str  # its end of the link, there
    address: str
    disk: Path
    prefix: list[str] = field(default_factory=list)  # of every command on it
    own: dict[str, str] = field(default_factory=dict)  # its environment's
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, command: list[str], environment: dict[str, str], pass_fds: tuple[int, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """Run a command on this host; its output goes to `<disk>/out`."""
        with (self.disk / "out").open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.ns, *self.prefix, *command],
                cwd=self.disk,
                env=environment | self.own,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    @property
    def output(self) -> str:
        return (self.disk / "out").read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that run on this host now."""
        found = []
        for pid in _ip("netns", "pids", self.ns).split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def process(self, name: str) -> psutil.Process:
        """The one whose command begins with `name`, such as ray::ModelReplica."""
        return next(p for p in self.processes() if "".join(p.cmdline()[:1]).startswith(name))

    @property
    def raylet(self) -> psutil.Process:
        return next(p for p in self.processes() if p.name() == "raylet")

    def hides(self, folder: Path) -> None:
        """What starts from now on finds nothing in a directory of this machine, and has a user's
        cache of its own: `ip netns exec` gives every command its own mounts."""
        self.prefix = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]
        self.own = {"XDG_CACHE_HOME": f"{self.disk}/cache"}

    @property
    def received(self) -> int:
        """Bytes that came over its link so far."""
        return self._traffic("rx")

    @property
    def sent(self) -> int:
        return self._traffic("tx")

    def _traffic(self, way: str) -> int:
        link = json.loads(_ip("-n", self.ns, "-j", "-s", "link", "show", "eth0"))[0]
        return int(link["stats64"][way]["bytes"])

    # ---- what can happen to it

    def cut(self) -> None:
        """The link is down; its processes live on."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def heal(self) -> None:
        _ip("-n", self.switch, "link", "set", self.port, "up")

    def limit(self, mbit: float) -> None:
        """The link's rate, both ways; 0: unlimited."""
        for namespace, device in ((self.switch, self.port), (self.ns, "eth0")):
            tc = ["tc", "-n", namespace, "qdisc"]
            subprocess.run([*tc, "del", "dev", device, "root"], capture_output=True, timeout=20)
            if mbit:
                rate = ["tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "100ms"]
                subprocess.run([*tc, "add", "dev", device, "root", *rate], check=True, timeout=20)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Everything on it, at once."""
        while left := [p for p in self.processes() if alive(p)]:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=0.2)
        for process in self.started:
            process.wait(WAIT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@dataclass
class Hosts(Endpoint):
    """A cluster on hosts of its own; `url` is the relay's."""

    hosts: dict[str, Host]
    environment: dict[str, str]
    folder: Path
    devices: list[str] = field(default_factory=list)  # hosts that have joined

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    @property
    def faults(self) -> Faults:
        """Of the store."""
        return Faults(self.hosts["store"].disk / "control")

    def answers(self) -> bool:
        """Whether the ingress is there."""
        with contextlib.suppress(httpx.TransportError):
            return self.get("/v1/cluster").status_code == 200
        return False

    def join(self, name: str) -> None:
        """Start the device node of a host, or start it again."""
        host = self.hosts[name]
        if name not in self.devices:
            self.devices.append(name)
        resources = json.dumps({"kvferry_device": 1})
        labels = f"kvferry.io/node={name}"
        address = f"{self.hosts['head'].address}:{_GCS}"
        ray = [*_ray(host), f"--address={address}", f"--resources={resources}"]
        host.start([*ray, f"--labels={labels}", "--num-cpus=1"], self.environment)

    def rejoin(self, name: str) -> None:
        """Start a host's device node again if its raylet is dead, whatever of it is left."""
        host = self.hosts[name]
        if host.started[-1].poll() is not None:  # `ray start` ends with its raylet
            host.kill()
            self.join(name)

    def restore(self) -> None:
        """All is well again: links, processes, the store, a ready replica on every device."""
        self.faults.release()
        self.faults.refuse(0)
        for host in self.hosts.values():
            host.heal()
            host.wake()

        def whole() -> bool:
            for name in self.devices:
                self.rejoin(name)
            nodes = self.nodes() if self.answers() else {}
            ready = {name for name, node in nodes.items() if node["replica"] == "ready"}
            return ready >= set(self.devices) and all(
                nodes[name]["store_answers"] for name in self.devices
            )

        until(whole, "a ready replica on every host", START)

    def device_of(self, node: str) -> psutil.Process:
        """The replica's process on a host."""
        return self.hosts[node].process("ray::ModelReplica")

    # ---- what the store holds

    def cards(self, session: str) -> list[tuple[str, CacheCard]]:
        """(the agent's folder, card) of each in the store, oldest first."""
        found = []
        for path, raw in sorted(self.faults.objects(r"agents/agents/.*\.safetensors$").items()):
            card = decode_card(raw, path)
            if card.agent.session == session:
                found.append((path.split("/")[-2], card))
        return found

    def check_owner(self, session: str, node: str) -> None:
        """The one that answered is the one that the store and the registry name; nobody else has
        written in an epoch."""
        record = self.agent(session)
        assert record is not None
        assert record["node"] == node
        by_epoch: dict[int, set[tuple[str, str, str]]] = {}
        for _, card in self.cards(session):
            writer = (card.owner.node, card.owner.incarnation, card.nonce)
            by_epoch.setdefault(card.epoch, set()).add(writer)
        assert all(len(writers) == 1 for writers in by_epoch.values()), by_epoch
        newest = max(by_epoch)
        assert newest == record["epoch"]
        assert {owner for owner, _, _ in by_epoch[newest]} == {node}


def _ray(host: Host) -> list[str]:
    return [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
        f"--node-ip-address={host.address}", f"--temp-dir={host.disk}/ray",
        f"--object-store-memory={128 << 20}",
    ]  # fmt: skip


def _require() -> None:
    able = os.geteuid() == 0 and all(map(shutil.which, ("ip", "tc")))
    require("netns", able, "network namespaces need root and iproute2")
    probe = subprocess.run(["ip", "netns", "add", f"kvf-probe-{os.getpid()}"], capture_output=True)
    if probe.returncode == 0:
        _ip("netns", "del", f"kvf-probe-{os.getpid()}")
    require("netns", probe.returncode == 0, f"no network namespaces: {probe.stderr.decode()}")


@contextlib.contextmanager
def network(names: list[str], folder: Path) -> Iterator[dict[str, Host]]:
    """Hosts that see each other and nobody else."""
    _require()
    tag = f"kvf{os.getpid()}"
    switch = f"{tag}-switch"
    hosts: dict[str, Host] = {}
    _ip("netns", "add", switch)
    try:
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number, name in enumerate(names, 10):
            ns, port, address = f"{tag}-{name}", f"port{number}", f"{_SUBNET}.{number}"
            disk = folder / name
            disk.mkdir(parents=True)
            _ip("netns", "add", ns)
            hosts[name] = Host(name, ns, switch, port, address, disk)
            _ip("-n", ns, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch)  # fmt: skip  # noqa: E501
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", ns, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", ns, "link", "set", "eth0", "up")
            _ip("-n", ns, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts.values():
            host.kill()
            _ip("netns", "del", host.ns)
        _ip("netns", "del", switch)


@contextlib.contextmanager
def cluster(
    devices: list[str],
    spares: Sequence[str] = (),
    ingresses: int = 1,
    redis: bool = False,
    **settings: Any,
) -> Iterator[Hosts]:
    """A head with the ingress, an S3 store on a host of its own, and a device node per name.
    `spares`: hosts that can join later; `redis`: keeps Ray's tables, on the store's host."""
    # Not pytest's tmp_path: the path of a Unix socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="kvh"))
    try:
        with network(["store", "head", *devices, *spares], folder) as hosts:
            running = Hosts("", hosts, _environment(hosts, folder, settings), folder)
            _start_store(running)
            if redis:
                _start_redis(running)
            _start_head(running, ingresses)
            for name in devices:
                running.join(name)
            with _relay(running) as running.url:
                until(running.answers, "the ingress", START)
                running.restore()  # on a busy machine `ray start` may give up
                yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(hosts: dict[str, Host], folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("KVFERRY_", "RAY_"))}
    given = {"store": f"s3://{BUCKET}/agents", "local": folder / "local", "rebalance": 0} | settings
    return kept | {
        **{f"KVFERRY_{name}".upper(): str(value) for name, value in given.items()},
        "FSSPEC_S3_ENDPOINT_URL": f"http://{hosts['store'].address}:{_S3}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
        "RAY_ADDRESS": f"{hosts['head'].address}:{_GCS}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "PYTHONPATH": str(ROOT),
    }


def _start_store(running: Hosts) -> None:
    host = running["store"]
    command = ["-m", "tests.s3_proxy", host.address, str(_S3), str(host.disk / "control")]
    process = host.start([sys.executable, *command], running.environment)
    until(lambda: "ready" in host.output or process.poll() is not None, "the store")
    assert process.poll() is None, host.output
    bucket = f"import fsspec; fsspec.filesystem('s3').mkdir('{BUCKET}')"
    assert host.start([sys.executable, "-c", bucket], running.environment).wait(WAIT) == 0


def _start_redis(running: Hosts) -> None:
    host = running["store"]
    listens = ["--bind", host.address, "--port", str(_REDIS), "--protected-mode", "no"]
    keeps = ["--save", "", "--dir", str(host.disk)]
    host.start(["redis-server", *listens, *keeps], running.environment)
    until(lambda: "Ready to accept connections" in host.output, "Redis")
    running["head"].own["RAY_REDIS_ADDRESS"] = f"{host.address}:{_REDIS}"


def _start_head(running: Hosts, ingresses: int) -> None:
    host = running["head"]
    ray = [*_ray(host), "--head", f"--port={_GCS}", "--num-cpus=0", "--include-dashboard=false"]
    environment = {k: v for k, v in running.environment.items() if k != "RAY_ADDRESS"}
    process = host.start(ray, environment)
    until(
        lambda: "Ray runtime started" in host.output or process.poll() is not None,
        "the head",
        START,
    )
    assert process.poll() is None, host.output
    config = host.disk / "serve.json"
    config.write_text(
        json.dumps(
            {
                "proxy_location": "HeadOnly",
                "http_options": {"host": host.address, "port": _HTTP},
                "applications": [
                    {
                        "name": "kvferry",
                        "import_path": "serve_app:app",
                        "route_prefix": "/",
                        "deployments": [{"name": "ingress", "num_replicas": ingresses}],
                    }
                ],
            }
        )
    )
    serve = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    host.start(serve, running.environment)


@contextlib.contextmanager
def _relay(running: Hosts) -> Iterator[str]:
    """A loopback address outside whose connections go to the ingress: a socket that listens is of
    the namespace it was made in, those that a process makes are of its own."""
    host = running["head"]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        command = [sys.executable, "-c", _RELAY, str(listening.fileno()), host.address, str(_HTTP)]
        process = host.start(command, running.environment, pass_fds=(listening.fileno(),))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            process.kill()
            process.wait(WAIT)
