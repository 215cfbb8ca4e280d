"""The words of the stream protocol: what a turn is asked with, and the items it answers with.

Every item carries the attempt it belongs to; token items also the index of their first token in
the reply. The ingress keeps the ids as its log, accepts only its attempt and the next index,
and resumes a broken turn elsewhere with `Resume`. Plain picklable values; no engine, no Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.card import AgentId

Message = Mapping[str, Any]
CacheState = Literal["hot", "warm", "remote", "cold"]
Affinity = Literal["soft", "hard"]  # hard: never moved while its owner lives
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Guide:
    """What the reply must look like: `source` is a JSON schema, a regular expression, a JSON list
    of strings or a Lark grammar (`calls`: one that actors.tools made). `param` is the request's
    field that asked for it; `parts` are those that its fields put into it."""

    kind: Literal["json", "regex", "choice", "grammar", "calls"]
    source: str
    param: str
    parts: tuple[Guide, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None
    parameters: str


@dataclass(frozen=True)
class ToolUse:
    """The tools that a turn's prompt shows, and what the reply may do with them. `function` is the
    one that it must call; `parallel`: it may make several calls."""

    tools: tuple[Tool, ...]
    choice: Literal["auto", "none", "required", "function"] = "auto"
    function: str = ""
    parallel: bool = True


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. The draw at a position depends on seed, position, logits and the ids
    before it only, so a resumed turn draws what the lost one would have. Ranges are checked at the
    edge; what each field does is in actors.sampling."""

    max_tokens: int | None = None  # None: the replica's default
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # alternatives told with each token; None: no log probabilities
    stop_token_ids: tuple[int, ...] = ()  # end the reply and are no part of it
    ignore_eos: bool = False  # tokens that end a generation are never drawn
    guide: Guide | None = None


@dataclass(frozen=True)
class Resume:
    """What an earlier attempt of the same turn already fixed: prompt, and ids it emitted."""

    prompt_ids: tuple[int, ...]
    emitted: tuple[int, ...]


@dataclass(frozen=True)
class TurnRequest:
    """One turn of one agent. `persist` False: a one-off agent whose memory ends with the turn."""

    id: str
    agent: AgentId
    messages: tuple[Message, ...]
    sampling: SamplingParams
    persist: bool = True
    attempt: int = 0
    resume: Resume | None = None
    priority: int = 0  # higher ones go first
    streamed: bool = True  # somebody reads the reply as it comes
    tools: ToolUse | None = None
    restore_tokens: int | None = None  # of stored rows that are not in RAM, load only the first
    affinity: Affinity = "soft"


@dataclass(frozen=True)
class TurnStarted:
    """The prompt is known and the agent's memory is in the engine; prefill begins."""

    attempt: int
    prompt_ids: tuple[int, ...]
    cached_tokens: int
    cache: CacheState
    node: str
    durable_tokens: int = 0  # of the agent's memory so far, in the shared store
    call_format: str = ""  # of actors.tools, where the reply may hold calls
    rows: int = 0  # of prompt and reply so far that are in the engine; the others are prefilled


@dataclass(frozen=True)
class Progress:
    """Prefill goes on: `done` of `total` tokens."""

    attempt: int
    done: int
    total: int


@dataclass(frozen=True)
class Alive:
    """Nothing new, but the replica lives: from a thread of its own, however long a step takes."""

    attempt: int


@dataclass(frozen=True)
class TokenLogprob:
    """A drawn token's bytes and natural log probability, and the same of the likeliest ones."""

    raw: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True)
class Tokens:
    """reply[index : index + len(ids)] are `ids`; `text` is what they add to the visible text.
    `logprobs`: one for each id, where the turn asked for them."""

    attempt: int
    index: int
    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class TurnFinished:
    """The last item; `text` is what was held back until now."""

    attempt: int
    index: int
    text: str
    reason: FinishReason


@dataclass(frozen=True)
class TurnMoved:
    """The agent migrates: this attempt ends here; place the turn again and resume it."""

    attempt: int


@dataclass(frozen=True)
class TurnFailed:
    """This attempt cannot go on; `error` says why."""

    attempt: int
    error: Exception


StreamItem = TurnStarted | Progress | Alive | Tokens | TurnFinished | TurnMoved | TurnFailed


def is_last(items: list[StreamItem]) -> bool:
    """Whether a turn's stream ends with these; a sign of life may come after its last item."""
    return any(isinstance(item, (TurnFinished, TurnMoved, TurnFailed)) for item in items)
