"""Before a turn enters the engine: own its agent, make its prompt, find where the prompt continues.

Runs on a worker thread, one turn of an agent at a time; may reach the store.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.adoption import Adoption
from actors.branches import AgentMemory, Branch, Run
from actors.engines.base import Engine
from actors.errors import InvalidRequest
from actors.grammar import Grammar, GrammarCompiler
from actors.matching import MIN_SHARED, Match, match, prefix_ids
from actors.memory import Memory
from actors.prompt import ChatTemplate, EmittedReply
from actors.sampling import check
from actors.sequence import text_of
from actors.tools import guide as guide_of
from actors.turn import CacheState, Resume, TurnRequest


@dataclass(frozen=True)
class Prepared:
    """tokens = prompt, then what an earlier attempt emitted; at most max_tokens more follow.
    `grammar` has accepted what was emitted. `prefixes` name the beginnings of the tokens; `runs`
    are the first blocks of a new branch, where other agents have stored them, at most `away`.
    `opening` counts the tokens of the system prompt, where the model has windows to keep there."""

    memory: AgentMemory
    match: Match
    tokens: list[int]
    n_prompt: int
    max_tokens: int
    grammar: Grammar | None = None
    prefixes: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    away: CacheState = "cold"
    opening: int = 0
    call_format: str = ""  # see TurnStarted

    @property
    def n_runs(self) -> int:
        """Rows of `runs`."""
        return sum(run.rows for run in self.runs)


class Preparer:
    def __init__(
        self, engine: Engine, memory: Memory, template: ChatTemplate, default_max_tokens: int
    ) -> None:
        self._n_ctx, self._vocab = engine.n_ctx, engine.vocab
        self._memory, self._template = memory, template
        self._default_max_tokens = default_max_tokens
        self._grammars = GrammarCompiler(engine.vocab)
        self._adoption = Adoption(memory.rows, memory.tiers, memory.faults, memory.outage)

    def warm(self) -> None:
        """What the first turn with a grammar would keep all others waiting for."""
        self._grammars.warm()

    def __call__(self, request: TurnRequest) -> Prepared:
        """Raises InvalidRequest, AgentMoved, and what Memory.open raises."""
        resume = request.resume or Resume((), ())
        check(request.sampling, self._vocab)
        guide, grammar = request.sampling.guide, None
        tools, form = request.tools, self._template.tools.form
        if tools is not None:
            guide = guide_of(form, tools, guide)
        if guide is not None:
            grammar = self._grammars.compile(guide, resume.emitted)
        if request.persist:
            memory = self._memory.open(request.agent)
        else:
            memory = self._memory.one_off(request.agent)
        shown = tools.tools if tools is not None else ()
        prompt, found = match(
            memory.branches,
            lambda replies: (
                list(resume.prompt_ids) or self._template.encode(request.messages, replies, shown)
            ),
            self._replies_of,
            emitted=resume.emitted,
            max_branches=self._memory.config.max_branches,
        )
        room = self._n_ctx - len(prompt)
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens, but the context holds {self._n_ctx} "
                "including at least one token of the reply",
                "messages",
                "context_length_exceeded",
            )
        wanted = request.sampling.max_tokens or self._default_max_tokens
        tokens = [*prompt, *resume.emitted]
        max_tokens = min(wanted, room)
        block = self._memory.key.spec.block_tokens
        prefixes = prefix_ids(self._memory.rows.chain(memory), tokens, block)
        runs, away = self._stored(memory, found, tokens, prefixes)
        opening = 0
        if self._memory.key.spec.window and memory.card is not None:
            opening = self._template.opening(request.messages, prompt, shown)
        call_format = form.name if tools is not None and tools.choice != "none" else ""
        return Prepared(
            memory, found, tokens, len(prompt), max_tokens, grammar,
            prefixes, runs, away, opening, call_format,
        )  # fmt: skip

    def _stored(
        self, memory: AgentMemory, found: Match, tokens: list[int], prefixes: tuple[str, ...]
    ) -> tuple[tuple[Run, ...], CacheState]:
        """(blocks a new branch may begin with, the farthest place they are in). With sliding
        windows none: where a block's window is kept, only the card says that names it."""
        spec = self._memory.key.spec
        whole = (len(tokens) - 1) // spec.block_tokens
        if found.branch.tokens or spec.window or not whole:
            return (), memory.origin
        runs, away = self._adoption.find(memory.agent.tenant, prefixes[1 : 1 + whole])
        if len(runs) * spec.block_tokens < found.keep + MIN_SHARED:
            return (), memory.origin
        return tuple(runs), away

    def _replies_of(self, branch: Branch) -> list[EmittedReply]:
        replies = []
        for reply in branch.replies:
            ids = tuple(branch.tokens[reply.start : reply.stop])
            replies.append(EmittedReply(ids, text_of(self._vocab, ids), reply.tail))
        return replies
