"""The body of POST /v1/chat/completions: OpenAI's fields, and vLLM's names for what OpenAI lacks.

A field this server cannot honour is refused by name, not ignored.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from actors.turn import Guide, SamplingParams
from cluster.config import HttpConfig

MAX_STOPS = 16
MAX_STOP_LENGTH = 1024  # characters
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 4096


def _whole(text: str) -> str:
    """JSON can carry half a character (\\ud800); no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate is no text") from error
    return text


def _schema(value: Any) -> str:
    """As text: later it would be too deep in the stack for what was just not too deep to parse."""
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    try:
        return json.dumps(value)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _schema_or_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _schema(value)


WholeText = Annotated[str, AfterValidator(_whole)]
StopString = Annotated[WholeText, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
JsonSchema = Annotated[str, BeforeValidator(_schema)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: WholeText


class ChatMessage(_Strict):
    """SDKs send back whole assistant messages, empty fields included."""

    role: Literal["system", "developer", "user", "assistant"]
    content: WholeText | list[TextPart]
    name: WholeText | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def to_template(self) -> dict[str, Any]:
        """As chat templates know it."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class StreamOptions(_Strict):
    include_usage: bool = False


class NamedSchema(_Strict):
    """`strict` changes nothing: a schema is always kept."""

    name: WholeText
    description: WholeText | None = None
    schema_: Annotated[JsonSchema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def guide(self) -> Guide | None:
        if self.json_schema is not None:
            source = self.json_schema.schema_
            return Guide("json", source, "response_format.json_schema.schema")
        if self.type == "json_object":
            return Guide("json", '{"type": "object"}', "response_format")
        return None


class StructuredOutputs(_Strict):
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


class ChatCompletionRequest(_Strict):
    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's names.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # -1, 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = False
    structured_outputs: StructuredOutputs | None = None
    session_id: str | None = None
    # Hints: they name nobody, and this version places by session only.
    user: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    # Accepted only where they ask for nothing.
    n: Literal[1] | None = 1
    store: Literal[False] | None = False
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatCompletionRequest:
        form, structured = self.response_format, self.structured_outputs
        if self.top_logprobs is not None and not self.logprobs:
            raise _mismatch("top_logprobs", "needs logprobs: true")
        if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
            raise _mismatch("response_format.json_schema", "goes with type json_schema")
        if structured is not None and len(structured.model_dump(exclude_none=True)) != 1:
            raise _mismatch("structured_outputs", "needs exactly one of its fields")
        if structured is not None and form is not None and form.type != "text":
            raise _mismatch("structured_outputs", "excludes response_format")
        if self.ignore_eos and self.guide() is not None:
            raise _mismatch("ignore_eos", "excludes structured output, which ends by itself")
        return self

    def guide(self) -> Guide | None:
        """What the reply must look like; None: anything."""
        if self.structured_outputs is not None:
            return self.structured_outputs.guide()
        return self.response_format.guide() if self.response_format is not None else None

    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, http: HttpConfig) -> SamplingParams:
        """With the server's defaults, and a random seed where none was given."""
        return SamplingParams(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            temperature=http.temperature if self.temperature is None else self.temperature,
            top_p=http.top_p if self.top_p is None else self.top_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed % 2**64,
            stop=self.stops(),
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


def _mismatch(param: str, message: str) -> PydanticCustomError:
    """api.errors names the field by `param`."""
    return PydanticCustomError("mismatch", "{message}", {"param": param, "message": message})
