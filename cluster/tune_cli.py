"""kvferry tune: what profile "auto" measures and chooses on this machine, in this process.

Replicas of `kvferry up` with `profile = "auto"` and the same settings start with the result.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from actors.errors import ModelUnavailable
from actors.models import open_profiled, served_name
from actors.tuning import PROMPT, REPLY, Profile, Trial
from cluster.config import load_config
from cluster.console import console, fail
from cluster.errors import ConfigError
from cluster.local import divided


def tune(
    model: Annotated[str | None, typer.Option(help="Path to a GGUF, pkg:// or hf://.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Replicas that share this machine.")] = None,
    slots: Annotated[int | None, typer.Option(help="Sequences per replica.")] = None,
    again: Annotated[bool, typer.Option(help="Measure, even if a result is kept.")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="A search may take so long.")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="One line for programs.")] = False,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
) -> None:
    """Measure the engine's options on this machine, and keep the best for `profile = "auto"`."""
    try:
        flags = {"model": model, "nodes": nodes, "slots": slots, "profile": "auto"}
        replica = divided(load_config(config, os.environ, flags)).replica
        engine, profile = open_profiled(replica, again=again, seconds=seconds)
        engine.close()
    except (ConfigError, ModelUnavailable) as error:
        fail(str(error))
    if profile is None:
        fail("the machine is too busy, or another replica is measuring: try again", code=1)
    if as_json:
        print(json.dumps({"tune": {"model": served_name(replica.model)} | _report(profile)}))
        return
    _print(profile, served_name(replica.model), replica.slots)


def _report(profile: Profile) -> dict[str, object]:
    report = asdict(profile)
    for trial, entry in zip(profile.trials, report["trials"], strict=True):
        entry["turn_s"] = trial.figures.turn_s if trial.figures else None
    return report


def _print(profile: Profile, model: str, slots: int) -> None:
    titles = ["threads", "flash\nattn.", "cells", "ubatch", "prefill\ntok/s", "decode\nms"]
    titles += [f"{slots} slots\nms", "a turn\ns"]
    table = Table(title=f"{model} on this machine")
    table.add_column(no_wrap=True, min_width=1)
    for title in titles:
        justify: Literal["left", "right"] = "left" if title in titles[1:3] else "right"
        table.add_column(title, justify=justify, no_wrap=True)
    measured = [trial for trial in profile.trials if trial.figures]
    rest = [trial for trial in profile.trials if not trial.figures]
    for trial in sorted(measured, key=lambda t: t.figures.turn_s if t.figures else 0.0) + rest:
        chosen = trial.options == profile.options
        table.add_row(*_row(trial, chosen), style="bold green" if chosen else "")
    console.print(table, soft_wrap=False)
    console.print(f"Measured in {profile.seconds:.1f} s.")
    for trial in profile.trials:
        if trial.note:
            console.print(f"{trial.options}: {trial.note}", markup=False)
    console.print(f"Chosen: {profile.options}: {profile.why}.")
    console.print(
        f"A turn: {PROMPT} prompt tokens behind a context, then {REPLY} of reply, half of them "
        "alone and half beside the other slots."
    )


def _row(trial: Trial, chosen: bool) -> list[str]:
    options, figures = trial.options, trial.figures
    attention = "on" if options.flash_attention else "off"
    row = [">" if chosen else "", str(options.threads), attention, options.kv_type]
    row.append(str(options.ubatch))
    if figures is None:
        return row + 4 * ["-"]
    return [
        *row,
        f"{figures.prefill_tokens_per_s:.0f}",
        f"{1000 * figures.decode_s:.1f}",
        f"{1000 * figures.batch_s:.1f}",
        f"{figures.turn_s:.2f}",
    ]


def register(app: typer.Typer) -> None:
    app.command()(tune)
