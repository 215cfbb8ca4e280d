"""What the commands say over HTTP to a running cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import httpx
import typer

from cluster.console import fail

Url = Annotated[str, typer.Option(envvar="KVFERRY_URL", help="The running endpoint.")]
Key = Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="API key, if it wants one.")]
DEFAULT_URL = "http://127.0.0.1:8000"


def get(url: str, path: str, api_key: str) -> Any:
    """As `request`."""
    return request("GET", url, path, api_key, None)


def request(
    method: str,
    url: str,
    path: str,
    api_key: str,
    body: Any,
    headers: Mapping[str, str] | None = None,
) -> Any:
    """The JSON of an answer; anything else ends the command."""
    sent = {"authorization": f"Bearer {api_key}"} if api_key else {}
    sent |= headers or {}
    try:
        answer = httpx.request(method, url + path, json=body, headers=sent, timeout=60)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fail(f"{url}: {error}", code=1)
    if answer.status_code >= 400:
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.text[:200]
        fail(f"{url}: {answer.status_code}: {message}", code=1)
    try:
        return answer.json()
    except ValueError:
        fail(f"{url}: answers, but not as kvferry does", code=1)
