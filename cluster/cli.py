"""kvferry up | status | agents | migrate | place | drain | undrain | restart | export | import
| verify | gc | tune | doctor | demo | bench.

`up` owns a local cluster; `export`, `import`, `verify`, `gc` and `agents --bytes` work on a store
(see `bundle_cli`, `store_cli`); everything else speaks HTTP to a running cluster. What a command
needs from outside this package (the ingress, the benchmarks) is started by import string.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.table import Table

from actors.engine_settings import is_fake, parse_lora
from actors.errors import ModelUnavailable
from actors.models import open_store, resolve, served_name
from cluster import (
    bench_cli,
    bundle_cli,
    demo_cli,
    doctor,
    drain_cli,
    place_cli,
    store_cli,
    tune_cli,
)
from cluster.config import ClusterConfig, load_config
from cluster.console import console, fail, fetched, size
from cluster.disks import SCHEME
from cluster.endpoint import DEFAULT_URL, Key, Url
from cluster.endpoint import get as _get
from cluster.endpoint import request as _request
from cluster.errors import ConfigError
from cluster.upkeep import Upkeep
from storage.errors import StoreUnavailable

app = typer.Typer(
    help="Serves language models to many agents and keeps, moves and restores their KV caches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_START_TIMEOUT_S = 300.0


@app.command()
def up(
    model: Annotated[str | None, typer.Option(help="Path to a GGUF, pkg:// or hf://.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Device nodes, one replica each.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    store: Annotated[str | None, typer.Option(help="Directory or URL of the store.")] = None,
    codec: Annotated[str | None, typer.Option(help="q4, k8v4, q8 or f16.")] = None,
    slots: Annotated[int | None, typer.Option(help="Sequences per replica.")] = None,
    engines: Annotated[
        str | None, typer.Option(help="Of the nodes in turn: llama.cpp,mlx.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
) -> None:
    """Start a local cluster and serve until Ctrl-C."""
    flags = {
        "model": model, "nodes": nodes, "host": host, "port": port,
        "store": store, "codec": codec, "slots": slots, "engines": engines,
    }  # fmt: skip
    settings = _settings(config, flags)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    try:
        _serve(settings, stop)
    except (ModelUnavailable, ConfigError) as error:
        fail(str(error))


def _settings(path: Path | None, flags: dict[str, Any]) -> ClusterConfig:
    """The configuration, with model, store and port tried before anything is started."""
    from cluster.local import check_port

    try:
        settings = load_config(path, os.environ, flags)
        if not is_fake(settings.replica.model):
            resolve(settings.replica.model)
            if settings.replica.lora:
                resolve(parse_lora(settings.replica.lora)[0])
        if not settings.replica.store.startswith(SCHEME):  # which is there when its nodes are
            open_store(settings.replica).probe()
        check_port(settings.http.host, settings.http.port)
    except (ConfigError, ModelUnavailable, StoreUnavailable, ValueError) as error:
        fail(str(error))
    return settings


def _serve(settings: ClusterConfig, stop: threading.Event) -> None:
    from cluster.local import LocalCluster

    url = f"http://{settings.http.host}:{settings.http.port}"
    console.print(f"Starting a head and {settings.nodes} device nodes for {settings.replica.model}")
    with LocalCluster(settings) as cluster:
        if not stop.is_set():
            cluster.serve()
        _wait_until_ready(url, stop)
        if not stop.is_set():
            _welcome(url, settings)
        store = open_store(settings.replica)
        with Upkeep(store, settings.retention, settings.gc_interval_s):
            while not stop.wait(1.0):
                for name in cluster.revive():
                    console.print(f"{name} had died: started again")
        console.print("Stopping: storing what the agents hold")
    console.print("Stopped")


def _wait_until_ready(url: str, stop: threading.Event) -> None:
    """Until every device node has a replica. Raises ModelUnavailable when none can load."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not stop.wait(0.2):
        report = httpx.get(f"{url}/v1/cluster", headers=_auth_of_environment(), timeout=30)
        if report.status_code == 401:
            return  # the operator's own keys are needed to look
        nodes = report.json().get("nodes", [])
        devices = [node for node in nodes if node["replica"] != "none"]
        if devices and all(node["replica"] == "ready" for node in devices):
            return
        errors = [node["error"] for node in devices if node.get("error")]
        if errors and len(errors) == len(devices):
            raise ModelUnavailable(f"no replica can start: {errors[0]}")
        if time.monotonic() > deadline:
            raise ModelUnavailable(f"no replica was ready after {_START_TIMEOUT_S:.0f} s")


def _auth_of_environment() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY", "")
    return {"authorization": f"Bearer {key}"} if key else {}


def _welcome(url: str, settings: ClusterConfig) -> None:
    name = served_name(settings.replica.model)
    chat = (
        f"curl -i {url}/v1/chat/completions -H 'content-type: application/json' "
        "-H 'x-session-id: demo' \\\n"
        f'  -d \'{{"model": "{name}", "messages": '
        '[{"role": "user", "content": "Why is the sea salty?"}]}\''
    )
    print(f"\n{name} is served at {url}\nAgents are kept in {settings.replica.store}\n")
    print(f"Try:\n  {chat}\n  curl {url}/v1/agents\n\nCtrl-C stops it.", flush=True)


@app.command()
def status(url: Url = DEFAULT_URL, api_key: Key = "") -> None:
    """The nodes of the cluster and what their replicas do."""
    report = _get(url, "/v1/cluster", api_key)
    table = Table("node", "replica", "pid", "engine", "agents", "running", "waiting", "pool")
    for node in report["nodes"]:
        table.add_row(
            node["id"], node["replica"], str(node["pid"] or ""), node["engine"] or "",
            str(node["agents"]), str(node["running"]), str(node["waiting"]),
            size(node["bytes"]["pool"]),
        )  # fmt: skip
    console.print(table)
    for node in report["nodes"]:
        if node.get("fetching"):
            console.print(f"{node['id']}: {fetched(node['fetching'])}")
        if node.get("error"):
            console.print(f"{node['id']}: {node['error']}")


@app.command()
def agents(
    url: Url = DEFAULT_URL,
    api_key: Key = "",
    by_bytes: Annotated[
        bool, typer.Option("--bytes", help="Read the store itself: bytes per agent and tenant.")
    ] = False,
    store: store_cli.Store = None,
    config: store_cli.ConfigFile = None,
) -> None:
    """The agents, where each lives and what it holds."""
    if by_bytes:
        store_cli.agents_by_bytes(store, config)
    if store is not None or config is not None:
        fail("--store and --config go with --bytes")
    table = Table("agent", "node", "state", "epoch", "tokens", "branches", "RAM", "stored")
    for agent in _get(url, "/v1/agents", api_key)["data"]:
        held = agent["bytes"]
        table.add_row(
            agent["id"], agent["node"] or "-", agent["state"], str(agent["epoch"]),
            str(agent["tokens"]), str(agent["branches"]), size(held["ram"]), size(held["store"]),
        )  # fmt: skip
    console.print(table)


@app.command()
def migrate(
    agent: Annotated[str, typer.Argument(help="The agent's id.")],
    target: Annotated[str | None, typer.Argument(help="As --to.")] = None,
    to: Annotated[
        str | None, typer.Option(help="The node to move it to; without, the cheapest other.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Move an agent to another node."""
    if target is not None and to is not None and target != to:
        fail(f"move it to {target}, or to {to}? Name one node")
    target = to or target
    done = _request("POST", url, f"/v1/agents/{agent}/migrate", api_key, {"target": target})
    console.print(
        f"{done['id']}: {done['source'] or 'store'} -> {done['target']}, epoch {done['epoch']}, "
        f"frozen for {1000 * done['freeze_s']:.0f} of {1000 * done['total_s']:.0f} ms, "
        f"{done['rows']} rows and {size(done['bytes'])} shipped in rounds: {done['rounds']}"
    )


app.command("export")(bundle_cli.export)
app.command("import")(bundle_cli.import_)
app.command("place")(place_cli.place)

drain_cli.register(app)
store_cli.register(app)
tune_cli.register(app)
doctor.register(app)
demo_cli.register(app)
bench_cli.register(app)


def main() -> None:
    app()
