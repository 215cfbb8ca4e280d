"""A local cluster: a head and several device nodes on one machine, one raylet each.

What `kvferry up` and the tests start. The cores are divided over the replicas. A device node that
dies is started again under its name.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from cluster.errors import ConfigError

logger = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 128 << 20  # per node: streams and calls are small
_FLUSH_TIMEOUT_S = 20.0
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # Ray listens on the machine's address, too
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # macOS: more than one node
    "RAY_BACKEND_LOG_LEVEL": "error",  # a node that dies is news of one line, and it is ours
    # What runs beside the engine's threads costs them as much time: seldomer than by default.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # ten times a second costs 3 % of a core
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "RAY_memory_monitor_refresh_ms": "1000",
    # What a piece of a stream costs Serve's proxy and the ingress: half of it with these.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # What nobody asks this cluster for, 2 % of a core: its own metrics, events and tables of tasks.
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "SCAN_EVENT_DIR_INTERVAL_SECONDS": "60",
    "RAY_health_check_period_ms": "1000",  # a dead node is noticed in 5 s; the default takes 15
}
# Two processes less: nothing scales this cluster, nobody reads its workers' logs from a terminal.
_HEAD = {"include_dashboard": False, "no_monitor": True, "include_log_monitor": False}


def divided(config: ClusterConfig) -> ClusterConfig:
    """The config with the machine's cores divided over its replicas, unless they are set."""
    if config.replica.threads or config.replica.cores:
        return config
    share = max(1, (os.cpu_count() or 1) // config.nodes)
    if config.replica.profile == "auto":  # which may take fewer threads
        return replace(config, replica=replace(config.replica, cores=share))
    return replace(config, replica=replace(config.replica, threads=share))


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when nothing can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error


class LocalCluster:
    """Ray nodes that this process owns; use as a context manager."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = divided(config)
        if config.replica.share_model == "auto":  # all nodes see this machine's files
            replica = replace(self.config.replica, share_model="off")
            self.config = replace(self.config, replica=replica)
        self._cluster: Any = None
        self._nodes: dict[str, Any] = {}
        self._dead: dict[str, str] = {}  # name -> Ray's id of the node that died

    def __enter__(self) -> LocalCluster:
        os.environ.update(_ENVIRONMENT)
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, **_HEAD} | _node_arguments("head")
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for index in range(self.config.nodes):
            self._add(f"node-{index + 1}")
        ray.init(
            address=self._cluster.address,
            namespace="kvferry",
            log_to_driver=False,
            configure_logging=False,
        )

    def _add(self, name: str) -> None:
        arguments = _node_arguments(name)
        if engines := self.config.engines.split(",") if self.config.engines else []:
            number = int(name.removeprefix("node-")) - 1
            arguments["labels"]["kvferry.io/engine"] = engines[number % len(engines)]
        self._nodes[name] = self._cluster.add_node(
            num_cpus=1, resources={"kvferry_device": 1}, **arguments
        )

    def serve(self) -> None:
        """Start the HTTP ingress; returns when it answers."""
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        http = self.config.http
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": http.host, "port": http.port},
            logging_config={"log_level": "WARNING"},
        )
        build_app = importlib.import_module("serve_app").build_app
        serve.run(build_app(self.config), name="kvferry", route_prefix="/")

    def revive(self) -> list[str]:
        """Start device nodes again whose raylet has died; returns the names that are back.

        A node comes back once Ray has noticed the death: two living nodes cannot share a name.
        """
        import ray

        for name in [name for name, node in self._nodes.items() if node.dead_processes()]:
            node = self._nodes.pop(name)
            self._cluster.remove_node(node, allow_graceful=False)
            self._dead[name] = node.node_id
        if not self._dead:
            return []
        list_nodes: Any = ray.nodes  # has no types
        alive = {entry["NodeID"] for entry in list_nodes() if entry["Alive"]}
        back = [name for name, node_id in self._dead.items() if node_id not in alive]
        for name in back:
            del self._dead[name]
            self._add(name)
        return back

    def close(self) -> None:
        """Store what the replicas hold, then stop everything this process started."""
        import ray

        with _logged("storing what the agents hold"):
            if ray.is_initialized():
                router = ray.get_actor("router", namespace="kvferry")
                ray.get(router.flush.remote(), timeout=_FLUSH_TIMEOUT_S)
        with _logged("leaving the cluster"):
            ray.shutdown()
        with _logged("stopping the nodes"):
            if self._cluster is not None:
                self._cluster.shutdown()

    def __exit__(self, *_: object) -> None:
        self.close()


def _node_arguments(name: str) -> dict[str, Any]:
    return {
        "object_store_memory": _OBJECT_STORE_BYTES,
        "labels": {"kvferry.io/node": name},
    }


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """A step of the shutdown: one that fails does not keep the next from running."""
    try:
        yield
    except Exception as error:
        logger.warning("%s failed: %s", what, error)
