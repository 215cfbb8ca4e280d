"""kvferry verify | gc | agents --bytes: commands that work on a store itself, without a cluster.

Exit codes: 0 clean, 1 problems found, 2 what the caller can mend. Registered by `cli`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from actors.models import open_store
from cluster.config import ClusterConfig, load_config
from cluster.console import console, fail, size
from cluster.errors import ConfigError
from storage.collector import MIN_GRACE_S, CollectOptions, CollectReport, collect
from storage.errors import StorageError
from storage.retention import RetentionReport, apply_retention
from storage.store import CacheStore
from storage.survey import tenants
from storage.usage import tenant_usage
from storage.verify import PROBLEMS, Finding
from storage.verify import verify as verify_store

Store = Annotated[str | None, typer.Option(help="Directory or URL of the store.")]
ConfigFile = Annotated[Path | None, typer.Option(help="A TOML file of settings.")]


def verify(
    store: Store = None,
    config: ConfigFile = None,
    quarantine: Annotated[bool, typer.Option(help="Set corrupt files aside.")] = False,
) -> None:
    """Check every card and block of a store; 1 if something is corrupt, missing or unreadable."""
    _, opened = _open(store, config)

    def show(finding: Finding) -> None:
        if finding.kind in PROBLEMS:
            console.print(f"{finding.kind}: {finding.path}: {finding.reason}", markup=False)

    try:
        report = verify_store(opened, quarantine=quarantine, on_finding=show)
    except StorageError as error:
        fail(str(error), code=1)
    table = Table("found", "files", "bytes")
    for kind, count in sorted(report.counts.items()):
        table.add_row(kind, str(count), size(report.sizes[kind]))
    if report.counts:
        console.print(table)
    console.print(
        f"{report.cards} cards, {report.blocks} blocks, {size(report.bytes)} read: "
        + ("clean" if report.is_clean else "not clean")
        + (f", {report.set_aside} files set aside" if report.set_aside else "")
    )
    raise typer.Exit(0 if report.is_clean else 1)


def gc(
    store: Store = None,
    config: ConfigFile = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what would be done.")] = False,
    grace: Annotated[
        float, typer.Option(min=MIN_GRACE_S, help="Seconds between condemning and deleting.")
    ] = CollectOptions.grace_s,
    wait: Annotated[bool, typer.Option(help="Stay until the grace is over, and delete.")] = False,
) -> None:
    """Apply quota and time to live, delete what was condemned a grace ago, condemn what no agent
    needs; 1 if a tenant had to be skipped."""
    settings, opened = _open(store, config)
    options = CollectOptions(grace_s=grace, dry_run=dry_run, wait=wait)
    try:
        kept = apply_retention(opened, settings.retention, dry_run=dry_run)
        report = collect(opened, options)
    except StorageError as error:
        fail(str(error), code=1)
    _show_gc(kept, report, dry_run)
    for name, reason in (kept.skipped | report.skipped).items():
        console.print(f"skipped {name}: {reason}", markup=False)
    for tenant, over in kept.over.items():
        console.print(f"{tenant} is {size(over)} over its quota: its agents are all in use")
    raise typer.Exit(1 if kept.skipped or report.skipped or kept.over else 0)


def _show_gc(kept: RetentionReport, report: CollectReport, dry_run: bool) -> None:
    table = Table("would be" if dry_run else "was", "files", "bytes")
    for name, count, n_bytes in (
        ("agents stripped of their blocks", len(kept.stripped), kept.bytes),
        ("agents deleted", len(kept.deleted), 0),
        ("blocks deleted", report.deleted, report.deleted_bytes),
        ("blocks condemned", report.condemned, report.condemned_bytes),
        ("condemned blocks spared", report.spared, 0),
        ("cards of older epochs deleted", report.stale_cards, 0),
        ("tombstones deleted", report.tombstones, 0),
        ("leftovers deleted", report.leftovers, 0),
    ):
        table.add_row(name, str(count), size(n_bytes) if n_bytes else "")
    console.print(table)
    if report.due_s:
        console.print(f"What is condemned may be deleted in {report.due_s:.0f} s: run gc again")


def agents_by_bytes(store: str | None, config: Path | None) -> None:
    """`kvferry agents --bytes`."""
    _, opened = _open(store, config)
    table = Table("agent", "tenant", "tokens", "rows", "bytes", "shared", "updated")
    totals = Table("tenant", "agents", "bytes", "shared")
    unreadable: list[StorageError] = []
    try:
        for tenant in tenants(opened):
            usage = tenant_usage(opened, tenant)
            unreadable += usage.unreadable
            for agent in sorted(usage.agents, key=lambda agent: -agent.bytes):
                updated = time.strftime("%Y-%m-%d %H:%M", time.localtime(agent.card.updated))
                table.add_row(
                    str(agent.card.agent), tenant, str(agent.tokens), str(agent.rows),
                    size(agent.bytes), size(agent.shared_bytes), updated,
                )  # fmt: skip
            totals.add_row(
                tenant, str(len(usage.agents)), size(usage.bytes), size(usage.shared_bytes)
            )
    except StorageError as error:
        fail(str(error), code=1)
    console.print(table)
    console.print(totals)
    for fault in unreadable:
        console.print(f"unreadable: {fault}", markup=False)
    raise typer.Exit(1 if unreadable else 0)


def _open(store: str | None, path: Path | None) -> tuple[ClusterConfig, CacheStore]:
    """The settings, and the store they name, which must be there."""
    try:
        settings = load_config(path, os.environ, {"store": store})
        opened = open_store(settings.replica)
        if not opened.files.names(opened.files.root):
            fail(f"there is no store at {opened.url}")
    except (ConfigError, StorageError, ValueError) as error:
        fail(str(error))
    return settings, opened


def register(app: typer.Typer) -> None:
    app.command()(verify)
    app.command()(gc)
