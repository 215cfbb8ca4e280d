"""kvferry bench mlx: what the MLX engine does on this machine. Registered by `cli`.

Starts bench.mlx by import string: nothing here imports bench.
"""

from __future__ import annotations

import importlib
import os
from typing import Annotated

import typer

from actors.errors import ModelUnavailable
from cluster.config import load_config
from cluster.console import fail
from cluster.errors import ConfigError


def mlx(
    model: Annotated[
        str | None, typer.Option(help="A GGUF or MLX directory, pkg:// or hf://.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, max=100, help="Runs of each measurement.")] = 5,
) -> None:
    """The MLX engine on cells of q4: a batch against single runs, restore against prefill."""
    try:
        settings = load_config(None, os.environ, {"model": model})
        code = importlib.import_module("bench.mlx").run(settings, runs)
    except (ConfigError, ModelUnavailable) as error:
        fail(str(error))
    raise typer.Exit(code)


def register(bench: typer.Typer) -> None:
    bench.command()(mlx)
