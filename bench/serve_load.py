"""One request alone, and several at once: the same prompts on both sides, in turn.

Every run has prompts of its own, so that nothing can be taken from a cache.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from actors.config import ReplicaConfig
from bench.raw import RawEngine
from bench.serve_figures import Agreement, Answer, Compared, parting
from bench.serve_sides import LlamaServer, Prompt, Side, client
from bench.texts import context

_QUESTION = "Tell me in your own words what these notes are about."


@dataclass(frozen=True)
class Sizes:
    """Tokens and counts."""

    prompt: int = 1024  # of one request alone
    reply: int = 128
    together: tuple[int, ...] = (4, 8)  # agents at once
    short_prompt: int = 128  # theirs
    runs: int = 5
    crowd: int = 16
    crowd_slots: int = 4
    context: int = 2048  # of each agent of the crowd
    rounds: int = 3
    crowd_reply: int = 32


QUICK = Sizes(
    prompt=160, reply=12, together=(2,), short_prompt=96, runs=1, crowd=4, crowd_slots=2,
    context=300, rounds=2, crowd_reply=6,
)  # fmt: skip


class Scribe(RawEngine):
    """Prompts of given lengths; no two are alike."""

    def __init__(self, config: ReplicaConfig) -> None:
        super().__init__(config)
        self._seed = secrets.randbits(32)

    def write(self, n_tokens: int) -> Prompt:
        self._seed += 1
        messages = self.prompt(context(self._seed, 2 * n_tokens), _QUESTION, n_tokens)
        return Prompt(f"bench-{secrets.token_hex(6)}", messages, self.encode(messages))


def one(
    ours: Side, peer: LlamaServer | None, scribe: Scribe, sizes: Sizes
) -> tuple[list[Compared], Agreement]:
    """Prefill and decode of one request at a time."""
    name = peer.name if peer else ""
    prefill = Compared(f"prefill of {sizes.prompt} tokens", "tok/s", name, target=0.95)
    decode = Compared("decode, one request", "tok/s", name, target=0.95)
    agreement = Agreement()
    for run in range(-1, sizes.runs):  # the first warms up
        prompt = scribe.write(sizes.prompt if run >= 0 else sizes.short_prompt)
        answers = _both(ours, peer, [prompt], sizes.reply, swap=bool(run % 2))
        if run < 0:
            continue
        for mine, [answer] in zip((True, False), answers, strict=False):
            rate = len(prompt.ids) / answer.prefill_s
            (prefill.ours if mine else prefill.theirs).append(rate)
            (decode.ours if mine else decode.theirs).append(answer.decode_tokens_per_s)
        compare(agreement, scribe, peer, [prompt], answers)
    return [prefill, decode], agreement


def together(
    ours: Side, peer: LlamaServer | None, agents: int, scribe: Scribe, sizes: Sizes
) -> tuple[Compared, Agreement]:
    """Requests that come at once: all tokens over the time from the first POST to the last text."""
    name = peer.name if peer else ""
    total = Compared(f"{agents} agents at once, in total", "tok/s", name, target=1.0)
    agreement = Agreement()
    for run in range(-1, sizes.runs):
        prompts = [scribe.write(sizes.short_prompt) for _ in range(agents)]
        answers = _both(ours, peer, prompts, sizes.reply if run >= 0 else 4, swap=bool(run % 2))
        if run < 0:
            continue
        for mine, group in zip((True, False), answers, strict=False):
            (total.ours if mine else total.theirs).append(rate_of(group))
        compare(agreement, scribe, peer, prompts, answers)
    return total, agreement


def rate_of(answers: Sequence[Answer]) -> float:
    """Tokens/s of requests that came at once."""
    seconds = max(a.ended for a in answers) - min(a.began for a in answers)
    return sum(a.tokens for a in answers) / seconds


def compare(
    agreement: Agreement,
    scribe: Scribe,
    peer: LlamaServer | None,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Answer]],
) -> None:
    """Add the replies to equal prompts; answers: ours, theirs."""
    if peer is None:
        return
    for prompt, mine, other in zip(prompts, *answers, strict=True):

        def gap(prompt: Prompt = prompt, mine: Answer = mine, other: Answer = other) -> float:
            places = parting(scribe.vocab, other.ids, mine.text, other.text)
            return min(peer.gap(prompt.ids + other.ids[:place]) for place in places)

        agreement.add(mine.text, other.text, gap)


def _both(
    ours: Side, peer: Side | None, prompts: Sequence[Prompt], max_tokens: int, *, swap: bool
) -> list[list[Answer]]:
    """[ours] or [ours, theirs], asked one side after the other; with `swap` theirs first."""
    sides = [ours] if peer is None else [ours, peer]
    answers: dict[str, list[Answer]] = {}
    for side in reversed(sides) if swap else sides:
        answers[side.name] = asyncio.run(_all(side, prompts, max_tokens))
        side.settled()  # it sleeps while the other one works
    return [answers[side.name] for side in sides]


async def _all(side: Side, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
    async with client() as http:
        return await asyncio.gather(*(side.ask(http, p, max_tokens) for p in prompts))
