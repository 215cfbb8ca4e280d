"""Agents that outnumber the slots, and come back: what each side does with a memory it cannot hold.

kvferry parks and restores by itself. llama-server is asked three ways: alone (it prefills again);
with its own prompt cache in RAM; and with a client that saves a slot after every turn and restores
it before the next. A round is over when every agent is answered and, on the sides that write, what
was written is in its files.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from actors.prompt import EmittedReply
from bench.client import Message
from bench.serve_figures import Agreement, Answer, Compared
from bench.serve_load import Scribe, Sizes, compare
from bench.serve_sides import Kvferry, LlamaServer, Prompt, Settings, Side, client, files

_QUESTIONS = (
    "Who was mentioned most often?", "What was found, and where?", "What happened after the storm?",
    "What would you ask the writer?", "Name a thing that was sold.",
)  # fmt: skip
_ROOM = 40  # tokens of a question with its template, at most


@dataclass
class Talk:
    """One agent as one side knows it."""

    agent: str
    messages: list[Message]
    ids: list[int]
    replies: list[EmittedReply] = field(default_factory=list)

    def hear(self, answer: Answer, question: str, scribe: Scribe) -> None:
        self.replies.append(EmittedReply(tuple(answer.ids), answer.text, ""))
        self.messages = [
            *self.messages,
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": question},
        ]
        self.ids = scribe.encode(self.messages, self.replies)


@dataclass
class Member:
    """One side of the comparison. `saved`: a client saves and restores llama-server's slots."""

    side: Side
    talks: list[Talk]
    slots: int
    saved: bool = False
    rates: list[float] = field(default_factory=list)  # finished tokens/s, one of each round
    prefilled: list[float] = field(default_factory=list)  # tokens of a turn, one of each round

    def round(self, order: Sequence[int], max_tokens: int) -> list[Answer]:
        """Every agent of `order` takes a turn; all are asked at once."""
        began = time.time()
        answers = asyncio.run(self._ask(order, max_tokens))
        seconds = time.time() - began
        seconds = max(seconds, self.side.settled() - began)
        self.rates.append(sum(answer.tokens for answer in answers) / seconds)
        self.prefilled.append(mean(answer.prefilled for answer in answers))
        return answers

    async def _ask(self, order: Sequence[int], max_tokens: int) -> list[Answer]:
        free: asyncio.Queue[int] = asyncio.Queue()
        for number in range(self.slots):
            free.put_nowait(number)
        async with client() as http:

            async def turn(talk: Talk) -> Answer:
                prompt = Prompt(talk.agent, talk.messages, talk.ids, reuse=True)
                if not self.saved:
                    return await self.side.ask(http, prompt, max_tokens)
                assert isinstance(self.side, LlamaServer)
                prompt.slot = await free.get()
                try:
                    if talk.replies:
                        await self.side.slot(http, prompt.slot, "restore", talk.agent)
                    answer = await self.side.ask(http, prompt, max_tokens)
                    await self.side.slot(http, prompt.slot, "save", talk.agent)
                finally:
                    free.put_nowait(prompt.slot)
                return answer

            return await asyncio.gather(*(turn(self.talks[number]) for number in order))


def settings(model: Path, threads: int, sizes: Sizes) -> Settings:
    """Every slot has room for an agent's whole conversation."""
    n_ctx = sizes.context + (sizes.rounds + 1) * (sizes.crowd_reply + _ROOM) + 64
    return Settings(model, sizes.crowd_slots, -(-n_ctx // 256) * 256, threads)


def crowd(
    ours: Kvferry, peers: Sequence[LlamaServer], saves: Path, scribe: Scribe, sizes: Sizes
) -> tuple[list[Compared], Agreement]:
    """peers: none, or llama-server alone, with its RAM cache, and with slots that are saved below
    `saves`."""
    prompts = [scribe.write(sizes.context) for _ in range(sizes.crowd)]
    members = [
        Member(
            side, [Talk(p.agent, p.messages, p.ids) for p in prompts], sizes.crowd_slots,
            saved=number == len(peers) > 0,
        )
        for number, side in enumerate([ours, *peers])
    ]  # fmt: skip
    agreement = Agreement()
    draw = random.Random(sizes.crowd)
    order = list(range(sizes.crowd))
    first = _first_turns(members, order, scribe, sizes)
    if peers:
        compare(agreement, scribe, peers[-1], prompts, [first[0], first[-1]])
    for number in range(sizes.rounds):
        draw.shuffle(order)
        for member in members[number % len(members) :] + members[: number % len(members)]:
            answers = member.round(order, sizes.crowd_reply)
            _hear(member, order, answers, scribe, number + 1)
    stored = sum(path.stat().st_size for path in files(ours.store))
    saved = sum(path.stat().st_size for path in files(saves))
    return _figures(members, sizes, stored, saved), agreement


def _first_turns(
    members: Sequence[Member], order: Sequence[int], scribe: Scribe, sizes: Sizes
) -> list[list[Answer]]:
    """Not measured: everybody's prompt is new. llama-server alone cannot keep more agents than it
    has slots, so only those take part; the others' history is the one that kvferry has."""
    first: list[list[Answer]] = []
    for number, member in enumerate(members):
        alone = number == 1
        asked = order[-member.slots :] if alone else order
        answers = member.round(asked, sizes.crowd_reply)
        if alone:
            answers = [*first[0][: -member.slots], *answers]
        _hear(member, order, answers, scribe, 0)
        member.rates.clear()
        member.prefilled.clear()
        first.append(answers)
    return first


def _hear(
    member: Member, order: Sequence[int], answers: Sequence[Answer], scribe: Scribe, round_: int
) -> None:
    for agent, answer in zip(order, answers, strict=True):
        question = _QUESTIONS[(agent + round_) % len(_QUESTIONS)]
        member.talks[agent].hear(answer, question, scribe)


def _figures(members: Sequence[Member], sizes: Sizes, stored: int, saved: int) -> list[Compared]:
    ours, peers = members[0], members[1:]
    what = f"{sizes.crowd} agents over {sizes.crowd_slots} slots, finished"
    if not peers:
        return [
            Compared(what, "tok/s", "", ours.rates),
            Compared("computed of a prompt", "tokens", "", ours.prefilled),
            Compared("stored", "MB", "", [stored / 1e6]),
        ]
    targets = dict(zip((m.side.name for m in peers), (5.0, None, 1.0), strict=True))
    rates = [
        Compared(what, "tok/s", m.side.name, ours.rates, m.rates, targets[m.side.name])
        for m in peers
    ]
    computed = [
        Compared("computed of a prompt", "tokens", m.side.name, ours.prefilled, m.prefilled)
        for m in peers
    ]
    name = peers[-1].side.name
    size = Compared("stored", "MB", name, [stored / 1e6], [saved / 1e6], 0.3, at_most=True)
    return [*rates, *computed, size]
