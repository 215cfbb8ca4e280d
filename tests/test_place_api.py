"""Placement over HTTP: the dry run, the log, affinity, and what the router is told of a turn."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.report import HeldPrefixes, prefix_digest
from actors.turn import SamplingParams, TurnRequest, TurnStarted
from cluster import place_cli
from cluster.cli import app
from cluster.decisions import Outcome
from cluster.errors import NoReplica
from storage.card import AgentId
from tests.test_api import HELLO, SESSION, Http
from tests.test_api import http as http

SYSTEM = {"role": "system", "content": "Be brief. " * 50}
ANSWER = {
    "agent": "s", "node": "b", "action": "migrate", "reasons": ["a owns [the] agent"],
    "estimates": [
        {"node": "b", "action": "migrate", "queue_s": 0.0, "bring_s": 0.25, "mixed_s": None,
         "prefill_s": 3.0, "decode_s": 1.0, "extra_s": 0.5, "total_s": 1.75},
    ],
}  # fmt: skip


def test_a_dry_run_asks_what_the_turn_would_and_runs_nothing(http: Http) -> None:
    body = {"messages": [SYSTEM, *HELLO], "max_tokens": 12}
    headers = SESSION | {"x-kvferry-affinity": "hard"}
    answer = http.request("POST", "/v1/place", json=body, headers=headers)
    assert answer.json() == {"agent": "s", "node": "a"}
    assert not http.router.placed
    http.request("POST", "/v1/chat/completions", json=body, headers=headers)
    (ask,), (placed,) = http.router.explained, http.router.placed
    assert (ask.agent, ask.n_chars, ask.reply_tokens) == (
        placed["agent"], placed["n_chars"], placed["reply_tokens"]
    )  # fmt: skip
    assert (ask.prefix, ask.affinity) == http.router.hints[0]
    assert ask.prefix == prefix_digest("default", [SYSTEM])
    assert ask.affinity == "hard"


def test_a_dry_run_in_numbers(http: Http) -> None:
    http.request("POST", "/v1/place", json={"agent": "s/x", "n_chars": 4000, "reply_tokens": 7})
    (ask,) = http.router.explained
    assert (ask.agent, ask.n_chars, ask.reply_tokens) == (AgentId("default", "s", "x"), 4000, 7)
    assert (ask.prefix, ask.affinity, ask.persist) == ("", "soft", True)


def test_a_dry_run_in_numbers_knows_the_system_prompt(http: Http) -> None:
    text = str(SYSTEM["content"])
    body = {"agent": "s", "n_chars": 4000, "system": text}
    http.request("POST", "/v1/place", json=body)
    http.request("POST", "/v1/place", json={"agent": "s", "system": text})
    whole, alone = http.router.explained
    assert whole.prefix == alone.prefix == prefix_digest("default", [SYSTEM])
    assert (whole.n_chars, alone.n_chars) == (4000, len(text))


@pytest.mark.parametrize(
    "body",
    [{"n_chars": -1}, {"agent": "a b"}, {"reply_tokens": 0}, {"surprise": 1}, {"messages": []}],
)
def test_a_dry_run_refuses_what_it_does_not_understand(http: Http, body: dict[str, object]) -> None:
    assert http.request("POST", "/v1/place", json=body).status_code == 400
    assert not http.router.explained


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": HELLO, "temperature": 9}, "temperature"),
        ({"messages": []}, "messages"),
        ({"n_chars": -1}, "messages"),
    ],
)
def test_a_dry_run_names_the_field(http: Http, body: dict[str, object], param: str) -> None:
    refused = http.request("POST", "/v1/place", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_a_dry_run_on_a_cluster_that_is_not_ready(http: Http) -> None:
    http.router.fail["explain"] = [NoReplica("no replica is ready")]
    answer = http.request("POST", "/v1/place", json={"agent": "s"})
    assert answer.status_code == 503
    assert "retry-after" in answer.headers


def test_affinity_is_soft_or_hard(http: Http) -> None:
    http.chat()
    assert http.router.hints == [("", "soft")]
    refused = http.chat(headers={"x-kvferry-affinity": "sticky"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-kvferry-affinity"


def test_the_log_is_the_tenants(http: Http) -> None:
    assert http.get("/v1/place/log?limit=2").json()["data"] == [{"agent": "default"}] * 2
    assert http.get("/v1/place/log?limit=0").status_code == 400
    locked = http.configured(api_keys={"k": "acme"})
    assert locked.get("/v1/place/log").status_code == 401
    assert locked.request("POST", "/v1/place", json={"agent": "s"}).status_code == 401
    told = locked.get("/v1/place/log", headers={"authorization": "Bearer k"}).json()
    assert told["data"][0] == {"agent": "acme"}


def test_a_turns_outcome_is_told_and_its_limit_reaches_the_replica(http: Http) -> None:
    http.router.limit = 256
    http.chat(headers=SESSION)
    assert http.a.requests[0].restore_tokens == 256
    (outcome,) = http.router.outcomes
    assert isinstance(outcome, Outcome)
    assert 0 < outcome.first_token_s <= outcome.total_s
    assert (outcome.prompt_chars, outcome.reply_tokens) == (len("Hello."), 12)
    assert outcome.prompt_tokens > outcome.cached_tokens == 0


def test_a_turn_without_an_answer_has_no_outcome(http: Http) -> None:
    http.a.fails(*[RuntimeError("broken")] * 9, after=0)
    http.b.fails(*[RuntimeError("broken")] * 9, after=0)
    assert http.chat(headers=SESSION).status_code >= 500
    assert http.router.outcomes == [None]


# ---- what a replica reports


def turn(*messages: dict[str, str], tenant: str = "t", persist: bool = True) -> TurnRequest:
    return TurnRequest("1", AgentId(tenant, "s"), messages, SamplingParams(), persist)


def test_a_prefix_is_named_by_tenant_and_system_prompt() -> None:
    user = {"role": "user", "content": "x"}
    assert prefix_digest("t", [user]) == ""
    assert prefix_digest("t", [SYSTEM, user]) == prefix_digest("t", [SYSTEM])
    others = [
        prefix_digest("u", [SYSTEM]),
        prefix_digest("t", [SYSTEM, SYSTEM]),
        prefix_digest("t", [{"role": "system", "content": "Be brief. "}]),
        prefix_digest("t", [SYSTEM]),
    ]
    assert len(set(others)) == 4


def test_a_replica_holds_whole_blocks_of_the_last_system_prompts() -> None:
    held = HeldPrefixes(block_tokens=16, most=2)
    user = {"role": "user", "content": "y" * 500}  # as long as the system prompt
    held.note(turn(SYSTEM, user), [TurnStarted(0, tuple(range(100)), 0, "cold", "n")])
    assert held.held() == {prefix_digest("t", [SYSTEM]): 48}
    held.note(
        turn(SYSTEM, user, persist=False, tenant="u"), [TurnStarted(0, (1,) * 100, 0, "cold", "n")]
    )
    held.note(turn(user), [TurnStarted(0, (1,) * 100, 0, "cold", "n")])
    held.note(turn(SYSTEM, user, tenant="v"), [])
    assert len(held.held()) == 1
    for tenant in ("v", "t", "w"):
        held.note(turn(SYSTEM, tenant=tenant), [TurnStarted(0, (1,) * 20, 0, "cold", "n")])
    assert set(held.held()) == {prefix_digest("t", [SYSTEM]), prefix_digest("w", [SYSTEM])}
    held.clear()
    assert held.held() == {}


# ---- the command


def test_the_command_prints_where_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def request(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return ANSWER

    monkeypatch.setattr(place_cli, "request", request)
    plain = CliRunner().invoke(app, ["place", "s", "--chars", "400", "--reply", "9"])
    assert plain.stdout == "s: b (migrate)\n"
    assert asked[0][:3] == ("POST", "http://127.0.0.1:8000", "/v1/place")
    assert asked[0][4] == {"agent": "s", "n_chars": 400, "reply_tokens": 9}
    assert asked[0][5] == {"x-kvferry-affinity": "soft"}
    told = CliRunner().invoke(app, ["place", "s", "--explain"])
    for piece in ("migrate", "0.250", "3.000", "1.750", "- a owns [the] agent"):
        assert piece in told.stdout
    as_json = CliRunner().invoke(app, ["place", "s", "--json"])
    assert '"mixed_s": null' in as_json.stdout


def test_the_command_tells_system_prompt_and_affinity(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(place_cli, "request", lambda *given: asked.append(given) or ANSWER)
    system = tmp_path / "system.txt"
    system.write_bytes("Be brief.\r\n€\n".encode())
    command = ["place", "s", "--system", str(system), "--affinity", "hard"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert asked[0][4]["system"] == "Be brief.\r\n€\n"
    assert asked[0][5] == {"x-kvferry-affinity": "hard"}
    system.write_bytes(b"\xff")
    assert CliRunner().invoke(app, command).exit_code == 2
    assert CliRunner().invoke(app, ["place", "s", "--system", "nowhere"]).exit_code == 2
