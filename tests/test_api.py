"""The HTTP surface on in-process replicas: shapes, refusals, failures, failover, metrics."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from actors.config import ReplicaConfig
from actors.errors import AgentMoved, EngineFault, InvalidRequest, Overloaded
from actors.turn import (
    Progress,
    Resume,
    SamplingParams,
    StreamItem,
    TurnFailed,
    TurnFinished,
    TurnMoved,
    TurnRequest,
)
from api import app as app_module
from api.app import assemble
from api.auth import SESSION_HEADERS
from api.context import Context
from api.request import StructuredOutputs
from cluster.config import ClusterConfig, HttpConfig
from cluster.errors import MigrationFailed, NoReplica
from cluster.remote import ReplicaLost
from storage.card import AgentId
from storage.errors import StoreUnavailable
from tests.fake_cluster import N_CTX, FakeReplica, FakeRouter, Handle, Stray, lost

pytestmark = pytest.mark.long

HELLO = [{"role": "user", "content": "Hello."}]
CHAT = "/v1/chat/completions"
SESSION = {"x-session-id": "s"}
SECRET = "/secret/of/the/server"


@dataclass
class Http:
    """The app on a loop of its own, called synchronously."""

    config: ClusterConfig
    router: FakeRouter
    runner: asyncio.Runner

    def __post_init__(self) -> None:
        self.app = assemble(Context(self.config, Handle(self.router)))
        self.a, self.b = self.router.replicas.values()

    def configured(self, **http: Any) -> "Http":
        config = replace(self.config, http=replace(self.config.http, **http))
        return Http(config, self.router, self.runner)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    async def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://kvferry") as client:
            return await client.request(method, path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            response = await self.send(method, path, **options)
            await asyncio.sleep(0)  # calls nobody waits for
            return response

        response: httpx.Response = self.run(go())
        return response

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def chat(
        self, messages: Any = HELLO, headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        body = {"messages": messages, "temperature": 0, "max_tokens": 12} | body
        return self.request("POST", CHAT, json=body, headers=headers)

    def text(self, **body: Any) -> str:
        response = self.chat(**body)
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["message"]["content"]
        return text

    def metric(self, name: str, **labels: str) -> float:
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        raise AssertionError(f"no {name} {labels}")


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Http]:
    config = ReplicaConfig(
        model="fake://",
        store=tmp_path.as_uri(),
        codec="f16",
        n_ctx=N_CTX,
        slots=2,
        pool_bytes=1 << 20,
    )
    replicas = [FakeReplica(config, node) for node in ("a", "b")]
    with asyncio.Runner() as runner:
        yield Http(ClusterConfig(replica=config, http=HttpConfig()), FakeRouter(replicas), runner)
    for replica in replicas:
        replica.close()


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; [DONE] stays text."""
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    data = []
    for line in lines:
        assert line.startswith("data: ")
        line = line.removeprefix("data: ")
        data.append(line if line == "[DONE]" else json.loads(line))
    return data


def streamed_text(chunks: list[Any]) -> str:
    choices = [chunk["choices"][0] for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def refusal(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """Checks an error's shape."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["param"] == param
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error")
    assert error["type"] == (kind if status < 500 else "server_error")
    return error


def test_a_chat_completion_is_shaped_like_openais(http: Http) -> None:
    response = http.chat(model="fake")
    assert response.status_code == 200
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert (body["object"], body["model"]) == ("chat.completion", "fake")
    assert isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"]) == 12
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["prompt_tokens"] == len("Hello.") + 3
    assert body["usage"]["total_tokens"] == 12 + body["usage"]["prompt_tokens"]
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_reply_that_ends_by_itself_has_stopped(http: Http) -> None:
    body = http.chat(max_tokens=400, temperature=1, seed=1).json()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < 400


@pytest.mark.parametrize("include_usage", [False, True, None])
def test_a_stream_has_a_role_text_a_reason_and_an_end(
    http: Http, include_usage: bool | None
) -> None:
    options = None if include_usage is None else {"include_usage": include_usage}
    whole = http.text()
    response = http.chat(stream=True, stream_options=options)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    if include_usage:
        usage = chunks.pop()
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 12
    assert not any("usage" in chunk for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(delta.keys() == {"content"} and delta["content"] for delta in deltas[1:-1])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert streamed_text(chunks) == whole


def test_the_second_turn_of_a_session_has_its_memory(http: Http) -> None:
    one = http.chat(headers=SESSION)
    assert one.headers["x-kvferry-node"] == "a"
    assert one.headers["x-kvferry-cache"] == "cold"
    assert one.headers["x-kvferry-cached-tokens"] == "0"
    usage = one.json()["usage"]
    assert one.headers["x-kvferry-prefilled-tokens"] == str(usage["prompt_tokens"])
    text = one.json()["choices"][0]["message"]["content"]
    more = [*HELLO, {"role": "assistant", "content": text}, {"role": "user", "content": "More"}]
    for stream in (False, True):
        two = http.chat(more, SESSION, stream=stream)
        cached = int(two.headers["x-kvferry-cached-tokens"])
        assert cached >= usage["prompt_tokens"] + usage["completion_tokens"] - 1
        assert two.headers["x-kvferry-cache"] == "hot"
        if not stream:
            assert two.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": cached}
            prefilled = two.json()["usage"]["prompt_tokens"] - cached
            assert two.headers["x-kvferry-prefilled-tokens"] == str(prefilled)
    assert http.router.said[0] == (AgentId("default", "s"), len("Hello.") + len(text))


def test_without_a_session_nothing_is_kept(http: Http) -> None:
    for _ in range(2):
        assert http.chat(headers={"x-agent-id": "x"}).headers["x-kvferry-cache"] == "cold"
    one, two = http.router.placed
    assert (one["persist"], two["persist"]) == (False, False)
    assert one["agent"] != two["agent"]
    assert [request.persist for request in http.a.requests] == [False, False]
    assert http.router.said == []
    assert http.get("/v1/agents").json() == {"object": "list", "data": []}


@pytest.mark.parametrize("header", SESSION_HEADERS)
def test_a_session_has_many_names(http: Http, header: str) -> None:
    http.chat(headers={header.title(): "named", "X-Agent-Id": "critic"})
    assert http.router.placed[0]["agent"] == AgentId("default", "named", "critic")
    assert http.router.placed[0]["persist"] is True


def test_headers_name_a_session_before_the_body_and_in_order(http: Http) -> None:
    for first in range(len(SESSION_HEADERS)):
        headers = {h: f"session-{i}" for i, h in enumerate(SESSION_HEADERS) if i >= first}
        http.chat(headers=dict(reversed(headers.items())), session_id="body")
        assert http.router.placed[-1]["agent"].session == f"session-{first}"
    http.chat(session_id="body", user="somebody", prompt_cache_key="key", metadata={"a": "b"})
    assert http.router.placed[-1]["agent"] == AgentId("default", "body")


def test_the_request_reaches_the_replica_as_meant(http: Http) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "ann"},
    ]
    http.chat(messages, seed=-1, stop="zz", top_p=0.5, temperature=0.25)
    (request,) = http.a.requests
    assert request.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello.", "name": "ann"},
    )
    sampling = request.sampling
    assert (sampling.seed, sampling.stop) == (2**64 - 1, ("zz",))
    assert (sampling.top_p, sampling.temperature) == (0.5, 0.25)
    http.chat(max_completion_tokens=3, max_tokens=5, temperature=None)
    assert http.a.requests[-1].sampling.max_tokens == 3
    assert http.a.requests[-1].sampling.temperature == http.config.http.temperature
    assert http.router.placed[0]["n_chars"] == len("Be brief.Hello.")
    assert http.chat(max_tokens=10**30, stop=[]).status_code == 200
    assert http.router.placed[-1]["reply_tokens"] == 128


def test_every_way_to_sample_reaches_the_replica(http: Http) -> None:
    http.chat(
        top_k=5, min_p=0.1, repetition_penalty=1.5, presence_penalty=-1, frequency_penalty=2,
        logit_bias={"97": -100, "98": 1.5}, logprobs=True, top_logprobs=4,
        stop_token_ids=[99], ignore_eos=True,
    )  # fmt: skip
    made = http.a.requests[-1].sampling
    assert (made.top_k, made.min_p, made.repetition_penalty) == (5, 0.1, 1.5)
    assert (made.presence_penalty, made.frequency_penalty) == (-1, 2)
    assert made.logit_bias == ((97, -100), (98, 1.5))
    assert (made.logprobs, made.stop_token_ids, made.ignore_eos) == (4, (99,), True)
    nothing = dict.fromkeys(
        ["top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
         "logit_bias", "logprobs", "top_logprobs", "stop_token_ids", "ignore_eos",
         "response_format", "structured_outputs"]
    )  # fmt: skip
    http.chat(top_p=1, seed=0, **nothing)
    assert http.a.requests[-1].sampling == SamplingParams(12, 0.0)
    http.chat(top_k=-1, logprobs=True, top_p=1, seed=0)
    assert http.a.requests[-1].sampling == SamplingParams(12, 0.0, logprobs=0)


FORM = {"type": "object", "properties": {"a": {"enum": ["x", "é"]}}, "required": ["a"]}
NAMED = {"name": "form", "schema": FORM | {"additionalProperties": False}, "strict": True}


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, r'\{"a":"[xé]"\}'),
        ({"structured_outputs": {"json": NAMED["schema"]}}, r'\{"a":"[xé]"\}'),
        ({"structured_outputs": {"json": json.dumps(NAMED["schema"])}}, r'\{"a":"[xé]"\}'),
        ({"structured_outputs": {"json": FORM}, "response_format": {"type": "text"}}, r"\{.*"),
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        ({"structured_outputs": {"json_object": True}}, r"\{.*"),
        ({"structured_outputs": {"regex": "[0-9]{3}é"}}, "[0-9]{3}é"),
        ({"structured_outputs": {"choice": ["yes!", "no\n"]}}, "yes!|no\n"),
        ({"structured_outputs": {"grammar": 'start: "<" /[A-Z]{2}/ ">"'}}, "<[A-Z]{2}>"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_has_the_form_asked_for(
    http: Http, body: dict[str, Any], pattern: str, stream: bool
) -> None:
    response = http.chat(stream=stream, max_tokens=30, temperature=1, seed=3, **body)
    assert response.status_code == 200, response.text
    if stream:
        text = streamed_text(events(response))
    else:
        text = response.json()["choices"][0]["message"]["content"]
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"logit_bias": {"261": 1}}, "logit_bias"),
        ({"stop_token_ids": [261]}, "stop_token_ids"),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED | {
                "schema": {"type": "integer", "minimum": 2, "maximum": 1}}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '"\\ud800"'}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs.grammar"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_only_the_replica_can_judge_is_refused_by_name_too(
    http: Http, body: dict[str, Any], param: str, stream: bool
) -> None:
    assert refusal(http.chat(stream=stream, **body), 400, param)["code"] == "invalid_value"


@pytest.mark.parametrize("wrap", ['{"json":%s}', '{"json":%s,"regex":null}'])
def test_a_schema_however_deep_is_refused(http: Http, wrap: str) -> None:
    """Also one that is just not too deep for the JSON parser, but for what comes after it."""
    for depth in (120, *range(800, 1010, 2), 5_000):
        schema = '{"items":' * depth + "{}" + "}" * depth
        form = wrap % schema
        body = f'{{"messages":[{{"role":"user","content":"x"}}],"structured_outputs":{form}}}'
        assert http.request("POST", CHAT, content=body).status_code == 400, depth


def test_a_schema_that_only_the_parser_could_hold_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(ValidationError, match="nested too deeply"):
        StructuredOutputs.model_validate({"json": schema})


def test_log_probabilities_are_shaped_like_openais(http: Http) -> None:
    response = http.chat(logprobs=True, top_logprobs=2, max_tokens=6).json()
    (choice,) = response["choices"]
    told = choice["logprobs"]
    assert told.keys() == {"content", "refusal"}
    assert len(told["content"]) == response["usage"]["completion_tokens"]
    assert "".join(token["token"] for token in told["content"]) == choice["message"]["content"]
    for token in told["content"]:
        assert token.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert bytes(token["bytes"]).decode() == token["token"]
        first, second = token["top_logprobs"]
        assert first == {key: token[key] for key in ("token", "logprob", "bytes")}  # greedy
        assert second["logprob"] <= first["logprob"] < 0
    streamed = events(http.chat(logprobs=True, top_logprobs=2, max_tokens=6, stream=True))
    assert streamed_logprobs(streamed) == told["content"]
    assert http.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert http.chat().json()["choices"][0]["logprobs"] is None


def streamed_logprobs(chunks: list[Any]) -> list[Any]:
    choices = [chunk["choices"][0] for chunk in chunks if chunk != "[DONE]" and chunk["choices"]]
    return [token for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]


@pytest.mark.parametrize("stream", [False, True])
def test_items_that_come_together_are_told_one_by_one(http: Http, stream: bool) -> None:
    one_by_one = http.chat(stream=stream)
    http.a.at_once = True
    together = http.chat(stream=stream)
    if stream:
        chunks = events(together)
        assert len(chunks) == len(events(one_by_one))
        assert streamed_text(chunks) == streamed_text(events(one_by_one)) != ""
    else:
        assert together.json()["choices"] == one_by_one.json()["choices"]
        assert together.json()["usage"] == one_by_one.json()["usage"]
    assert http.metric("kvferry_time_to_first_token_seconds_count") == 2


def test_a_stream_tells_log_probabilities_of_text_that_is_held_back(http: Http) -> None:
    """Every completion token is told, those that a stop string hides, too."""
    body = {"logprobs": True, "max_tokens": 30, "temperature": 0}
    plain = http.text(**body)
    stop = plain[4:8]
    chunks = events(
        http.chat(stream=True, stop=stop, stream_options={"include_usage": True}, **body)
    )
    told = streamed_logprobs(chunks)
    assert streamed_text(chunks) == plain[: plain.index(stop)]
    assert len(told) == chunks[-2]["usage"]["completion_tokens"]
    assert "".join(token["token"] for token in told).endswith(stop)


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_fails_over_keeps_its_form_and_tells_each_token_once(
    http: Http, stream: bool
) -> None:
    body: dict[str, Any] = {
        "structured_outputs": {"json": NAMED["schema"] | {"properties": {
            "a": {"type": "string", "minLength": 12, "maxLength": 12}}}},
        "temperature": 1, "seed": 4, "max_tokens": 40, "logprobs": True, "top_logprobs": 1,
        "presence_penalty": 1.0, "stream": stream,
    }  # fmt: skip

    def said() -> tuple[str, list[Any]]:
        response = http.chat(**body)
        assert response.status_code == 200, response.text
        if stream:
            return streamed_text(events(response)), streamed_logprobs(events(response))
        (choice,) = response.json()["choices"]
        return choice["message"]["content"], choice["logprobs"]["content"]

    whole = said()
    assert re.fullmatch(r'\{"a":".{12}"\}', whole[0])
    http.a.fails(lost(), after=6)
    assert said() == whole
    assert len(http.a.requests) == 2
    assert len(http.b.requests) == 1


def test_models_are_listed(http: Http) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("fake", "model")
    assert http.get("/v1/models/fake").json() == model
    assert refusal(http.get("/v1/models/other"), 404, "model")["code"] == "model_not_found"


# ---- bad input


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello."}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages.1.tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop": ["x", ""]}, "stop.1"),
        ({"stop": 3}, "stop"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"n": 2}, "n"),
        ({"stop": "x" * 10_000}, "stop"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e9}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.01}, "min_p"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias.5"),
        ({"logit_bias": {"5": -101}}, "logit_bias.5"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": "yes, please"}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 0}, "top_logprobs"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"stop_token_ids": [1] * 17}, "stop_token_ids"),
        ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
        ({"response_format": {"type": "wizard"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs.json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"guided_json": {}}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"guided_grammar": "a"}, "guided_grammar"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"stream_options": {"include": True}}, "stream_options.include"),
        ({"best_of": 3}, "best_of"),
        ({"query": 3}, "query"),
        ({"session_id": ""}, "session_id"),
        ({"session_id": "../x"}, "session_id"),
        ({"session_id": "x" * 300}, "session_id"),
        ({"session_id": 3}, "session_id"),
    ],
)
def test_bad_input_is_refused_by_name(http: Http, body: dict[str, Any], param: str) -> None:
    refusal(http.chat(**body), 400, param)
    assert http.a.requests == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"stop": 3}, "stop: must be a string or a list of strings"),
        ({"stop": ""}, "stop: has 0 characters; it must have 1 to 1024"),
        ({"stop": "x" * 10_000}, "stop: has 10000 characters; it must have 1 to 1024"),
        ({"stop": ["x", "x" * 1025]}, "stop.1: has 1025 characters; it must have 1 to 1024"),
        ({"stop": ["x"] * 10_000}, "stop: has 10000 strings; at most 16 are allowed"),
        ({"stop": ["x", 3]}, "stop.1: Input should be a valid string"),
        ({"tool_choice": "always"}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function: Field required"),
        (
            {"tool_choice": {"type": "x", "function": {"name": "y"}}},
            "tool_choice.type: Input should be 'function'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text: Field required",
        ),
        (
            {"messages": [{"role": "x", "content": "y"}], "stop": ["x", 3]},
            "messages.0.role: Input should be 'system', 'developer', 'user', 'assistant' or 'tool'",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong_with_the_field(
    http: Http, body: dict[str, Any], message: str
) -> None:
    assert refusal(http.chat(**body), 400, message.partition(":")[0])["message"] == message


@pytest.mark.parametrize("header", [*SESSION_HEADERS, "x-agent-id"])
def test_ids_that_could_mean_a_path_are_refused(http: Http, header: str) -> None:
    for value in ("", "../../etc", "s" * 300, "a/b", "a b", ".hidden", "dot."):
        error = refusal(http.chat(headers={header: value}), 400, header)
        assert error["code"] == "invalid_session_id"
    assert http.router.placed == []


def test_an_unknown_model_is_not_found(http: Http) -> None:
    assert refusal(http.chat(model="gpt-4"), 404, "model")["code"] == "model_not_found"


def test_an_unknown_parameter_is_told_apart(http: Http) -> None:
    error = refusal(http.chat(best_of=3), 400, "best_of")
    assert error["code"] == "unsupported_parameter"
    assert "best_of" in error["message"]


def test_messages_are_needed(http: Http) -> None:
    refusal(http.request("POST", CHAT, json={"model": "fake"}), 400, "messages")


def test_a_prompt_beyond_the_context_is_refused(http: Http) -> None:
    message = [{"role": "user", "content": "x" * (N_CTX + 1)}]
    error = refusal(http.chat(message), 400, "messages")
    assert error["code"] == "context_length_exceeded"
    assert str(N_CTX) in error["message"]
    refusal(http.chat(message, stream=True), 400, "messages")


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b'"x"', None),
        (b"null", None),
        (b"\xff", None),
        (b"[" * 100_000, None),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages.0.content"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
    ],
    ids=range(9),
)
def test_a_body_that_is_no_request_is_refused(
    http: Http, content: bytes, param: str | None
) -> None:
    headers = {"content-type": "application/json"}
    refusal(http.request("POST", CHAT, content=content, headers=headers), 400, param)


@pytest.mark.parametrize("extra", [b'"\\ud800": 1', b'"metadata": {"\\ud800": 1}'])
def test_a_parameters_name_may_be_anything(http: Http, extra: bytes) -> None:
    content = b'{"messages": [{"role": "user", "content": "x"}], ' + extra + b"}"
    headers = {"content-type": "application/json"}
    response = http.request("POST", CHAT, content=content, headers=headers)
    refusal(response, 400, response.json()["error"]["param"])


def test_unknown_paths_and_methods_are_shaped_alike(http: Http) -> None:
    refusal(http.get("/v1/nothing"), 404)
    refusal(http.get(CHAT), 405)


def test_a_body_over_the_limit_is_refused(http: Http) -> None:
    def post(size: int) -> httpx.Response:
        headers = {"content-length": str(size), "content-type": "application/json"}
        body = json.dumps({"messages": HELLO, "max_tokens": 1}).encode()
        return http.request("POST", CHAT, content=body, headers=headers)

    refusal(post(app_module.MAX_BODY + 1), 413)
    assert http.router.placed == []
    assert post(app_module.MAX_BODY).status_code == 200


def test_a_body_in_chunks_is_read_up_to_the_limit(http: Http) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'{"messages": [{"role": "user", "content": "'
        for _ in range(2 * (app_module.MAX_BODY >> 20)):
            sent += 1 << 20
            yield b"x" * (1 << 20)
        yield b'"}]}'

    headers = {"content-type": "application/json"}
    refusal(http.request("POST", CHAT, content=chunks(), headers=headers), 413)
    assert sent <= app_module.MAX_BODY + (1 << 20)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{}] * 200_000},
        {"messages": HELLO, "metadata": {str(n): n for n in range(200_000)}},
        {"messages": HELLO} | {f"x{n}": 1 for n in range(200_000)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 70_000}]},
    ],
    ids=["messages", "metadata", "unknown", "parts"],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/place"])
def test_a_body_of_too_many_values_is_refused_at_once(
    http: Http, path: str, body: dict[str, Any]
) -> None:
    """What reading it takes, no stream goes on."""
    content = json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    refusal(http.request("POST", path, content=content, headers=headers), 400, "body")


# ---- agents


def test_agents_are_seen_moved_and_deleted(http: Http) -> None:
    http.chat(headers=SESSION | {"x-agent-id": "x"})
    assert http.get("/v1/agents").json()["data"] == [{"id": "s/x", "node": "a"}]
    assert http.get("/v1/agents/s/x").json() == {"id": "s/x", "node": "a"}
    moved = http.request("POST", "/v1/agents/s/x/migrate", json={"target": "b"})
    assert moved.json() == {
        "id": "s/x", "source": "a", "target": "b", "epoch": 2, "freeze_s": 0.0123,
        "total_s": 0.5, "rounds": 2, "rows": 900, "loaded_rows": 800, "bytes": 7000,
        "peer_bytes": 600,
    }  # fmt: skip
    back = http.request("POST", "/v1/agents/s/x/migrate", json={"target": None})
    assert back.json()["target"] == "a"
    assert http.request("DELETE", "/v1/agents/s/x").json() == {"id": "s/x", "deleted": True}
    refusal(http.get("/v1/agents/s/x"), 404, "agent")
    refusal(http.request("DELETE", "/v1/agents/s/x"), 404, "agent")
    again = http.chat(headers=SESSION | {"x-agent-id": "x"})
    assert again.headers["x-kvferry-cache"] == "cold"


def test_unknown_agents_and_targets_are_not_found(http: Http) -> None:
    http.chat(headers=SESSION)
    path = "/v1/agents/{}/migrate"
    error = refusal(http.request("POST", path.format("s"), json={"target": "z"}), 404, "target")
    assert "'z'" in error["message"]
    refusal(http.request("POST", path.format("t"), json={"target": "b"}), 404, "agent")
    refusal(http.get("/v1/agents/t"), 404, "agent")
    refusal(http.get("/v1/agents/s/other"), 404, "agent")
    refusal(http.request("POST", path.format("s"), json={}), 400, "target")
    refusal(http.request("POST", path.format("s"), json={"target": ""}), 400, "target")
    refusal(http.request("POST", path.format("s"), json={"target": "b", "x": 1}), 400, "x")


@pytest.mark.parametrize("agent", ["..%2f..", "s/", "s/../x", "s/a/b", "%00"])
def test_an_agents_path_cannot_leave_its_folder(http: Http, agent: str) -> None:
    async def raw(method: str) -> int:
        """httpx would tidy the path up."""
        response = await asgi(http, method=method, path=f"/v1/agents/{agent.replace('%2f', '/')}")
        return response.status

    for method in ("GET", "DELETE"):
        assert http.run(raw(method)) == 400


def test_an_agent_that_speaks_cannot_be_deleted(http: Http) -> None:
    http.a.real._loop.engine._delay = 0.005  # s a step: else it may be through before

    async def go() -> None:
        slow = [{"role": "user", "content": "Go on."}]
        body = {"messages": slow, "max_tokens": 400, "stop": ["#"], "temperature": 2, "seed": 1}
        turn = asyncio.create_task(http.send("POST", CHAT, json=body, headers=SESSION))
        while http.a.real._loop.scheduler.running == []:
            assert not turn.done()
            await asyncio.sleep(0)
        refused = await http.send("DELETE", "/v1/agents/s")
        assert refusal(refused, 409, "agent")["code"] == "agent_busy"
        assert refused.headers["retry-after"] == "1"
        assert (await turn).status_code == 200

    http.run(go())


def test_a_failed_migration_is_a_bad_gateway(http: Http) -> None:
    http.chat(headers=SESSION)
    http.router.fail["migrate"] = [MigrationFailed("it stays")]
    failed = http.request("POST", "/v1/agents/s/migrate", json={"target": "b"})
    assert refusal(failed, 502)["code"] == "migration_failed"


# ---- failures


def failed(error: Exception) -> Callable[[TurnRequest, int], list[StreamItem]]:
    return lambda request, _: [TurnFailed(request.attempt, error)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_asks_to_try_again(http: Http, stream: bool) -> None:
    http.a.fails(failed(Overloaded("64 turns wait", 2.3)), after=0)
    response = http.chat(stream=stream)
    assert refusal(response, 429)["code"] == "overloaded"
    assert response.headers["retry-after"] == "3"
    assert http.metric("kvferry_requests_total", status="429") == 1


def test_without_a_replica_the_service_is_unavailable(http: Http) -> None:
    http.router.fail["place"] = [NoReplica("no replica is ready", 4)]
    response = http.chat()
    assert refusal(response, 503)["message"] == "no replica is ready"
    assert response.headers["retry-after"] == "4"


def test_what_a_replica_refuses_names_its_field(http: Http) -> None:
    http.a.fails(failed(InvalidRequest("no", "messages", "some_code")), after=0)
    assert refusal(http.chat(), 400, "messages")["code"] == "some_code"


async def _progress(request: TurnRequest, _: int) -> AsyncIterator[list[StreamItem]]:
    while True:
        yield [Progress(request.attempt, 0, 0)]
        await asyncio.sleep(0.01)


async def _silence(request: TurnRequest, _: int) -> AsyncIterator[list[StreamItem]]:
    await asyncio.sleep(60)
    yield []


@pytest.mark.parametrize("hang", [_progress, _silence])
def test_a_turn_has_a_deadline(http: Http, hang: Any) -> None:
    http.a.fails(hang, after=0)
    http.b.fails(hang, after=0)
    slow = http.configured(request_timeout_s=0.1, item_timeout_s=30.0)
    assert refusal(slow.chat(), 504)["code"] == "timeout"
    (request,) = http.a.requests
    assert http.a.cancelled == [request.id]
    assert slow.metric("kvferry_requests_total", status="504") == 1


@pytest.mark.parametrize("where", ["place", "item", "raised"])
def test_an_unexpected_failure_shows_no_internals(
    http: Http, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    bug = RuntimeError(SECRET)
    if where == "place":
        http.router.fail["place"] = [bug]
    else:
        http.a.fails(failed(bug) if where == "item" else bug, after=0)
    with caplog.at_level(logging.CRITICAL):
        response = http.chat()
    assert refusal(response, 500)["code"] == "internal_error"
    assert SECRET not in response.text
    assert "Traceback" not in response.text


def test_an_unexpected_failure_outside_chat_shows_no_internals(http: Http) -> None:
    for method, path in [("agent", "/v1/agents/s"), ("cluster", "/metrics"), ("ready", "/readyz")]:
        http.router.fail[method] = [RuntimeError(SECRET)]
        response = http.get(path)
        refusal(response, 500)
        assert SECRET not in response.text


def test_a_router_that_died_is_asked_again(http: Http) -> None:
    http.router.fail["place"] = [lost()]
    assert http.chat().status_code == 200


# ---- a replica is lost


FAULTS = {
    "died": lost(),
    "lost": ReplicaLost("gone"),
    "ended early": None,
    "engine": EngineFault("broken step"),
    "engine item": failed(EngineFault("broken step")),
    "store": failed(StoreUnavailable("file:///x", "full")),
    "finished at a wrong index": lambda r, n: Stray(0, 3, end=True)(r, n),
    "finished another attempt": lambda r, n: Stray(1, 0, end=True)(r, n),
    "cancelled by nobody": lambda r, n: [TurnFinished(r.attempt, n, "", "cancelled")],
    "moved": lambda r, n: [TurnMoved(r.attempt)],
    "moved, raised": AgentMoved("frozen"),
    "silent": _silence,
}


@pytest.mark.parametrize(("stream", "headers"), [(False, {}), (True, SESSION)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_turn_is_resumed_and_its_text_is_whole(
    http: Http, fault: str, stream: bool, headers: dict[str, str]
) -> None:
    question = [{"role": "user", "content": "Tell me a story."}]
    sampling = {"temperature": 1, "seed": 7, "max_tokens": 20}
    undisturbed = http.text(messages=question, **sampling)
    http.a.requests.clear()
    http.a.fails(FAULTS[fault], after=5)
    patient = http.configured(item_timeout_s=0.2 if fault == "silent" else 10.0)
    response = patient.chat(question, headers, stream=stream, **sampling)
    assert response.status_code == 200
    if stream:
        *chunks, done = events(response)
        assert done == "[DONE]"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert [c["choices"][0]["delta"].get("role") for c in chunks].count("assistant") == 1
        text = streamed_text(chunks)
    else:
        text = response.json()["choices"][0]["message"]["content"]
        assert response.json()["usage"]["completion_tokens"] == 20
    assert text == undisturbed
    moved = fault.startswith("moved")
    assert len(http.a.requests) == (2 if moved else 1)
    first, second = [*http.a.requests, *http.b.requests]
    assert (first.attempt, first.resume, second.attempt) == (1, None, 2)
    emitted = tuple(undisturbed[:5].encode())
    prompt = b"\x01Tell me a story.\x02\x03"
    assert isinstance(second.resume, Resume)
    assert second.resume.emitted == emitted
    assert len(second.resume.prompt_ids) == len(prompt)
    assert (second.id, second.agent, second.sampling) == (first.id, first.agent, first.sampling)
    assert patient.metric("kvferry_failovers_total") == (0 if moved else 1)
    if headers:  # of a one-off agent the router hears nothing
        outcome = http.router.outcomes[-1]
        assert outcome is not None
        assert outcome.failovers == (0 if moved else 1)
    avoided = frozenset() if moved else frozenset({"life-a"})
    assert http.router.placed[-1]["avoid"] == avoided
    alive = moved or fault in ("engine", "engine item", "store")
    assert http.router.suspected == ([] if alive else ["life-a"])


def test_strays_never_reach_the_client(http: Http) -> None:
    undisturbed = http.text()
    strays = [(a, i) for a in (-1, 0, 1) for i in (-2, -1, 0, 1, 7) if (a, i) != (0, 0)]
    for attempt, index in strays:
        for end in (False, True):
            http.a.fails(Stray(attempt, index, end), after=5)
            assert streamed_text(events(http.chat(stream=True))) == undisturbed
    assert len(http.a.requests) == 1 + 2 * len(strays)
    assert http.b.requests == []


def test_a_loss_before_the_first_token_is_not_seen(http: Http) -> None:
    undisturbed = http.text()
    http.a.fails(lost(), after=0)
    response = http.chat()
    assert response.json()["choices"][0]["message"]["content"] == undisturbed
    assert response.headers["x-kvferry-node"] == "b"
    assert http.b.requests[0].resume is None


def test_a_dying_router_does_not_end_a_turn_that_fails_over(http: Http) -> None:
    http.a.fails(lost())
    http.router.fail["suspect"] = [lost()]
    assert http.chat().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_router_that_restarts_slowly_ends_no_turn_that_fails_over(
    http: Http, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Nor does it use up the losses that the turn may have."""
    monkeypatch.setattr("api.turns._ROUTER_PAUSE_S", 0.001)
    monkeypatch.setattr("api.turns._ROUTER_S", 0.0)  # this one speaks already
    undisturbed = http.text()

    async def with_the_router(request: TurnRequest, _: int) -> AsyncIterator[list[StreamItem]]:
        http.router.fail["place"] = [lost()] * 20
        raise lost()
        yield []

    http.a.fails(with_the_router, after=5)
    http.b.fails(*[lost()] * 4, after=1)
    response = http.chat(headers=SESSION, stream=stream)
    assert response.status_code == 200
    if stream:
        assert streamed_text(events(response)) == undisturbed
    else:
        assert response.json()["choices"][0]["message"]["content"] == undisturbed
    assert not http.router.fail["place"]
    outcome = http.router.outcomes[-1]
    assert outcome is not None
    assert outcome.failovers == 5


def test_a_router_that_stays_away_ends_a_new_turn_in_time(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.turns._ROUTER_PAUSE_S", 0.01)
    monkeypatch.setattr("api.turns._ROUTER_S", 0.1)
    http.router.fail["place"] = [lost()] * 10_000
    response = http.chat()
    assert "the router does not answer" in refusal(response, 503)["message"]
    assert "retry-after" in response.headers
    slow = http.configured(request_timeout_s=0.05)
    assert refusal(slow.chat(), 504)["code"] == "timeout"


def slow_places(http: Http, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The router's next n decisions take for ever."""
    place, left = http.router.place, [None] * n

    async def placed(*asked: Any, **options: Any) -> Any:
        if left:
            left.pop()
            await asyncio.sleep(3600)
        return place(*asked, **options)

    monkeypatch.setattr(http.router, "place", placed)


def test_a_router_that_is_slow_once_is_asked_again(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it took longer than a router may be lost."""
    monkeypatch.setattr("api.turns._PLACE_TIMEOUT_S", 2.0)
    monkeypatch.setattr("api.turns._ROUTER_S", 1.0)
    slow_places(http, monkeypatch, 1)
    assert http.chat().status_code == 200


def test_a_slow_router_is_waited_for_no_longer_than_the_turn_may_take(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_places(http, monkeypatch, 100)
    began = time.monotonic()
    assert refusal(http.configured(request_timeout_s=0.1).chat(), 504)["code"] == "timeout"
    assert time.monotonic() - began < 20.0


def test_after_too_many_losses_the_turn_is_given_up(http: Http) -> None:
    for replica in (http.a, http.b):
        replica.fails(*[lost()] * 10, after=0)
    response = http.chat()
    assert refusal(response, 503)["code"] == "unavailable"
    assert "retry-after" in response.headers
    assert len(http.a.requests) + len(http.b.requests) == 6
    assert http.metric("kvferry_failovers_total") == 6


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (failed(RuntimeError(SECRET)), "internal_error"),
        (RuntimeError(SECRET), "internal_error"),
        (lost(), "unavailable"),
    ],
)
def test_a_stream_that_fails_ends_with_an_error(
    http: Http, fault: Any, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    for replica in (http.a, http.b):
        replica.fails(*[fault] * 6, after=1)
    response = http.chat(stream=True)
    assert response.status_code == 200
    *chunks, last = events(response)
    assert last.keys() == {"error"}
    assert (last["error"]["type"], last["error"]["code"]) == ("server_error", code)
    assert "[DONE]" not in response.text
    assert SECRET not in response.text
    assert streamed_text(chunks)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


# ---- keys


def test_keys_open_their_tenants_door_only(http: Http) -> None:
    keyed = http.configured(api_keys={"key-1": "one", "key-2": "two"})
    body = {"messages": HELLO, "max_tokens": 2}
    wrong: list[dict[str, str]] = [
        {}, {"authorization": "Bearer wrong"}, {"authorization": "key-1"}, {"x-api-key": "KEY-1"},
        {"authorization": "Bearer "}, {"authorization": "Bearer key-1x"},
    ]  # fmt: skip
    for headers in wrong:
        refused = keyed.request("POST", CHAT, json=body, headers=headers)
        assert refusal(refused, 401)["code"] == "invalid_api_key"
        for path in ("/v1/models", "/v1/models/fake", "/v1/agents", "/v1/agents/s", "/v1/cluster"):
            refusal(keyed.get(path, headers=headers), 401)
        refusal(keyed.request("DELETE", "/v1/agents/s", headers=headers), 401)
        migrate = {"json": {"target": "b"}, "headers": headers}
        refusal(keyed.request("POST", "/v1/agents/s/migrate", **migrate), 401)
    assert http.router.placed == []
    one = {"authorization": "Bearer key-1"}
    two = {"x-api-key": "key-2"}
    assert keyed.chat(headers=SESSION | one).status_code == 200
    assert http.router.placed[-1]["agent"] == AgentId("one", "s")
    refusal(keyed.get("/v1/agents/s", headers=two), 404, "agent")
    assert keyed.get("/v1/agents", headers=two).json()["data"] == []
    other = keyed.chat(headers=SESSION | two)
    assert other.headers["x-kvferry-cached-tokens"] == "0"
    assert http.router.placed[-1]["agent"] == AgentId("two", "s")
    assert keyed.get("/v1/agents/s", headers=one).status_code == 200
    for path in ("/healthz", "/readyz", "/metrics"):
        assert keyed.get(path).status_code == 200


# ---- the operator's view


def test_metrics_parse_and_count(http: Http) -> None:
    http.chat(headers=SESSION)
    http.chat(stream=True)
    http.chat(model="gpt-4")
    http.request("POST", "/v1/agents/s/migrate", json={"target": "b"})
    http.router.moves.failed("placement")
    text = http.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    names = [family.name for family in text_string_to_metric_families(text.text)]
    assert len(names) == len(set(names))
    assert all(name.startswith("kvferry_") for name in names)
    assert http.metric("kvferry_memory_faults_total", node="a", reason="corrupt") == 5
    assert http.metric("kvferry_memory_faults_total", node="b", reason="incompatible") == 1
    assert http.metric("kvferry_requests_total", status="200") == 2
    assert http.metric("kvferry_requests_total", status="404") == 1
    assert http.metric("kvferry_turns_total", cache="cold") == 2
    assert http.metric("kvferry_tokens_total", kind="completion") == 24
    assert http.metric("kvferry_tokens_total", kind="prefilled") == 2 * 9
    assert http.metric("kvferry_time_to_first_token_seconds_count") == 2
    assert http.metric("kvferry_kv_bytes", node="a", tier="pool") == 20
    assert http.metric("kvferry_kv_bytes", node="a", tier="local") == 30
    assert http.metric("kvferry_lagging_bytes", node="a") == 7
    assert http.metric("kvferry_lagging_agents", node="a") == 6
    assert http.metric("kvferry_local_written_bytes_total", node="a") == 40
    assert http.metric("kvferry_draft_tokens_total", node="a") == 50
    assert http.metric("kvferry_draft_tokens_accepted_total", node="a") == 20
    assert http.metric("kvferry_replica_losses_total") == 2
    assert http.metric("kvferry_migrations_total", reason="operator") == 1
    assert http.metric("kvferry_migrations_failed_total", reason="placement") == 1
    assert http.metric("kvferry_migration_freeze_seconds_bucket", le="0.01") == 0
    assert http.metric("kvferry_migration_freeze_seconds_bucket", le="0.02") == 1
    assert http.metric("kvferry_migration_freeze_seconds_count") == 1
    assert http.metric("kvferry_turns_waiting", node="a") == 3
    assert [http.metric("kvferry_store_answers", node=node) for node in "ab"] == [1, 0]


def test_healthy_is_not_ready(http: Http) -> None:
    assert http.get("/readyz").status_code == 200
    http.router.state = {"ready": False, "replicas": 0, "errors": {"a": "loading"}}
    unready = http.get("/readyz")
    assert (unready.status_code, unready.json()) == (503, http.router.state)
    http.router.fail["ready"] = [lost()]
    unready = http.get("/readyz")
    assert unready.status_code == 503
    assert "router" in unready.json()["errors"]
    assert http.get("/healthz").json() == {"status": "ok"}
    http.router.fail["cluster"] = [lost()]
    refusal(http.get("/metrics"), 503)
    assert http.get("/v1/cluster").json()["agents"] == 7


# ---- a client that goes away


@dataclass
class Answer:
    status: int
    body: bytes


async def asgi(
    http: Http,
    *,
    method: str = "POST",
    path: str = CHAT,
    body: dict[str, Any] | None = None,
    leaves: asyncio.Event | None = None,
    refuses_after: int | None = None,
) -> Answer:
    """One request, on a connection that may end while the answer comes: `leaves` is set, or the
    server's writes fail."""
    asked = False
    answer = Answer(0, b"")
    n_sent = 0

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await (leaves or asyncio.Event()).wait()
            return {"type": "http.disconnect"}
        asked = True
        return {"type": "http.request", "body": json.dumps(body).encode() if body else b""}

    async def send(message: dict[str, Any]) -> None:
        nonlocal n_sent
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            return
        n_sent += 1
        if refuses_after is not None and n_sent > refuses_after:
            raise OSError("the connection is gone")
        answer.body += message.get("body", b"")
        if leaves is not None:
            leaves.set()
            await asyncio.sleep(0.01)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3" if refuses_after is None else "2.4"},
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "server": ("kvferry", 80),
        "client": ("client", 1),
    }
    await http.app(scope, receive, send)  # type: ignore[arg-type]
    return answer


async def _endless(request: TurnRequest, n_ids: int) -> AsyncIterator[list[StreamItem]]:
    while True:
        yield Stray(0, 0)(request, n_ids)
        n_ids += 1
        await asyncio.sleep(0.001)


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    ("writes_fail", "then"), [(False, _endless), (False, _silence), (True, _endless)]
)
def test_a_client_that_goes_away_cancels_its_turn(http: Http, writes_fail: bool, then: Any) -> None:
    async def go() -> None:
        http.a.fails(then, after=1)  # ids that come together are one item: there may be no second
        body = {"messages": HELLO, "stream": True, "session_id": "s"}
        leaves = None if writes_fail else asyncio.Event()
        gone = asgi(http, body=body, leaves=leaves, refuses_after=5 if writes_fail else None)
        try:
            async with asyncio.timeout(5):
                answer = await gone
            assert b"[DONE]" not in answer.body
        except Exception as error:
            assert writes_fail, error  # noqa: PT017
            assert type(error).__name__ == "ClientDisconnect"  # noqa: PT017
        await _until(lambda: http.a.cancelled == [http.a.requests[0].id])
        await _until(lambda: http.router.over == [http.a.requests[0].id])
        assert len(http.a.requests) == 1
        assert http.b.requests == []

    http.run(go())


def test_a_request_that_is_cancelled_cancels_its_turn(http: Http) -> None:
    """As Serve does it, for replies that are not streamed and before the first token."""

    async def go(after: int) -> None:
        http.a.fails(_silence, after=after)
        n = len(http.a.requests)
        request = asyncio.create_task(asgi(http, body={"messages": HELLO}))
        await _until(lambda: len(http.a.requests) > n)
        await asyncio.sleep(0.02)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        await _until(lambda: http.a.requests[-1].id in http.a.cancelled)

    http.run(go(0))
    http.run(go(3))
