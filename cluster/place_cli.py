"""kvferry place SESSION --explain: what the router would decide for an agent's next turn, and why.

Speaks HTTP. Registered by `cli`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from cluster.console import console, fail
from cluster.endpoint import DEFAULT_URL, Key, Url, request

_TITLES = {
    "queue_s": "queue",
    "bring_s": "bring",
    "mixed_s": "mixed",
    "prefill_s": "prefill",
    "decode_s": "decode",
    "extra_s": "extra",
    "total_s": "total",
}


def place(
    session: Annotated[str, typer.Argument(help="The agent's id; one nobody knows is new.")],
    chars: Annotated[int, typer.Option(min=0, help="Characters of all its messages.")] = 0,
    reply: Annotated[int, typer.Option(min=1, help="Tokens of the reply.")] = 128,
    system: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The system prompt, exactly as it is sent."),
    ] = None,
    affinity: Annotated[str, typer.Option(help="soft, or hard: stays with its owner.")] = "soft",
    explain: Annotated[bool, typer.Option("--explain", help="All estimates, and why.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As the API answers.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Where an agent's next turn would run. Moves nothing."""
    body: dict[str, Any] = {"agent": session, "n_chars": chars, "reply_tokens": reply}
    if system is not None:
        body["system"] = _text(system)
    headers = {"x-kvferry-affinity": affinity}
    answer = request("POST", url, "/v1/place", api_key, body, headers)
    if as_json:
        print(json.dumps(answer))
    else:
        show(answer, explain=explain)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # line ends as they are: it is known by a digest
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {error}")


def show(answer: dict[str, Any], *, explain: bool) -> None:
    """One line; with `explain` the table and the reasons."""
    console.print(f"{answer['agent']}: {answer['node']} ({answer['action']})", markup=False)
    if not explain:
        return
    numbers = [Column(title, justify="right") for title in _TITLES.values()]
    table = Table("node", "action", *numbers, caption="seconds")
    for entry in answer["estimates"]:
        cells = ["-" if entry[name] is None else f"{entry[name]:.3f}" for name in _TITLES]
        table.add_row(entry["node"], entry["action"], *cells)
    console.print(table)
    for reason in answer["reasons"]:
        console.print(f"- {reason}", markup=False)
