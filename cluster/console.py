"""What the commands print with: the console, sizes, and the one line of a failure."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer
from rich.console import Console

console = Console(highlight=False, soft_wrap=True)


def size(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:.1f} GB"


def fail(message: str, code: int = 2) -> NoReturn:
    """One line on stderr; 2 for what the caller can mend."""
    print(f"kvferry: {message}", file=sys.stderr)
    raise typer.Exit(code)


def fetched(progress: dict[str, Any]) -> str:
    """How far a node is with a model that it lacks, in one line."""
    done, total = progress["done"], progress["total"]
    line = f"fetching {progress['name']}"
    if total:
        line += f" {100 * done // total} % of {size(total)}"
    if progress["waiting"]:
        return f"{line}, waiting for {progress['waiting']}"
    return f"{line}, {size(int(progress['rate']))}/s from {progress['source']}"
