"""kvferry bench serve | migrate | failover | ttft | storage | residency | place | mlx.

Registered by cluster.cli; the benchmarks are started by import string.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from actors.errors import ModelUnavailable
from cluster.config import load_config
from cluster.console import fail
from cluster.endpoint import Key
from cluster.errors import ConfigError


def serve(
    model: Annotated[str | None, typer.Option(help="Path to a GGUF, pkg:// or hf://.")] = None,
    peer: Annotated[str | None, typer.Option(help="llama-server=PATH: the other side.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="Of each engine; 0: all cores.")
    ] = None,
    parts: Annotated[str, typer.Option(help="What to measure.")] = "one,together,crowd,overhead",
    runs: Annotated[int | None, typer.Option(min=1, help="Runs of each figure.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: a trial.")] = False,
    json: Annotated[Path | None, typer.Option(help="A file for the figures.")] = None,
) -> None:
    """Speed over HTTP, on clusters of its own; side by side with llama-server if one is given."""
    _run("serve", {"model": model, "threads": threads}, peer, parts.split(","), runs, quick, json)


def migrate(
    model: Annotated[str | None, typer.Option(help="Path to a GGUF, pkg:// or fake://.")] = None,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1024,4096,7680",
    runs: Annotated[int, typer.Option(min=1, help="Migrations per context length.")] = 5,
    url: Annotated[str | None, typer.Option(help="A running cluster, else one of its own.")] = None,
    mbit: Annotated[
        float | None, typer.Option(min=0.001, help="To what that cluster's links are limited.")
    ] = None,
    link: Annotated[
        str, typer.Option(help="100mbit,1gbit,unlimited: hosts of their own; needs root.")
    ] = "",
    api_key: Key = "",
) -> None:
    """Agents that move in the middle of a reply: freeze, the client's largest gap, total time."""
    if url is not None and model is not None:
        fail("--model and --url: a running cluster has its model")
    if mbit is not None and url is None:
        fail("--mbit: what the links of --url are limited to; --link limits those of a new cluster")
    if link and url is not None:
        fail("--link and --url: the links of a running cluster are what they are")
    chosen = lengths(contexts)
    try:
        settings = load_config(None, os.environ, {"model": model, "nodes": 2})
        if link:
            code = importlib.import_module("bench.links").run(settings, chosen, runs, link)
        else:
            bench = importlib.import_module("bench.migrate")
            code = bench.run(settings, chosen, runs, url, api_key, mbit)
    except (ConfigError, ModelUnavailable) as error:
        fail(str(error))
    raise typer.Exit(code)


def lengths(text: str) -> list[int]:
    """Numbers with commas between them; else the command ends."""
    try:
        return [int(length) for length in text.split(",")]
    except ValueError:
        fail(f"--contexts {text!r}: wants whole numbers with commas between them")


def failover(
    model: Annotated[str | None, typer.Option(help="Path to a GGUF, pkg:// or fake://.")] = None,
    kills: Annotated[
        str, typer.Option(help="process, node; host needs root: network namespaces.")
    ] = "process,node",
    tokens: Annotated[int, typer.Option(min=64, help="Context of the agent.")] = 4096,
    runs: Annotated[int, typer.Option(min=1, help="Of each kill, on each link.")] = 3,
    link: Annotated[
        str, typer.Option(help="100mbit,1gbit,unlimited: hosts of their own; needs root.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The last line is one object.")] = False,
) -> None:
    """Replicas that die in the middle of a reply: detection, next token, tokens prefilled again."""
    chosen = list(dict.fromkeys(kills.split(",")))
    if unknown := [kill for kill in chosen if kill not in ("process", "node", "host")]:
        fail(f"--kills {unknown[0]!r}: wants process, node or host")
    _run("failover", {"model": model, "nodes": 2}, chosen, tokens, runs, link, as_json=as_json)


def ttft(
    model: Annotated[str | None, typer.Option(help="Path to a GGUF, pkg:// or hf://.")] = None,
    nodes: Annotated[int, typer.Option(help="Device nodes of the cluster it starts.")] = 2,
    runs: Annotated[int, typer.Option(min=1, help="Agents per context length.")] = 5,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1024,2048,4096",
    text: Annotated[Path | None, typer.Option(help="A text to fill contexts with.")] = None,
) -> None:
    """Time to first token: cold, hot, warm, after a migration, after a restart; on a cluster of its
    own."""
    chosen = lengths(contexts)
    _run("ttft", {"model": model, "nodes": nodes}, chosen, runs, text)


def storage(
    model: Annotated[str | None, typer.Option(help="Path to a GGUF, pkg:// or hf://.")] = None,
    codec: Annotated[str | None, typer.Option(help="One of the codecs.")] = None,
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of the restored agent.")] = 4096,
    runs: Annotated[int, typer.Option(min=1, help="Restores.")] = 5,
    agents: Annotated[bool, typer.Option(help="Measure a store of 10,000 agents, too.")] = True,
) -> None:
    """Codecs, restore, bytes per turn, many agents; in this process, without a cluster."""
    _run("storage", {"model": model, "codec": codec}, tokens, runs, agents)


def residency(
    model: Annotated[str | None, typer.Option(help="Path to a GGUF, pkg:// or hf://.")] = None,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens.")] = "1024,4096",
    runs: Annotated[int, typer.Option(min=1, help="Runs of each measurement.")] = 3,
) -> None:
    """Cells of float16 against cells of q4_1 (kv_type): memory, speed, restore, KL."""
    chosen = lengths(contexts)
    _run("residency", {"model": model}, chosen, runs)


def place(
    replicas: Annotated[int, typer.Option(min=2, max=1000, help="Of the throughput.")] = 100,
    agents: Annotated[int, typer.Option(min=1, help="Of the throughput.")] = 100_000,
    seconds: Annotated[float, typer.Option(min=0.1, help="To place for.")] = 3.0,
    trace: Annotated[
        Path | None, typer.Option(help="A Mooncake trace; else a synthetic one.")
    ] = None,
) -> None:
    """Placements per second, whether decisions are right, and TTFT against simpler routers."""
    try:
        code = importlib.import_module("bench.place").run(replicas, agents, seconds, trace)
    except ConfigError as error:
        fail(str(error))
    raise typer.Exit(code)


def mlx(
    model: Annotated[
        str | None, typer.Option(help="A GGUF or MLX directory, pkg:// or hf://.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, max=100, help="Runs of each measurement.")] = 5,
) -> None:
    """The MLX engine on cells of q4: a batch against single runs, restore against prefill."""
    _run("mlx", {"model": model}, runs)


def _run(name: str, overrides: dict[str, Any], *arguments: Any, **options: Any) -> NoReturn:
    """`bench.<name>.run` with the settings, and its exit code."""
    try:
        settings = load_config(None, os.environ, overrides)
        code = importlib.import_module(f"bench.{name}").run(settings, *arguments, **options)
    except (ConfigError, ModelUnavailable) as error:
        fail(str(error))
    raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    bench = typer.Typer(help="Measure what the README claims.", no_args_is_help=True)
    app.add_typer(bench, name="bench")
    for command in (serve, migrate, failover, ttft, storage, residency, place, mlx):
        bench.command()(command)
