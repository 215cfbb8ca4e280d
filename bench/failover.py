"""kvferry bench failover: replicas that die while they speak.

An agent with a long context answers one question after another, and every answer loses what it
runs on: the replica's process, its node (raylet and all), or the whole host, which is cut off. How
long until somebody noticed, until the client saw the next token, how many tokens were prefilled
again; and whether the text is that of the undisturbed run, made before by another agent. Codec f16:
with a lossy one, rows that were restored are not those that were computed.

`process` and `node` run on nodes of this machine; as soon as `host` or links are asked for, all run
on hosts of their own (see sites), on one link after the other. A wrong text, or too many tokens
prefilled again, fails; a time that is missed is reported.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from statistics import median
from typing import Any, Literal

from rich.table import Table

from bench.client import Endpoint, EndpointError, Message
from bench.sites import (
    Blow,
    Kill,
    Site,
    chars_per_token,
    filling,
    host_site,
    local_site,
    parse_links,
    progress,
    show,
    wait_stored,
)
from bench.ttft import BenchFailed
from cluster.config import ClusterConfig
from cluster.console import console

_FIRST_TOKENS, _REPLY_TOKENS = 8, 64
_NEAR_TIE = 0.1  # between the two likeliest tokens: another batch may choose the other one
_PROCESS_S, _AFTER_S, _DETECTION_S = 1.0, 1.0, 3.0
_AGAIN_TOKENS = 256  # and the new message
_OUTCOME_S = 5.0
_WORDS = ("killed", "text")
Equal = Literal["identical", "near tie", "differs"]


@dataclass(frozen=True)
class Lost:
    """One answer that lost its replica; seconds since the kill. `held`: tokens of the agent before
    the question; `new`: of the question."""

    kill: Kill
    node: str
    to: str
    detection_s: float
    next_token_s: float
    again_tokens: int
    held: int
    new: int
    equal: Equal
    link: str = ""  # that the devices' links were limited to

    @property
    def what(self) -> str:
        return f"{self.kill}, {self.link}" if self.link else self.kill


@dataclass(frozen=True)
class Quiet:
    """An undisturbed answer, and at which characters its tokens begin, with the gap between the
    log probabilities of the two likeliest."""

    text: str
    gaps: tuple[tuple[int, float], ...]

    def compare(self, text: str) -> Equal:
        if text == self.text:
            return "identical"
        pairs = enumerate(zip(text, self.text, strict=False))
        at = next((n for n, (a, b) in pairs if a != b), None)
        if at is None:  # tokens are missing, or there are too many
            return "differs"
        gap = [gap for begin, gap in self.gaps if begin <= at]
        return "near tie" if gap and gap[-1] < _NEAR_TIE else "differs"


def run(
    settings: ClusterConfig, kills: Sequence[Kill], length: int, runs: int, link: str, *,
    as_json: bool,
) -> int:  # fmt: skip
    """Measure and print; the exit code. Raises ConfigError, ModelUnavailable."""
    settings = replace(settings, nodes=2, replica=replace(settings.replica, codec="f16"))
    links = parse_links(link) if link else {}
    on_hosts = bool(links) or "host" in kills
    n_questions = len(kills) * runs * max(1, len(links))
    try:
        with host_site(settings, disks=False) if on_hosts else local_site(settings) as site:
            found = _Bench(site, length, n_questions).run(kills, runs, links)
    except (BenchFailed, EndpointError) as error:
        print(f"kvferry bench: {error}", file=sys.stderr)
        return 1
    held = correct(found) | fast(found)
    _print(found, held)
    if as_json:
        report = {
            "model": settings.replica.model,
            "hosts": on_hosts,
            "context": length,
            "runs": [asdict(lost) for lost in found],
            "medians": {what: _medians(of_kind) for what, of_kind in _by_kind(found).items()},
            "near_ties": sum(lost.equal == "near tie" for lost in found),
            "targets": held,
        }
        print(json.dumps({"failover": report}), flush=True)
    return 0 if all(held[name] for name in correct(found)) else 1


@dataclass
class _Bench:
    site: Site
    length: int
    n_questions: int
    _first: list[Message] = field(default_factory=list)
    _quiet: list[Quiet] = field(default_factory=list)

    @property
    def _endpoint(self) -> Endpoint:
        return self.site.endpoint

    def run(self, kills: Sequence[Kill], runs: int, links: Mapping[str, float]) -> list[Lost]:
        text = filling(self.length, chars_per_token(self._endpoint))
        self._first = [
            {"role": "system", "content": f"You answer questions about these notes.\n{text}"},
            {"role": "user", "content": "Sum them up in one sentence."},
        ]
        progress(f"{self.length} tokens: the undisturbed answers")
        session, held = self._agent()
        self._undisturbed(session)
        found: list[Lost] = []
        for link, mbit in (links or {"": 0.0}).items():
            if link:
                self.site.limit(mbit)
            for number, kill in product(range(runs), kills):
                progress(f"{link} {kill}: {number + 1} of {runs}".lstrip())
                lost = self._lose(kill, session, held, len(found))
                found.append(replace(lost, link=link))
                self.site.recover()
        self._delete(session)
        return found

    def _agent(self) -> tuple[str, int]:
        """An agent that knows the notes, and how many tokens of it are stored."""
        session = f"bench-{secrets.token_hex(6)}"
        first = self._endpoint.chat(self._first, session=session, max_tokens=_FIRST_TOKENS)
        self._first.append({"role": "assistant", "content": first.text})
        return session, wait_stored(self._endpoint, session)

    def _messages(self, number: int) -> list[Message]:
        asked = f"Now write page {number + 1} of a long story about one of them."
        return [*self._first, {"role": "user", "content": asked}]

    def _undisturbed(self, session: str) -> None:
        """Of the same agent: another's prefill may have had chunks of other lengths."""
        for number in range(self.n_questions):
            body = {
                "session_id": session,
                "messages": self._messages(number),
                "max_tokens": _REPLY_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": True,
                "top_logprobs": 2,
            }
            answer = self._endpoint.request("POST", "/v1/chat/completions", body)
            self._quiet.append(_quiet(answer["choices"][0]))

    def _delete(self, session: str) -> None:
        self._endpoint.request("DELETE", f"/v1/agents/{session}")

    def _lose(self, kill: Kill, session: str, held: int, number: int) -> Lost:
        """Raises BenchFailed when the figure would mean nothing."""
        blow = Blow(self.site, kill)
        reply = self._endpoint.chat(
            self._messages(number), session=session, max_tokens=_REPLY_TOKENS,
            on_delta=blow.on_delta, ignore_eos=True,
        )  # fmt: skip
        next_token_s = blow.next_token_s()
        detection_s, to, again = self._decision(session, blow.wall)
        wait_stored(self._endpoint, session)
        return Lost(
            kill, blow.node, to, detection_s, next_token_s, again, held,
            reply.prompt_tokens - held, self._quiet[number].compare(reply.text),
        )  # fmt: skip

    def _decision(self, session: str, killed: float) -> tuple[float, str, int]:
        """(seconds until another replica was looked for, which it was, tokens prefilled again)."""
        deadline = time.monotonic() + _OUTCOME_S
        while time.monotonic() < deadline:
            log = self._endpoint.request("GET", "/v1/place/log?limit=50")["data"]
            entries = [e for e in log if e["agent"] == session and e["at"] >= killed - 0.001]
            done = entries[0]["outcome"] if entries else None  # the newest comes first
            if done is not None:
                detection_s = max(0.0, entries[-1]["at"] - killed)
                return detection_s, entries[0]["node"], done["again_tokens"]
            time.sleep(0.05)
        raise BenchFailed("the router has no decision after the kill: was the answer over?")


def _quiet(choice: Any) -> Quiet:
    gaps, begin = [], 0
    for token in choice["logprobs"]["content"]:
        first, second = (entry["logprob"] for entry in token["top_logprobs"][:2])
        gaps.append((begin, first - second))
        begin += len(bytes(token["bytes"] or b"").decode("utf-8", "ignore"))
    return Quiet(choice["message"]["content"], tuple(gaps))


# ---- what came of it


def _by_kind(found: Sequence[Lost]) -> dict[str, list[Lost]]:
    """What was killed, and over which link."""
    kinds = dict.fromkeys(lost.what for lost in found)
    return {what: [lost for lost in found if lost.what == what] for what in kinds}


def _medians(of_kind: Sequence[Lost]) -> dict[str, float]:
    names = ("detection_s", "next_token_s", "again_tokens")
    return {name: round(median(getattr(x, name) for x in of_kind), 3) for name in names}


def correct(found: Sequence[Lost]) -> dict[str, bool]:
    """What must hold of every run."""
    again = f"prefilled again <= {_AGAIN_TOKENS} + the new message"
    return {
        "the text is that of the undisturbed run": all(x.equal != "differs" for x in found),
        again: all(x.again_tokens <= _AGAIN_TOKENS + x.new for x in found),
    }


def fast(found: Sequence[Lost]) -> dict[str, bool]:
    """Of the medians."""
    held = {}
    for what, of_kind in _by_kind(found).items():
        took = _medians(of_kind)
        if of_kind[0].kill == "process":
            held[f"{what}: next token <= {_PROCESS_S:g} s"] = took["next_token_s"] <= _PROCESS_S
            continue
        detection = took["detection_s"]
        held[f"{what}: detection <= {_DETECTION_S:g} s"] = detection <= _DETECTION_S
        name = f"{what}: next token <= detection + {_AFTER_S:g} s"
        held[name] = took["next_token_s"] <= detection + _AFTER_S
    return held


def _print(found: Sequence[Lost], held: dict[str, bool]) -> None:
    table = Table(title="replicas that die while they speak, median (worst)")
    for name in ("killed", "context", "noticed", "next token", "again", "new", "text"):
        table.add_column(name, no_wrap=True, justify="left" if name in _WORDS else "right")
    for what, of_kill in _by_kind(found).items():
        noticed, token = ([getattr(x, n) for x in of_kill] for n in ("detection_s", "next_token_s"))
        table.add_row(
            what,
            str(of_kill[0].held),
            *(f"{median(x):.2f} s ({max(x):.2f})" for x in (noticed, token)),
            f"{median(x.again_tokens for x in of_kill):.0f}",
            f"{median(x.new for x in of_kill):.0f}",
            ", ".join(sorted({x.equal for x in of_kill})),
        )
    show(table)
    console.print("again: tokens prefilled again; new: tokens of the question that was answered")
    ties = sum(x.equal == "near tie" for x in found)
    if ties:
        console.print(f"{ties} of {len(found)} texts part at a near tie (gap under {_NEAR_TIE})")
    for target, holds in held.items():
        console.print(f"{'holds' if holds else 'MISSED'}: {target}")
