"""kvferry bench serve: the command; what it measures is in bench.serve."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated

import typer

from actors.errors import ModelUnavailable
from cluster.config import load_config
from cluster.console import fail
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
