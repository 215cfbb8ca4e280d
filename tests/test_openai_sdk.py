"""The official openai package against a real cluster: replies, streams, and its error classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import openai
import pydantic
import pytest

from tests.clusters import Up, recital, shared_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.model, pytest.mark.timeout(300)]
MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Up:
    return shared_cluster(request.config, tmp_path_factory)


@pytest.fixture(scope="module")
def client(cluster: Up) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "kvferry"


def test_a_reply(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=20, temperature=0
    )
    assert reply.choices[0].message.content
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_completion_tokens=20, temperature=0
    )
    with client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_completion_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    said = [c.choices[0] for c in chunks if c.choices]
    assert said[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for choice in said)
    assert text == whole.choices[0].message.content
    assert [c.finish_reason for c in said if c.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_that_sends_back_what_it_got(client: openai.OpenAI) -> None:
    """A whole message object of the SDK, with its empty fields, is the next turn's history."""
    headers = {"x-session-id": "sdk"}
    first = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=12, temperature=0, extra_headers=headers
    )
    assert first.usage is not None
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[
            *QUESTION,
            first.choices[0].message.model_dump(),
            {"role": "user", "content": [{"type": "text", "text": "And of Spain?"}]},
        ],
        max_tokens=4,
        temperature=0,
        extra_headers=headers,
    )
    second = raw.parse()
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached in (first.usage.total_tokens, first.usage.total_tokens - 1)
    assert raw.headers["x-kvferry-cached-tokens"] == str(cached)
    assert raw.headers["x-request-id"]


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_context_that_is_too_long(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model=MODEL, messages=recital(count=400), stream=stream, max_tokens=5
            )
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"


def test_empty_messages(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[])
    assert caught.value.param == "messages"


def test_what_is_not_supported_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, verbosity="low")
    assert (caught.value.param, caught.value.code) == ("verbosity", "unsupported_parameter")


def test_log_probabilities(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2
    )
    (choice,) = reply.choices
    assert choice.logprobs is not None
    told = choice.logprobs.content
    assert told is not None
    assert reply.usage is not None
    assert len(told) == reply.usage.completion_tokens
    text = b"".join(bytes(token.bytes or []) for token in told).decode()
    assert text == choice.message.content
    assert all(token.token == token.top_logprobs[0].token for token in told)  # greedy


class City(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    name: Literal["Paris", "Madrid"]
    inhabitants: int


def test_a_reply_parsed_into_a_model(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, max_tokens=60, seed=3, response_format=City
    )
    assert reply.choices[0].message.parsed is not None


def test_a_token_that_the_model_does_not_have(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, logit_bias={"999999": 5})
    assert (caught.value.param, caught.value.code) == ("logit_bias", "invalid_value")


def test_a_timeout_of_the_client(client: openai.OpenAI, cluster: Up) -> None:
    hurried = client.with_options(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        hurried.chat.completions.create(
            model=MODEL, messages=recital("Tree", 60), max_tokens=400, temperature=0
        )
    assert client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=2).choices
