"""kvferry doctor: whether this machine, with this configuration, can serve. Starts nothing.

One line per check, each ok, warn or fail with what to do; exits with 1 when one fails. What a
replica needs is checked in actors.checks, Ray and the ports here. Registered by `cli`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from actors import checks
from actors.checks import Check
from actors.engine_settings import engine_of, is_fake
from actors.errors import ModelUnavailable
from actors.models import resolve
from cluster.config import ClusterConfig, load_config
from cluster.console import console, fail
from cluster.errors import ConfigError
from cluster.local import check_port

_RAY, _PYTHON = (2, 59), ((3, 11), (3, 13))
_OSX = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    model: Annotated[str | None, typer.Option(help="Path to a GGUF, pkg:// or hf://.")] = None,
    store: Annotated[str | None, typer.Option(help="Directory or URL of the store.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file of settings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line for programs.")] = False,
) -> None:
    """Check this machine, the model and the store: one line each; exits with 1 if one fails."""
    try:
        settings = load_config(config, os.environ, {"model": model, "store": store})
    except ConfigError as error:
        fail(str(error))
    found = []
    for check in examine(settings):
        found.append(check)
        if not as_json:
            _print(check)
    failed = sum(check.status == "fail" for check in found)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}))
    else:
        console.print(f"{failed} of {len(found)} checks failed" if failed else "Nothing would fail")
    raise typer.Exit(1 if failed else 0)


def _print(check: Check) -> None:
    todo = f" ({check.todo})" if check.todo else ""
    console.print(f"{check.status:<4}", style=_COLOURS[check.status], end=" ")
    console.print(f"{check.name}: {check.text}{todo}", markup=False)


def examine(config: ClusterConfig, environment: Mapping[str, str] = os.environ) -> Iterator[Check]:
    """All checks, the quick ones first."""
    yield check_python()
    yield from check_ray(environment, sys.platform)
    yield check_http_port(config)
    yield from checks.check_build(_engine(config))
    keys = checks.check_keys(config.replica)
    yield from keys
    if all(check.status != "fail" for check in keys):
        yield from checks.check_store(config.replica)
    yield checks.check_local(config.replica)
    yield from checks.check_model(config.replica)


def _engine(config: ClusterConfig) -> str:
    """ "" where the model's own check will say why there is none."""
    if is_fake(config.replica.model):
        return "fake"
    try:
        return engine_of(config.replica, resolve(config.replica.model))
    except ModelUnavailable:
        return ""


def check_python() -> Check:
    found = sys.version_info[:2]
    text = f"Python {'.'.join(map(str, sys.version_info[:3]))}; all nodes need the same minor"
    if not _PYTHON[0] <= found <= _PYTHON[1]:
        return Check("python", "warn", text, "kvferry is tested with Python 3.11 to 3.13")
    return Check("python", "ok", text)


def check_ray(environment: Mapping[str, str], platform: str) -> Iterator[Check]:
    """Version, what macOS needs, and who may speak to the cluster. Does not import Ray."""
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        yield Check("ray", "fail", "ray is not installed", "pip install 'ray[serve]'")
        return
    text = f"ray {version}; all nodes need the same version"
    if checks.version_of(version)[:2] < _RAY:
        yield Check("ray", "fail", text, "pip install 'ray[serve]>=2.59'")
    else:
        yield Check("ray", "ok", text)
    if platform == "darwin":
        if environment.get(_OSX) == "1":
            yield Check("ray on macOS", "ok", f"{_OSX}=1")
        else:
            todo = f"export {_OSX}=1 before `ray start`: a second node is refused without it"
            yield Check(
                "ray on macOS", "warn", f"{_OSX} is not set: a second node is refused", todo
            )
    mode = environment.get("RAY_AUTH_MODE", "")
    if mode == "token":
        yield Check("ray auth", "ok", "token")
    elif mode:
        todo = "RAY_AUTH_MODE=token: whoever reaches the ports runs code otherwise"
        yield Check("ray auth", "warn", f"RAY_AUTH_MODE={mode}", todo)
    else:
        yield Check("ray auth", "ok", "not set: kvferry up takes token; set it for ray start")


def check_http_port(config: ClusterConfig) -> Check:
    host, port = config.http.host, config.http.port
    try:
        check_port(host, port)
    except ConfigError as error:
        return Check("port", "fail", str(error), "stop what listens there, or set port")
    return Check("port", "ok", f"{host}:{port} is free")


def register(app: typer.Typer) -> None:
    app.command()(doctor)
