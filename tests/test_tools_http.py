"""Tools over HTTP, raw and through the official openai package; replicas in this process."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from actors.config import ReplicaConfig
from actors.turn import Tool, ToolUse
from api.tools import MAX_TEXT, MAX_TOOLS
from cluster.config import ClusterConfig, HttpConfig
from tests.fake_cluster import FakeReplica, FakeRouter, lost
from tests.test_api import Http, events, refusal, streamed_text

ASK = [{"role": "user", "content": "What is the weather?"}]
SESSION = {"x-session-id": "s"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["°C", "°F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA},
}
PING = {"type": "function", "function": {"name": "ping"}}
FORCED = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "ping", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "pong"}


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Http]:
    """As tests.test_api has it, with room for tools in the prompt."""
    config = ReplicaConfig(
        model="fake://", store=tmp_path.as_uri(), codec="f16", n_ctx=4096, slots=2,
        pool_bytes=1 << 22,
    )  # fmt: skip
    replicas = [FakeReplica(config, node) for node in ("a", "b")]
    with asyncio.Runner() as runner:
        yield Http(ClusterConfig(replica=config, http=HttpConfig()), FakeRouter(replicas), runner)
    for replica in replicas:
        replica.close()


def ask(http: Http, messages: Any = ASK, **body: Any) -> dict[str, Any]:
    """The choice of a whole reply."""
    asked = {"tools": [WEATHER, PING], "max_tokens": 400} | body
    response = http.chat(messages, **asked)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


def put_together(chunks: list[Any]) -> tuple[str, list[dict[str, Any]], list[Any]]:
    """(content, calls, finish reasons) of a stream; checks the order of deltas."""
    calls: list[dict[str, Any]] = []
    reasons = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        reasons.append(choice["finish_reason"])
        for part in choice["delta"].get("tool_calls", []):
            if "id" in part:
                assert part["index"] == len(calls)
                assert part["type"] == "function"
                assert part["function"]["arguments"] == ""
                calls.append({"id": part["id"], **part["function"]})
            else:
                assert part.keys() == {"index", "function"}
                assert part["function"].keys() == {"arguments"}
                assert part["function"]["arguments"]
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return streamed_text(chunks), calls, reasons


# ---- replies


@pytest.mark.parametrize(
    ("choice", "names"), [(FORCED, {"weather"}), ("required", {"weather", "ping"})]
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_call_that_is_asked_for_comes_and_keeps_its_schema(
    http: Http, choice: Any, names: set[str], seed: int
) -> None:
    said = ask(http, tool_choice=choice, temperature=1, seed=seed)
    assert said["finish_reason"] == "tool_calls"
    message = said["message"]
    assert (message["role"], message["content"]) == ("assistant", None)
    assert message["tool_calls"]
    if choice is FORCED:
        assert len(message["tool_calls"]) == 1
    for call in message["tool_calls"]:
        assert call.keys() == {"id", "type", "function"}
        assert call["function"]["name"] in names
        value = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "weather":
            jsonschema.validate(value, SCHEMA)
        else:
            assert value == {}
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == len(ids)


def test_only_one_call_where_several_are_not_wanted(http: Http) -> None:
    for seed in range(8):
        options = {"tool_choice": "required", "temperature": 1, "seed": seed}
        calls = ask(http, parallel_tool_calls=False, **options)["message"]["tool_calls"]
        assert len(calls) == 1


def test_a_stream_of_a_call_says_what_the_whole_reply_says(http: Http) -> None:
    body = {"tools": [WEATHER, PING], "tool_choice": "required", "temperature": 1, "seed": 2}
    whole = ask(http, **body)["message"]["tool_calls"]
    options = {"include_usage": True}
    response = http.chat(ASK, stream=True, stream_options=options, max_tokens=400, **body)
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert usage["usage"]["completion_tokens"] > 30
    content, calls, reasons = put_together(chunks)
    assert content == ""
    assert [(c["name"], c["arguments"]) for c in calls] == [
        (c["function"]["name"], c["function"]["arguments"]) for c in whole
    ]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]
    n_fragments = sum("tool_calls" in c["choices"][0]["delta"] for c in chunks)
    assert n_fragments > len(calls) * 10  # as it is said, not at its end


def test_text_with_leave_to_call_is_text(http: Http) -> None:
    said = ask(http, max_tokens=30)
    assert said["finish_reason"] == "length"
    assert len(said["message"]["content"]) == 30
    assert "tool_calls" not in said["message"]
    chunks = events(http.chat(ASK, tools=[WEATHER, PING], stream=True, max_tokens=30))[:-1]
    assert put_together(chunks)[:2] == (said["message"]["content"], [])


def test_without_leave_to_call_nothing_is_taken_for_a_call(http: Http) -> None:
    text = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    said = ask(http, tool_choice="none", structured_outputs={"choice": [text]})
    assert said["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert said["finish_reason"] == "stop"
    assert "weather" in str(http.a.requests[-1].tools)  # and the prompt shows the tools


@pytest.mark.slow
def test_a_call_that_is_cut_is_none_to_run(http: Http) -> None:
    whole = ask(http, tool_choice=FORCED)["message"]["tool_calls"][0]["function"]["arguments"]
    seen = set()
    for n in range(1, 100):
        said = ask(http, tool_choice=FORCED, max_tokens=n)
        calls = said["message"].get("tool_calls", [])
        seen.add(said["finish_reason"])
        if said["finish_reason"] == "tool_calls":
            assert calls[0]["function"]["arguments"] == whole
            break
        assert said["finish_reason"] == "length"
        if calls:
            assert said["message"]["content"] is None
            assert whole.startswith(calls[0]["function"]["arguments"].rstrip("\ufffd"))
        else:
            assert said["message"]["content"].startswith("<"[:n])
    assert seen == {"length", "tool_calls"}
    said = ask(http, tool_choice=FORCED, stop='"unit"')
    (call,) = said["message"]["tool_calls"]
    assert whole.startswith(call["function"]["arguments"])
    assert said["finish_reason"] == "stop"


def test_a_turn_that_fails_over_says_its_call_once(http: Http) -> None:
    body = {"tools": [WEATHER], "tool_choice": FORCED, "stream": True, "max_tokens": 400}
    undisturbed = put_together(events(http.chat(ASK, **body))[:-1])
    http.a.fails(lost(), after=55)
    chunks = events(http.chat(ASK, **body))[:-1]
    content, (call,), reasons = put_together(chunks)
    assert len(http.b.requests) == 1
    assert call["id"] == chunks[0]["id"].replace("chatcmpl-", "call_") + "_0"
    assert (content, reasons[-1]) == ("", "tool_calls")
    assert call["arguments"] == undisturbed[1][0]["arguments"]
    jsonschema.validate(json.loads(call["arguments"]), SCHEMA)


@pytest.mark.parametrize("choice", [FORCED, "required", "auto"])
def test_the_turn_after_a_call_has_all_its_memory(http: Http, choice: Any) -> None:
    first = http.chat(
        ASK, SESSION, tools=[WEATHER, PING], tool_choice=choice, max_tokens=400, temperature=1,
        seed=5,
    )  # fmt: skip
    body = first.json()
    message = body["choices"][0]["message"]
    for call in message.get("tool_calls", []):  # what comes back may be written otherwise
        given = json.loads(call["function"]["arguments"])
        call["function"]["arguments"] = json.dumps(given, separators=(",", ":"))
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "Sunny."}
        for call in message.get("tool_calls", [])
    ]
    assert results or choice == "auto"
    more = [*ASK, message, *(results or [{"role": "user", "content": "Go on."}])]
    second = http.chat(more, SESSION, tools=[WEATHER, PING], max_tokens=5)
    held = body["usage"]["total_tokens"]
    assert int(second.headers["x-kvferry-cached-tokens"]) in (held - 1, held)
    assert second.headers["x-kvferry-cache"] == "hot"


def test_log_probabilities_of_a_call_are_one_for_each_token(http: Http) -> None:
    body = {"tools": [WEATHER], "tool_choice": FORCED, "max_tokens": 400, "logprobs": True}
    whole = http.chat(ASK, **body).json()
    told = whole["choices"][0]["logprobs"]["content"]
    assert len(told) == whole["usage"]["completion_tokens"]
    streamed = []
    for chunk in events(http.chat(ASK, stream=True, **body))[:-1]:
        streamed += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == told


def test_text_in_a_form_beside_tools(http: Http) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["é", 1]}}}
    for seed in range(4):
        said = ask(http, response_format=form, temperature=1, seed=seed)["message"]
        assert said["content"] in ('"é"', "1", None)
        assert said["content"] is not None or said["tool_calls"]


# ---- requests


def test_tools_reach_the_replica_as_meant(http: Http) -> None:
    named = WEATHER | {"function": WEATHER["function"] | {"strict": True}}  # type: ignore[operator]
    ask(http, tools=[named, PING], max_tokens=1)
    weather = Tool("weather", "Tells the weather.", json.dumps(SCHEMA))
    nothing = json.dumps({"type": "object", "properties": {}, "additionalProperties": False})
    tools = (weather, Tool("ping", None, nothing))
    requests = http.a.requests
    assert requests[-1].tools == ToolUse(tools, "auto")
    ask(http, tool_choice=FORCED, parallel_tool_calls=False, max_tokens=1)
    assert requests[-1].tools == ToolUse(tools, "function", "weather", False)
    for choice in ("auto", "none", "required"):
        ask(http, tool_choice=choice, parallel_tool_calls=True, max_tokens=1)
        assert requests[-1].tools == ToolUse(tools, choice)
    for nothing_said in ({}, {"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        assert http.chat(**nothing_said).status_code == 200
        assert requests[-1].tools is None
    length = sum(len(t.name) + len(t.description or "") + len(t.parameters) for t in tools)
    assert http.router.placed[0]["n_chars"] == len(ASK[0]["content"]) + length


def test_calls_and_results_reach_the_replica_as_meant(http: Http) -> None:
    parts = [{"type": "text", "text": "po"}, {"type": "text", "text": "ng"}]
    ask(http, [*ASK, CALLED, RESULT | {"content": parts}], max_tokens=1)
    assert http.a.requests[-1].messages[1:] == (
        {
            "role": "assistant",
            "content": "",
            "tool_calls": ({"id": "c1", "name": "ping", "arguments": "{}"},),
        },
        {"role": "tool", "content": "pong", "tool_call_id": "c1", "name": "ping"},
    )
    assert http.chat([*ASK, CALLED, RESULT]).status_code == 200  # no tools any more


def test_a_lower_priority_goes_first_as_in_vllm(http: Http) -> None:
    for given, made in ((None, 0), (-3, 3), (1000, -1000)):
        assert http.chat(priority=given).status_code == 200
        assert http.a.requests[-1].priority == made


def tools(*functions: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": f} for f in functions]}


def called(**changes: Any) -> dict[str, Any]:
    function = CALL["function"] | changes.pop("function", {})  # type: ignore[operator]
    return CALLED | {"tool_calls": [CALL | {"function": function} | changes]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": "weather"}, "tools"),
        ({"tools": [PING] * (MAX_TOOLS + 1)}, "tools"),
        (tools({"name": "a" * 65}), "tools.0.function.name"),
        (tools({"name": "a b"}), "tools.0.function.name"),
        (tools({"name": "a\n"}), "tools.0.function.name"),
        (tools({"name": ""}), "tools.0.function.name"),
        (tools({"name": "é"}), "tools.0.function.name"),
        (tools({"name": "a"}, {"name": "a"}), "tools.1.function.name"),
        (tools({"name": "a", "more": 1}), "tools.0.function.more"),
        (tools({"name": "a", "parameters": []}), "tools.0.function.parameters"),
        (tools({"name": "a", "parameters": ""}), "tools.0.function.parameters"),
        (tools({"name": "a", "parameters": {"type": "string"}}), "tools.0.function.parameters"),
        (tools({"name": "a", "description": "x" * MAX_TEXT}), "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": FORCED}, "tool_choice"),
        ({"tools": [PING], "tool_choice": FORCED}, "tool_choice.function.name"),
        ({"tools": [PING], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [PING], "parallel_tool_calls": "maybe"}, "parallel_tool_calls"),
        ({"tools": [PING], "ignore_eos": True}, "ignore_eos"),
        ({"tools": [PING], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        (
            {"tools": [PING], "tool_choice": FORCED | {"function": PING["function"]}}
            | {"response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"functions": [{"name": "a"}]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"priority": 1001}, "priority"),
        ({"priority": -1001}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"messages": [*ASK, RESULT]}, "messages.1.tool_call_id"),
        ({"messages": [*ASK, CALLED, {"role": "tool", "content": "x"}]}, "messages.2.tool_call_id"),
        ({"messages": [*ASK, CALLED, RESULT, RESULT]}, "messages.3.tool_call_id"),
        ({"messages": [*ASK, CALLED, RESULT | {"tool_call_id": "c2"}]}, "messages.2.tool_call_id"),
        ({"messages": [*ASK, CALLED, RESULT | {"content": None}]}, "messages.2.content"),
        ({"messages": [*ASK, CALLED]}, "messages"),
        ({"messages": [*ASK, CALLED, *ASK]}, "messages.2"),
        ({"messages": [ASK[0] | {"tool_calls": [CALL]}]}, "messages.0.tool_calls"),
        ({"messages": [ASK[0] | {"tool_call_id": "c1"}]}, "messages.0.tool_call_id"),
        ({"messages": [CALLED | {"tool_calls": []}]}, "messages.0.tool_calls"),
        ({"messages": [CALLED | {"tool_calls": [CALL, CALL]}]}, "messages.0.tool_calls"),
        ({"messages": [called(id="")]}, "messages.0.tool_calls.0.id"),
        ({"messages": [called(type="custom")]}, "messages.0.tool_calls.0.type"),
        (
            {"messages": [called(function={"name": "a b"})]},
            "messages.0.tool_calls.0.function.name",
        ),
        *(
            (
                {"messages": [called(function={"arguments": given})]},
                "messages.0.tool_calls.0.function.arguments",
            )
            for given in ("", "{", "[]", "1", {}, '{"a": NaN}', "[" * 20_000, "null")
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(http: Http, body: dict[str, Any], param: str) -> None:
    refusal(http.chat(**({"messages": ASK} | body)), 400, param)
    assert http.a.requests == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "wizard"}}},
        {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]},
        {"allOf": [{"type": "object"}, {"type": "string"}]},
        {"properties": {}, "required": [{}]},
        {"properties": [], "required": 3},
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_by_its_tool(
    http: Http, schema: Any, stream: bool
) -> None:
    body = tools({"name": "ping"}, {"name": "broken", "parameters": schema})
    error = refusal(http.chat(stream=stream, **body), 400, "tools[1].function.parameters")
    assert error["code"] == "invalid_value"


def test_a_schema_however_deep_is_refused(http: Http) -> None:
    for depth in (120, 900, 960, 990):
        schema = '{"items":' * depth + "{}" + "}" * depth
        tool = f'{{"type":"function","function":{{"name":"a","parameters":{schema}}}}}'
        for choice in ("auto", "required"):
            body = f'{{"messages":[{{"role":"user","content":"x"}}],"tools":[{tool}],'
            body += f'"max_tokens":1,"tool_choice":"{choice}"}}'
            response = http.request("POST", "/v1/chat/completions", content=body)
            assert response.status_code == 400, depth


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar"),
        (
            {"structured_outputs": {"json": {"type": "string", "minLength": 2, "maxLength": 1}}},
            "structured_outputs.json",
        ),
        ({"stop": "x" * 10_240}, "stop"),
        ({"logit_bias": {"97": 101}}, "logit_bias.97"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_must_be_refused_is_a_clear_400(
    http: Http, body: dict[str, Any], param: str, stream: bool
) -> None:
    """Malformed grammar, impossible schema, stop string of 10 KB, logit bias out of range."""
    error = refusal(http.chat(stream=stream, **body), 400, param)
    assert param.partition(".")[0] in error["message"]


# ---- the openai package


class Weather(BaseModel):
    """Tells the weather of a city."""

    city: str = Field(max_length=6)
    days: int = Field(ge=1, le=9)


def with_sdk(http: Http, work: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        transport = httpx.ASGITransport(http.app)
        async with httpx.AsyncClient(transport=transport) as client:
            sdk = openai.AsyncOpenAI(
                base_url="http://kvferry/v1", api_key="none", max_retries=0, http_client=client
            )
            return await work(sdk)

    return http.run(go())


SDK_BODY: dict[str, Any] = {
    "model": "fake",
    "tools": [openai.pydantic_function_tool(Weather, name="weather")],
    "tool_choice": FORCED,
    "max_tokens": 400,
    "temperature": 0,
}


def test_the_sdks_parse_helper_and_its_message_sent_back(http: Http) -> None:
    async def work(sdk: openai.AsyncOpenAI) -> Any:
        first = await sdk.chat.completions.parse(messages=ASK, extra_headers=SESSION, **SDK_BODY)
        message = first.choices[0].message
        (call,) = message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Weather)
        assert call.function.parsed_arguments.days in range(1, 10)
        result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny."}
        # As an object, and as it is dumped with all its empty fields.
        for shown in (message, message.model_dump()):
            second = await sdk.chat.completions.create(
                messages=[*ASK, shown, result],
                extra_headers=SESSION,
                **SDK_BODY | {"tool_choice": "auto", "max_tokens": 3},
            )
            assert first.usage is not None
            cached = second.usage.prompt_tokens_details.cached_tokens
            assert cached >= first.usage.total_tokens - 1

    with_sdk(http, work)


def test_the_sdks_stream_helper_builds_the_same_call(http: Http) -> None:
    async def work(sdk: openai.AsyncOpenAI) -> Any:
        whole = await sdk.chat.completions.create(messages=ASK, **SDK_BODY)
        kinds = []
        async with sdk.chat.completions.stream(messages=ASK, **SDK_BODY) as stream:
            async for event in stream:
                kinds.append(event.type)
            final = await stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        assert "tool_calls.function.arguments.done" in kinds
        (streamed,), (plain,) = (
            reply.choices[0].message.tool_calls or () for reply in (final, whole)
        )
        assert streamed.function.arguments == plain.function.arguments
        assert isinstance(streamed.function.parsed_arguments, Weather)
        assert final.choices[0].finish_reason == "tool_calls"
        assert final.choices[0].message.content in (None, "")
        result = {"role": "tool", "tool_call_id": streamed.id, "content": "Sunny."}
        shown = final.choices[0].message.model_dump()
        again = await sdk.chat.completions.create(messages=[*ASK, shown, result], **SDK_BODY)
        assert again.choices[0].message.tool_calls

    with_sdk(http, work)


def test_the_sdks_error_names_the_tool(http: Http) -> None:
    async def work(sdk: openai.AsyncOpenAI) -> Any:
        tool: Any = {"type": "function", "function": {"name": "a", "parameters": {"allOf": [1]}}}
        with pytest.raises(openai.BadRequestError) as caught:
            await sdk.chat.completions.create(model="fake", messages=ASK, tools=[tool])
        assert caught.value.param == "tools[0].function.parameters"

    with_sdk(http, work)


def test_a_schema_may_be_empty(http: Http) -> None:
    """Any arguments, as JSON schema has it."""
    body = tools({"name": "ping", "parameters": {}}) | {"tool_choice": "required"}
    assert http.chat(**body, max_tokens=4).status_code == 200
    (request,) = [*http.a.requests, *http.b.requests]
    assert request.tools == ToolUse((Tool("ping", None, "{}"),), "required")
