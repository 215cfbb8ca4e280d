"""kvferry drain | undrain | restart: empty a node while it serves, take it back, replace replicas.

Speaks HTTP. Registered by `cli`.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cluster.console import console, fail
from cluster.endpoint import DEFAULT_URL, Key, Url, get, request

_POLL_S = 0.2
Timeout = Annotated[float, typer.Option(min=1, help="Seconds until a node is given up.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(drain)
    app.command()(undrain)
    app.command()(restart)


def drain(
    node: Annotated[str, typer.Argument(help="A node id of `kvferry status`.")],
    url: Url = DEFAULT_URL,
    api_key: Key = "",
    timeout: Timeout = 900.0,
) -> None:
    """Move every agent off a node, live, then close its replica. Exit code 1 if some must stay."""
    _empty(node, url, api_key, timeout)
    console.print(f"{node} is drained; `kvferry undrain {node}` takes it back into use")


def undrain(
    node: Annotated[str, typer.Argument(help="A node that was drained, or is being drained.")],
    url: Url = DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Take a node back into use."""
    request("DELETE", url, f"/v1/cluster/nodes/{node}/drain", api_key, None)
    console.print(f"{node} is in use again")


def restart(
    nodes: Annotated[list[str] | None, typer.Argument(help="Nodes, in this order.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every node, in turn.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = "",
    timeout: Timeout = 900.0,
) -> None:
    """Replace replicas one by one, each after its agents have left: no request fails."""
    if bool(nodes) == everything:
        fail("name the nodes to restart, or say --all")
    known = {n["id"]: n for n in get(url, "/v1/cluster", api_key)["nodes"] if _has_device(n)}
    chosen = sorted(known) if everything else list(nodes or ())
    for node in chosen:
        if node not in known:
            fail(f"no node {node!r} with a device; there are: {', '.join(sorted(known)) or 'none'}")
    for node in chosen:
        _empty(node, url, api_key, timeout)
        request("DELETE", url, f"/v1/cluster/nodes/{node}/drain", api_key, None)
        _wait_ready(node, known[node]["pid"], url, api_key, timeout)
        console.print(f"{node} has a new replica")


def _has_device(node: dict[str, Any]) -> bool:
    return bool(node["replica"] != "none")


def _empty(node: str, url: str, api_key: str, timeout: float) -> None:
    """Drain a node, with a bar; ends the command when it cannot be emptied."""
    path = f"/v1/cluster/nodes/{node}/drain"
    state = request("POST", url, path, api_key, None)
    deadline = time.monotonic() + timeout
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(node, total=None)
        while state["state"] == "draining":
            done = state["moved"] + len(state["failed"])
            what = f"{node}: agents" if state["left"] else f"{node}: {state['running']} turns left"
            progress.update(bar, description=what, completed=done, total=done + state["left"])
            if time.monotonic() > deadline:
                fail(f"{node} is not empty after {timeout:g} s; it is still being drained", code=1)
            time.sleep(_POLL_S)
            state = get(url, path, api_key)
    if state["state"] == "drained":
        console.print(f"{node}: {state['moved']} agents moved")
        return
    if state["state"] == "open":
        fail(f"{node} was taken back into use", code=1)
    for entry in state["failed"]:
        console.print(f"{entry['agent']}: {entry['error']}", markup=False)
    fail(f"{node}: {state['error']}; it gets no turns until `kvferry undrain {node}`", code=1)


def _wait_ready(node: str, old_pid: int | None, url: str, api_key: str, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = {n["id"]: n for n in get(url, "/v1/cluster", api_key)["nodes"]}.get(node)
        if found is not None and found["replica"] == "ready" and found["pid"] != old_pid:
            return
        time.sleep(_POLL_S)
    error = found.get("error") if found is not None else "the node left"
    fail(f"{node} has no replica after {timeout:g} s: {error or 'it is loading'}", code=1)
