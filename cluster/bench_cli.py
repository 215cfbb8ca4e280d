"""kvferry bench serve | migrate | failover. Registered by cluster.cli; benchmarks are started by
import string."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated

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
    try:
        settings = load_config(None, os.environ, {"model": model, "threads": threads})
        run = importlib.import_module("bench.serve").run
        code = run(settings, peer, parts.split(","), runs, quick, json)
    except (ConfigError, ModelUnavailable) as error:
        fail(str(error))
    raise typer.Exit(code)


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
            bench = importlib.import_module("bench.links")
            code = bench.run(settings, chosen, runs, bench.parse_links(link))
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
    runs: Annotated[int, typer.Option(min=1, help="Of each kill.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="The last line is one object.")] = False,
) -> None:
    """Replicas that die in the middle of a reply: detection, next token, tokens prefilled again."""
    chosen = list(dict.fromkeys(kills.split(",")))
    if unknown := [kill for kill in chosen if kill not in ("process", "node", "host")]:
        fail(f"--kills {unknown[0]!r}: wants process, node or host")
    try:
        settings = load_config(None, os.environ, {"model": model, "nodes": 2})
        run = importlib.import_module("bench.failover").run
        code = run(settings, chosen, tokens, runs, as_json=as_json)
    except (ConfigError, ModelUnavailable) as error:
        fail(str(error))
    raise typer.Exit(code)
