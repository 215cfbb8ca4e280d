"""kvferry demo cross-engine: one conversation that llama.cpp and MLX continue in turns.

Starts a cluster of its own with a node of each engine, both serving one GGUF, on a store of its
own. Before every turn but the first the agent migrates to the node of the other engine; what it
held must be cached there.

The KL is computed afterwards in this process, over whole distributions, which HTTP does not give:
the agent's card is read from the store, each turn's engine gets the stored rows that it had taken
over, and the tokens of the conversation are forced on it and on the first turn's engine, which
computes all of them by itself. The codec's loss is part of it. Two floors are printed beside it:
the first engine with the same stored rows, and the other engine without any.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from actors.config import ReplicaConfig
from actors.engine_settings import is_fake, is_mlx
from actors.engines.base import Chunk, Engine
from actors.errors import ModelUnavailable
from actors.models import open_engine, open_store, resolve, served_name
from bench.client import EndpointError, Message
from bench.ttft import BenchFailed, Cluster, running_cluster
from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.local import divided
from storage.card import AgentId, BranchCard
from storage.codec import concat_rows, decode_rows, get_codec, slice_rows
from storage.spec import KVRows
from storage.tiers import Tiers

_REPLY_TOKENS = 12
_N_CTX = 512
_STAY_S = 1e6  # the agent moves only when told to
_PIECE = 256  # tokens of a step
_QUESTIONS = (
    "Name a river.",
    "Where does it begin?",
    "Which towns lie on it?",
    "Thank you. Which river was it?",
)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Turn:
    engine: str
    node: str
    prompt_tokens: int
    cached_tokens: int
    prefilled_tokens: int
    ttft_s: float


@dataclass(frozen=True)
class Conversation:
    """`replies`: tokens of each turn's reply."""

    turns: list[Turn]
    replies: list[int]
    session: str


@dataclass(frozen=True)
class Cost:
    """Mean KL in nats per token to the first engine computing everything by itself."""

    kl: float  # of the run as it was
    codec: float  # of the first engine, with the rows that were stored
    engines: float  # of the other engine, computing everything by itself


def run(settings: ClusterConfig, n_turns: int, as_json: bool) -> int:
    """Returns the exit code. Raises ConfigError, ModelUnavailable."""
    _check(settings.replica)
    # Wide, so that a pipe gets whole lines.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory(prefix="kvferry-demo-") as directory:
        settings = _prepared(settings, Path(directory))
        console.print(
            f"{served_name(settings.replica.model)}, codec {settings.replica.codec}: one agent, "
            f"{n_turns} turns, a node of llama.cpp and one of MLX"
        )
        try:
            with running_cluster(settings, Path(directory)) as cluster:
                talk = _converse(cluster, n_turns)
        except (BenchFailed, EndpointError) as error:
            print(f"kvferry demo: {error}", file=sys.stderr)
            return 1
        _print_turns(console, talk)
        cost = measure(settings.replica, talk)
    console.print(
        f"KL to the run that changed nothing: {cost.kl:.4f} nats per token, over the replies of "
        f"turns 2 to {n_turns}. The codec ({settings.replica.codec}) without a change of engine: "
        f"{cost.codec:.4f}; the other engine without any rows of the first: {cost.engines:.4f}.\n"
        "Computed in this process from the stored card, over whole distributions."
    )
    failures = _failures(talk)
    for failure in failures:
        print(f"kvferry demo: did not hold: {failure}", file=sys.stderr)
    if as_json:
        print(
            json.dumps({"turns": [asdict(turn) for turn in talk.turns], "kl": cost.kl}), flush=True
        )
    return 1 if failures else 0


def _check(config: ReplicaConfig) -> None:
    """Raises ConfigError, ModelUnavailable."""
    if is_fake(config.model) or is_mlx(resolve(config.model)):
        raise ConfigError(f"{config.model}: both engines serve a GGUF, and no other model")
    for package in ("mlx", "mlx_lm", "llama_cpp"):
        if importlib.util.find_spec(package) is None:
            raise ModelUnavailable(f"{package} is not installed (pip install '.[llama,mlx]')")


def _prepared(settings: ClusterConfig, store: Path) -> ClusterConfig:
    replica = replace(
        settings.replica, store=f"file://{store}", local="", slots=2, n_ctx=_N_CTX, cells=0
    )
    placement = replace(settings.placement, hysteresis_s=_STAY_S)
    http = replace(settings.http, api_keys={})
    return divided(replace(settings, replica=replica, placement=placement, http=http))


# ---- the conversation


def _converse(cluster: Cluster, n_turns: int) -> Conversation:
    session = f"cross-{secrets.token_hex(4)}"
    engines = {
        node["id"]: node["engine"]
        for node in cluster.endpoint.request("GET", "/v1/cluster")["nodes"]
        if node["replica"] == "ready"
    }
    if sorted(engines.values()) != ["llama.cpp", "mlx"]:
        raise BenchFailed(f"the nodes have engines {sorted(engines.values())}")
    messages: list[Message] = []
    talk = Conversation([], [], session)
    for number in range(n_turns):
        if number:
            target = next(node for node in engines if node != talk.turns[-1].node)
            path = f"/v1/agents/{session}/migrate"
            cluster.endpoint.request("POST", path, {"target": target})
        messages.append({"role": "user", "content": _QUESTIONS[number % len(_QUESTIONS)]})
        reply = cluster.endpoint.chat(messages, session=session, max_tokens=_REPLY_TOKENS)
        cluster.settle()
        messages.append({"role": "assistant", "content": reply.text})
        talk.replies.append(reply.completion_tokens)
        talk.turns.append(
            Turn(
                engines[reply.node],
                reply.node,
                reply.prompt_tokens,
                reply.cached_tokens,
                reply.prefilled_tokens,
                round(reply.ttft_s, 4),
            )
        )
    return talk


def _failures(talk: Conversation) -> list[str]:
    found, held = [], 0
    for number, (turn, reply) in enumerate(zip(talk.turns, talk.replies, strict=True), 1):
        before = talk.turns[number - 2]
        if number > 1 and turn.engine == before.engine:
            found.append(f"turn {number} ran on {turn.engine} again")
        if turn.cached_tokens < held - 1:  # the last token of a reply is never computed
            found.append(f"turn {number}: {turn.cached_tokens} of {held} tokens were cached")
        held = turn.prompt_tokens + reply
    return found


def _print_turns(console: Console, talk: Conversation) -> None:
    table = Table("turn", "engine", "node")
    for name in ("prompt", "cached", "prefilled", "TTFT"):
        table.add_column(name, justify="right")
    for number, turn in enumerate(talk.turns, 1):
        table.add_row(
            str(number), turn.engine, turn.node, str(turn.prompt_tokens), str(turn.cached_tokens),
            str(turn.prefilled_tokens), f"{1000 * turn.ttft_s:.0f} ms",
        )  # fmt: skip
    console.print(table, soft_wrap=False)


# ---- what it cost


def measure(config: ReplicaConfig, talk: Conversation) -> Cost:
    """See the module docstring. Raises ModelUnavailable."""
    names = [turn.engine for turn in talk.turns]
    alone = {name: open_engine(replace(config, engine=name, slots=1)) for name in set(names)}
    try:
        return _measure(config, talk, alone)
    finally:
        for engine in alone.values():
            engine.close()


def _measure(config: ReplicaConfig, talk: Conversation, alone: dict[str, Engine]) -> Cost:
    first = talk.turns[0].engine
    other = next(name for name in alone if name != first)
    branch, stored = _stored(config, talk, alone[first])
    ids = branch.tokens[: talk.turns[-1].prompt_tokens + talk.replies[-1] - 1]
    undisturbed = {name: _log_probabilities(engine, ids) for name, engine in alone.items()}
    costs: list[Floats] = []
    for turn, n_reply in list(zip(talk.turns, talk.replies, strict=True))[1:]:
        begin, end = turn.cached_tokens, turn.prompt_tokens + n_reply - 1
        reference = undisturbed[first][end - n_reply : end]
        others = [undisturbed[other][end - n_reply : end]]
        for name in (first, turn.engine):
            rows, engine = stored(begin), alone[name]
            others.append(_log_probabilities(engine, ids[begin:end], rows)[-n_reply:])
        costs.append(np.stack([_kl(reference, x) for x in others]))
    engines, codec, kl = np.concatenate(costs, axis=1).mean(-1)
    return Cost(float(kl), float(codec), float(engines))


def _stored(
    config: ReplicaConfig, talk: Conversation, engine: Engine
) -> tuple[BranchCard, Callable[[int], KVRows]]:
    """The conversation's branch, and its first n rows as they were stored."""
    if engine.window:
        raise ModelUnavailable("the card keeps windows of the last turns only: no sliding layers")
    store = open_store(config)
    loaded = store.latest(AgentId("default", talk.session), engine.key)
    if loaded is None:
        raise ModelUnavailable("the store has no card of the conversation")
    branch = max(loaded.card.branches, key=lambda b: b.rows)
    spec, codec = engine.key.spec, get_codec(config.codec)
    tiers = Tiers(store, spec, codec, config.pool_bytes)
    pieces = []
    for ref in (*branch.blocks, *branch.tail):
        tensors = tiers.read("default", ref.id, ref.rows, "full", None, ref)
        if tensors is None:
            raise ModelUnavailable(f"the store has lost rows {ref.id} of the conversation")
        pieces.append(tensors)
    whole = concat_rows(pieces)
    return branch, lambda n: decode_rows(spec, codec, slice_rows(whole, 0, n))


def _log_probabilities(engine: Engine, ids: Sequence[int], rows: KVRows | None = None) -> Floats:
    """(tokens, vocabulary), after each of `ids`, fed after `rows`."""
    engine.truncate(0, 0)
    if rows is not None:
        engine.load(0, 0, rows)
    found = []
    for at in range(0, len(ids), _PIECE):
        piece = list(ids[at : at + _PIECE])
        logits = engine.step([Chunk(0, piece, engine.n_rows(0), len(piece))])[0]
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        found.append(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))
    return np.concatenate(found)


def _kl(reference: Floats, other: Floats) -> Floats:
    """(tokens,) nats."""
    kl: Floats = (np.exp(reference) * (reference - other)).sum(-1)
    return kl
