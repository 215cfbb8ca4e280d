"""kvferry demo, demo migrate, demo failover: on a running cluster; demo cross-engine: on its own.

Starts bench.demo, bench.demo_live and bench.cross_engine by import string, and imports nothing of
bench.
"""

from __future__ import annotations

import importlib
import os
from typing import Annotated

import typer

from actors.errors import ModelUnavailable
from cluster.config import load_config
from cluster.console import fail
from cluster.endpoint import DEFAULT_URL, Key, Url
from cluster.errors import ConfigError


def demo(
    context: typer.Context,
    url: Url = DEFAULT_URL,
    api_key: Key = "",
    tokens: Annotated[int, typer.Option(min=64, help="Context of each agent.")] = 1200,
) -> None:
    """Four agents, two rounds, a migration, and the death of the node that is speaking."""
    if context.invoked_subcommand is None:
        raise typer.Exit(importlib.import_module("bench.demo").run(url, api_key, tokens))


def cross_engine(
    model: Annotated[str | None, typer.Option(help="A GGUF, pkg:// or hf://.")] = None,
    turns: Annotated[int, typer.Option(min=2, max=8, help="Turns of the conversation.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="The last line is one object.")] = False,
) -> None:
    """One conversation that changes between llama.cpp and MLX at every turn, on a cluster of its
    own; what was cached, and the KL to the run that changed nothing."""
    try:
        flags = {"model": model, "nodes": 2, "engines": "llama.cpp,mlx"}
        settings = load_config(None, os.environ, flags)
        code = importlib.import_module("bench.cross_engine").run(settings, turns, as_json)
    except (ConfigError, ModelUnavailable) as error:
        fail(str(error))
    raise typer.Exit(code)


_Tokens = Annotated[int, typer.Option(min=64, help="Context of each agent.")]
_Json = Annotated[bool, typer.Option("--json", help="The last line is one object.")]


def migrate(
    url: Url = DEFAULT_URL, api_key: Key = "", tokens: _Tokens = 600, as_json: _Json = False
) -> None:
    """Three agents that move to another node while they speak, on a running cluster."""
    run = importlib.import_module("bench.demo_live").run_migrate
    raise typer.Exit(run(url, api_key, tokens, as_json))


def failover(
    url: Url = DEFAULT_URL, api_key: Key = "", tokens: _Tokens = 600, as_json: _Json = False
) -> None:
    """The node on which an agent speaks is killed; its sentence goes on. The node comes back."""
    run = importlib.import_module("bench.demo_live").run_failover
    raise typer.Exit(run(url, api_key, tokens, as_json))


def register(app: typer.Typer) -> None:
    group = typer.Typer(invoke_without_command=True)
    group.callback()(demo)
    group.command("migrate")(migrate)
    group.command("failover")(failover)
    group.command("cross-engine")(cross_engine)
    app.add_typer(group, name="demo")
