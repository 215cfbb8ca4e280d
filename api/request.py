"""The body of POST /v1/chat/completions: OpenAI's fields, and vLLM's names for what OpenAI lacks.

A field this server cannot honour is refused by name, not ignored.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from actors.turn import Guide, SamplingParams, ToolUse
from api.fields import JsonSchema, Strict, WholeText, countable, mismatch, schema, unfit
from api.messages import ChatMessage, check
from api.tools import ToolChoice, Tools, tool_use
from cluster.config import HttpConfig

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 4096
MAX_PRIORITY = 1000


def _schema_or_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else schema(value)


def _listed(stop: Any) -> Any:
    if isinstance(stop, str):
        return [stop]
    if not isinstance(stop, list):
        raise unfit("must be a string or a list of strings")
    if len(stop) > MAX_STOPS:
        raise unfit(f"has {len(stop)} strings; at most {MAX_STOPS} are allowed")
    return stop


def _stop_length(text: str) -> str:
    if not 1 <= len(text) <= MAX_STOP_LENGTH:
        raise unfit(f"has {len(text)} characters; it must have 1 to {MAX_STOP_LENGTH}")
    return text


StopString = Annotated[WholeText, AfterValidator(_stop_length)]
Stops = Annotated[
    list[StopString], BeforeValidator(_listed, json_schema_input_type=str | list[str])
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Strict):
    include_usage: bool = False


class NamedSchema(Strict):
    """`strict` changes nothing: a schema is always kept."""

    name: WholeText
    description: WholeText | None = None
    schema_: Annotated[JsonSchema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def guide(self) -> Guide | None:
        if self.json_schema is not None:
            source = self.json_schema.schema_
            return Guide("json", source, "response_format.json_schema.schema")
        if self.type == "json_object":
            return Guide("json", '{"type": "object"}', "response_format")
        return None


class StructuredOutputs(Strict):
    """vLLM's; exactly one of its fields."""

    json_: Annotated[WholeText | None, BeforeValidator(_schema_or_text), Field(alias="json")] = None
    regex: WholeText | None = None
    choice: Annotated[list[WholeText], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: WholeText | None = None
    json_object: Literal[True] | None = None

    def guide(self) -> Guide:
        where = "structured_outputs"
        if self.json_ is not None:
            return Guide("json", self.json_, f"{where}.json")
        if self.regex is not None:
            return Guide("regex", self.regex, f"{where}.regex")
        if self.choice is not None:
            return Guide("choice", json.dumps(self.choice), f"{where}.choice")
        if self.grammar is not None:
            return Guide("grammar", self.grammar, f"{where}.grammar")
        return Guide("json", '{"type": "object"}', f"{where}.json_object")


class ChatCompletionRequest(Strict):
    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stops | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # vLLM's names.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # -1, 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = False
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    session_id: str | None = None
    # Hints: they name nobody, and this version places by session only.
    user: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    # Accepted only where they ask for nothing.
    n: Literal[1] | None = 1
    store: Literal[False] | None = False

    @model_validator(mode="before")
    @classmethod
    def _countable(cls, body: Any) -> Any:
        return countable(body)

    @model_validator(mode="after")
    def _fits_together(self) -> ChatCompletionRequest:
        form, structured = self.response_format, self.structured_outputs
        if self.top_logprobs is not None and not self.logprobs:
            raise mismatch("top_logprobs", "needs logprobs: true")
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            raise mismatch("response_format.json_schema", "goes with type json_schema")
        if structured is not None and len(structured.model_dump(exclude_none=True)) != 1:
            raise mismatch("structured_outputs", "needs exactly one of its fields")
        if structured is not None and form is not None and form.type != "text":
            raise mismatch("structured_outputs", "excludes response_format")
        if self.ignore_eos and self.guide() is not None:
            raise mismatch("ignore_eos", "excludes structured output, which ends by itself")
        check(self.messages)
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        use, guide = self.tool_use(), self.guide()
        if use is None or use.choice == "none":
            return
        if self.ignore_eos:
            raise mismatch("ignore_eos", "excludes calls of tools, which end by themselves")
        if guide is not None and (use.choice != "auto" or guide.kind != "json"):
            param = guide.param.partition(".")[0]
            raise mismatch(param, "goes with tools as JSON, where tool_choice leaves room for text")

    def tool_use(self) -> ToolUse | None:
        return tool_use(self.tools, self.tool_choice, self.parallel_tool_calls)

    def guide(self) -> Guide | None:
        """What the reply must look like; None: anything."""
        if self.structured_outputs is not None:
            return self.structured_outputs.guide()
        return self.response_format.guide() if self.response_format is not None else None

    def sampling(self, http: HttpConfig) -> SamplingParams:
        """With the server's defaults, and a random seed where none was given."""
        return SamplingParams(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=http.temperature if self.temperature is None else self.temperature,
            top_p=http.top_p if self.top_p is None else self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed % 2**64,
            stop=tuple(self.stop or ()),
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            guide=self.guide(),
        )
