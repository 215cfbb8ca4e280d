"""kvferry drain, undrain and restart against a server that plays a cluster."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from cluster import drain_cli
from cluster.cli import app
from cluster.console import fail


class Server:
    """The node a is emptied after a few looks; `stays` are agents that cannot leave."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.stays: list[dict[str, str]] = []
        self.looks, self.patience = 0, 3
        self.pids = {"a": 1, "b": 2}
        self.open = {"a": True, "b": True}

    def get(self, url: str, path: str, api_key: str) -> Any:
        return self.request("GET", url, path, api_key, None)

    def request(self, method: str, url: str, path: str, api_key: str, body: Any) -> Any:
        self.asked.append((method, path))
        if path == "/v1/cluster":
            return {"nodes": [self._node(name) for name in ("head", "a", "b")]}
        node = path.split("/")[4]
        if node not in self.pids:
            fail(f"no node {node!r}", code=1)
        if method == "POST":
            self.open[node], self.looks = False, 0
        elif method == "DELETE":
            self.open[node] = True
            self.pids[node] += 10
        self.looks += 1
        left = max(0, self.patience - self.looks)
        state = "draining" if left else ("stuck" if self.stays else "drained")
        return {
            "state": state, "moved": self.patience - left, "left": left, "running": 0,
            "failed": self.stays,
            "error": "1 agents cannot leave" if self.stays else None,
        }  # fmt: skip

    def _node(self, name: str) -> dict[str, Any]:
        if name == "head":
            return {"id": name, "replica": "none", "pid": None}
        replica = "ready" if self.open[name] else "drained"
        return {"id": name, "replica": replica, "pid": self.pids[name]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(drain_cli, "get", made.get)
    monkeypatch.setattr(drain_cli, "request", made.request)
    monkeypatch.setattr(drain_cli, "_POLL_S", 0.001)
    return made


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_drain_waits_until_the_node_is_empty(server: Server) -> None:
    result = run("drain", "a")
    assert result.exit_code == 0, result.output
    assert "a: 3 agents moved" in result.stdout
    assert server.asked[0] == ("POST", "/v1/cluster/nodes/a/drain")
    assert len(server.asked) == 3
    assert not server.open["a"]


def test_agents_that_cannot_leave_are_listed(server: Server) -> None:
    server.stays = [{"agent": "s2", "error": "the store does not answer"}]
    result = run("drain", "a")
    assert result.exit_code == 1
    assert "s2: the store does not answer" in result.stdout
    assert "1 agents cannot leave" in result.stderr


def test_an_unknown_node_ends_the_command(server: Server) -> None:
    result = run("drain", "c")
    assert (result.exit_code, result.stderr) == (1, "kvferry: no node 'c'\n")


def test_a_drain_that_takes_too_long_is_given_up(server: Server) -> None:
    server.patience = 10**9
    result = run("drain", "a", "--timeout", "1")
    assert result.exit_code == 1
    assert "not empty after 1 s" in result.stderr


def test_undrain(server: Server) -> None:
    assert run("undrain", "a").exit_code == 0
    assert server.asked == [("DELETE", "/v1/cluster/nodes/a/drain")]


def test_restart_goes_from_node_to_node(server: Server) -> None:
    result = run("restart", "--all")
    assert result.exit_code == 0, result.output
    changes = [(m, p.split("/")[4]) for m, p in server.asked if m != "GET"]
    assert changes == [("POST", "a"), ("DELETE", "a"), ("POST", "b"), ("DELETE", "b")]
    assert server.pids == {"a": 11, "b": 12}


@pytest.mark.parametrize("arguments", [(), ("a", "--all"), ("c",), ("a", "head")])
def test_restart_refuses_what_it_cannot_do_before_it_begins(
    server: Server, arguments: tuple[str, ...]
) -> None:
    result = run("restart", *arguments)
    assert result.exit_code == 2
    assert all(method == "GET" for method, _ in server.asked)


def test_a_restart_stops_at_a_node_that_cannot_be_emptied(server: Server) -> None:
    server.stays = [{"agent": "s2", "error": "no"}]
    assert run("restart", "--all").exit_code == 1
    assert {p.split("/")[4] for m, p in server.asked if m == "POST"} == {"a"}
    assert not any(method == "DELETE" for method, _ in server.asked)
