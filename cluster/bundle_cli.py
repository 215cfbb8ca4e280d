"""kvferry export | import: one agent as one file, straight from and into a store.

No cluster has to run; one that runs sees an imported agent at its next turn.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from actors.errors import ModelUnavailable
from actors.models import open_engine, open_store, read_signing_key
from cluster.config import ClusterConfig, load_config
from cluster.errors import ConfigError
from storage.bundle import export_agent
from storage.card import TENANT_PATTERN, AgentId, CacheCard, Owner
from storage.claims import new_card
from storage.errors import AgentExists, Incompatible, StorageError, Unsupported
from storage.imports import Bundle, import_bundle, open_bundle, open_file
from storage.spec import CompatibilityKey
from storage.store import CacheStore

Store = Annotated[str | None, typer.Option(help="Directory or URL of the store.")]
Tenant = Annotated[str, typer.Option(help="Whose agent.")]
Config = Annotated[Path | None, typer.Option(help="A TOML file of settings.")]


def export(
    session: Annotated[str, typer.Argument(help="The agent: its session, or session/name.")],
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    store: Store = None,
    tenant: Tenant = "default",
    key: Annotated[str, typer.Option(help="First digits of the key, if several match.")] = "",
    force: Annotated[bool, typer.Option(help="Overwrite the file.")] = False,
    config: Config = None,
) -> None:
    """Write an agent's memory to one safetensors file. It is not encrypted."""
    _, opened, signing_key = _open(config, store)
    try:
        card = _find(opened, tenant, session, key)
        size = export_agent(opened, card, file, signing_key=signing_key, overwrite=force)
    except FileExistsError:
        _fail(f"{file}: exists already; --force overwrites it")
    except (OSError, ValueError) as error:
        _fail(f"{file}: {error}")
    except StorageError as error:
        _fail(str(error), code=1)
    print(f"{_summary(card)} of {tenant}/{card.agent} -> {file}, {size} bytes")


def import_(
    file: Annotated[str, typer.Argument(help="A path or URL of an export.")],
    session: Annotated[str, typer.Option(help="The new agent's session.")],
    name: Annotated[str, typer.Option(help="Its name inside the session.")] = "",
    store: Store = None,
    tenant: Tenant = "default",
    model: Annotated[str | None, typer.Option(help="Check it against this model first.")] = None,
    replacing: Annotated[
        bool, typer.Option("--replace", help="Overwrite an agent that lives.")
    ] = False,
    config: Config = None,
) -> None:
    """Store an exported agent as a new one."""
    _check_tenant(tenant)
    settings, opened, signing_key = _open(config, store, model)
    try:
        read, size = open_file(file)
        bundle = open_bundle(read, size, file, signing_key=signing_key)
        key, n_vocab = _model(settings, model, bundle)
        agent = AgentId(tenant, session, name)
        template = new_card(agent, key, bundle.card.codec, Owner("import", ""))
        card = import_bundle(opened, bundle, template, n_vocab=n_vocab, replacing=replacing).card
    except FileNotFoundError:
        _fail(f"{file}: no such file")
    except AgentExists as error:
        _fail(f"{error}; --replace overwrites it")
    except (Incompatible, Unsupported, ModelUnavailable) as error:
        _fail(str(error))
    except StorageError as error:
        _fail(str(error), code=1)
    print(f"{_summary(card)} -> {tenant}/{agent}, epoch {card.epoch}")


def _open(
    config: Path | None, store: str | None, model: str | None = None
) -> tuple[ClusterConfig, CacheStore, bytes | None]:
    try:
        settings = load_config(config, os.environ, {"store": store, "model": model})
        return settings, open_store(settings.replica), read_signing_key(settings.replica)
    except (ConfigError, StorageError, ValueError) as error:
        _fail(str(error))


def _check_tenant(tenant: str) -> None:
    if not TENANT_PATTERN.match(tenant):
        _fail(f"--tenant {tenant!r}: lower-case letters, digits, - and _, at most 64")


def _find(store: CacheStore, tenant: str, session: str, key: str) -> CacheCard:
    """The one agent of this name. An agent's folder is a digest that the key is part of, and the
    key is what is not known here: so look at every card of the tenant."""
    _check_tenant(tenant)
    faults: list[StorageError] = []
    store.on_fault = faults.append
    cards = [
        found.card for found in store.cards([tenant], None) if str(found.card.agent) == session
    ]
    chosen = [card for card in cards if card.key.digest.startswith(key)]
    if len(chosen) == 1:
        return chosen[0]
    if not cards:
        unread = f"; {len(faults)} cards cannot be read ({faults[0]})" if faults else ""
        _fail(f"no agent {session!r} of tenant {tenant!r} in {store.url}{unread}")
    known = ", ".join(f"{c.key.digest[:12]} ({c.key.spec.architecture})" for c in cards)
    _fail(f"agent {session!r} is stored under the keys {known}: choose one with --key")


def _model(
    settings: ClusterConfig, model: str | None, bundle: Bundle
) -> tuple[CompatibilityKey, int | None]:
    """The key to hold the file against, and the size of the vocabulary; without a model, the file's
    own and None."""
    if model is None:
        return bundle.card.key, None
    replica = replace(settings.replica, slots=1, n_ctx=512, cells=0, profile="default", kv_budget=0)
    engine = open_engine(replica)
    try:
        return engine.key, engine.vocab.size
    finally:
        engine.close()


def _summary(card: CacheCard) -> str:
    tokens = sum(len(branch.tokens) for branch in card.branches)
    return f"{len(card.branches)} branches, {tokens} tokens, {card.bytes_stored} bytes of rows"


def _fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr; 2 for what the caller can mend."""
    print(f"kvferry: {message}", file=sys.stderr)
    raise typer.Exit(code)
