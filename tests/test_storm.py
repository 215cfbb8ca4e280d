"""Twenty agents talk while hosts die, sleep, are cut off, come back and join: no request fails, no
text is wrong, no token is lost.

Every reply is compared with that of an engine of the test's own, which nothing happens to: greedy,
token for token. What happens when is drawn from KVFERRY_SEED, else from the day. `make test` runs
two minutes of it, `make soak` ten.
"""

from __future__ import annotations

import contextlib
import datetime
import heapq
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from actors.engines.base import Chunk
from actors.engines.fake_engine import FakeEngine
from actors.prompt import ChatTemplate
from tests.clusters import WAIT, Stream, assistant, until, user
from tests.hosts import Hosts, cluster

pytestmark = [pytest.mark.cluster]
MODEL = "fake://?step_delay=0.02"
SEED = int(os.environ.get("KVFERRY_SEED", datetime.date.today().toordinal()))
AGENTS = 20
HOSTS, SPARES = ["a", "b", "c"], ["d", "e"]
UNHURT = 2  # hosts that nothing happens to, at any time
LONGEST = 1500  # characters of a conversation; then its agent begins another one
Message = dict[str, str]


# ---- what an undisturbed run says


class Undisturbed:
    """An engine of one's own."""

    def __init__(self) -> None:
        self._engine = FakeEngine(n_seq_max=1, n_ctx=8192)
        self._template = ChatTemplate(self._engine.vocab)
        self._ids: list[int] = []  # in the engine

    def reply(self, messages: list[Message], max_tokens: int) -> tuple[str, int]:
        """(the greedy reply's text, its tokens)."""
        engine, vocab = self._engine, self._engine.vocab
        prompt = vocab.tokenize(self._template.render(messages))
        same = 0
        while same < min(len(prompt) - 1, len(self._ids)) and prompt[same] == self._ids[same]:
            same += 1
        engine.truncate(0, same)
        self._ids, new, said = self._ids[:same], prompt[same:], b""
        for n in range(max_tokens):
            token = self._step(new)
            if token in vocab.eog:
                return said.decode(), n
            said, new = said + vocab.token_bytes(token), [token]
        return said.decode(), max_tokens

    def _step(self, new: list[int]) -> int:
        for at in range(0, len(new), self._engine.n_batch):
            part = tuple(new[at : at + self._engine.n_batch])
            logits = self._engine.step([Chunk(0, part, len(self._ids), 1)])
            self._ids += part
        return int(logits[0][-1].argmax())


# ---- those who talk


@dataclass
class Tally:
    turns: int = 0
    tokens: int = 0
    postponed: Counter[int] = field(default_factory=Counter)  # by status
    failed: list[str] = field(default_factory=list)
    slowest: float = 0.0


class Talker(threading.Thread):
    """An agent's client: one turn after another, each answer checked."""

    def __init__(self, hosts: Hosts, name: str, tally: Tally, over: threading.Event) -> None:
        super().__init__(name=name, daemon=True)
        self._hosts, self._tally, self._over = hosts, tally, over
        self._random = random.Random(f"{SEED} {name}")
        self._undisturbed = Undisturbed()
        self._talks = 0
        self.session, self.messages = "", list[Message]()

    def run(self) -> None:
        while not self._over.is_set():
            if not self.messages or sum(len(m["content"]) for m in self.messages) > LONGEST:
                self._talks += 1
                self.session, self.messages = f"{self.name}-{self._talks}", []
            self.turn()
            self._over.wait(self._random.uniform(0.0, 1.0))

    def turn(self) -> str:
        """Ask, check, remember; the node that answered, "" if none did as it must."""
        draw = self._random
        words = "".join(draw.choices("abcdefgh ", k=draw.randrange(10, 200)))
        self.messages.append(user(f"{self.session}, {len(self.messages)}: {words}"))
        max_tokens, streamed = draw.randrange(5, 60), draw.random() < 0.7
        text, n_tokens = self._undisturbed.reply(self.messages, max_tokens)
        node, began = "", time.monotonic()
        try:
            node = self._asked(max_tokens, text, n_tokens, streamed=streamed)
        except Exception as error:
            after = time.monotonic() - began
            what = f"{type(error).__name__}: {error}"
            self._tally.failed.append(f"{self.session}, after {after:.1f} s: {what}")
        self.messages.append(assistant(text))
        self._tally.turns += 1
        self._tally.tokens += n_tokens
        self._tally.slowest = max(self._tally.slowest, time.monotonic() - began)
        return node

    def _asked(self, max_tokens: int, text: str, n_tokens: int, *, streamed: bool) -> str:
        deadline = time.monotonic() + WAIT
        while True:
            answer = self._once(max_tokens, text, n_tokens, streamed=streamed)
            if isinstance(answer, str):
                return answer
            assert answer > 0, "a refusal without Retry-After"
            assert time.monotonic() < deadline, f"refused for {WAIT:g} s"
            time.sleep(answer)

    def _once(self, max_tokens: int, text: str, n_tokens: int, *, streamed: bool) -> str | float:
        """The node; or, refused for now, how long to wait."""
        body = {"messages": self.messages, "max_tokens": max_tokens, "temperature": 0}
        if streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        with httpx.stream(
            "POST",
            f"{self._hosts.url}/v1/chat/completions",
            json=body,
            headers={"x-session-id": self.session},
            timeout=WAIT,
        ) as response:
            if response.status_code in (429, 503):
                self._tally.postponed[response.status_code] += 1
                return float(response.headers.get("retry-after", 0))
            assert response.status_code == 200, response.read()
            if streamed:
                stream = Stream(response)
                said, usage = stream.rest(), stream.usage
                assert usage is not None
                completion = usage.completion
            else:
                response.read()
                answer = response.json()
                said = answer["choices"][0]["message"]["content"]
                completion = answer["usage"]["completion_tokens"]
            assert said == text, f"{said!r} instead of {text!r}"
            assert completion == n_tokens
            return response.headers["x-kvferry-node"]


# ---- what happens to the hosts


class Storm(threading.Thread):
    """One event after another, each with what ends it some seconds later."""

    def __init__(self, hosts: Hosts, over: threading.Event) -> None:
        super().__init__(name="storm", daemon=True)
        self._hosts, self._over = hosts, over
        self._random = random.Random(SEED)
        self._ends: list[tuple[float, int, str, Callable[[], None]]] = []
        self._hurt: set[str] = set()
        self._spares = [*SPARES]
        self._began = time.monotonic()
        self.seen: Counter[str] = Counter()
        self.error: BaseException | None = None

    def run(self) -> None:
        kinds = [self.replica, self.raylet, self.host, self.pause, self.cut, self.new, self.router]
        deck: list[Callable[[str], None]] = []
        try:
            while not self._over.wait(self._random.uniform(2.0, 5.0)):
                self._end_what_is_due()
                for host in set(self._hosts.devices) - self._hurt:  # it heard late of its death
                    self._hosts.rejoin(host)
                deck = deck or self._random.sample(kinds, len(kinds))
                able = self._able()
                if len(able) > UNHURT:
                    with contextlib.suppress(StopIteration):  # it is still starting
                        deck[-1](self._random.choice(able))
                        deck.pop()
        except BaseException as error:
            self.error = error

    def _able(self) -> list[str]:
        """Hosts that something may happen to: whatever did before is over."""
        with contextlib.suppress(AssertionError, httpx.TransportError):  # the router is starting
            nodes = self._hosts.nodes()
            ready = {name for name, node in nodes.items() if node["replica"] == "ready"}
            return sorted(ready - self._hurt)
        return []

    def _end_what_is_due(self) -> None:
        while self._ends and self._ends[0][0] <= time.monotonic():
            _, _, host, end = heapq.heappop(self._ends)
            end()
            self._hurt.discard(host)

    def _note(self, what: str, host: str, seconds: float, end: Callable[[], None]) -> None:
        at = time.monotonic()
        print(f"{at - self._began:6.1f} s: {what} {host}, {seconds:.1f} s", flush=True)
        self.seen[what] += 1
        self._hurt.add(host)
        heapq.heappush(self._ends, (at + seconds, sum(self.seen.values()), host, end))

    def _back(self, host: str) -> Callable[[], None]:
        """Its node starts again, if it is dead; its end is told by the raylet's."""
        return lambda: self._hosts.rejoin(host)

    def replica(self, host: str) -> None:
        self._hosts.device_of(host).kill()
        self._note("replica killed on", host, 3.0, lambda: None)

    def raylet(self, host: str) -> None:
        self._hosts[host].raylet.kill()
        self._note("raylet killed on", host, self._random.uniform(4.0, 8.0), self._back(host))

    def host(self, host: str) -> None:
        self._hosts[host].kill()
        self._note("killed", host, self._random.uniform(2.0, 8.0), self._back(host))

    def pause(self, host: str) -> None:
        def wake() -> None:
            self._hosts[host].wake()
            self._later(host)

        self._hosts[host].pause()
        self._note("paused", host, self._random.uniform(2.0, 12.0), wake)

    def cut(self, host: str) -> None:
        def heal() -> None:
            self._hosts[host].heal()
            self._later(host)

        self._hosts[host].cut()
        self._note("cut off", host, self._random.uniform(2.0, 12.0), heal)

    def _later(self, host: str) -> None:
        """A raylet that was taken for dead ends itself once it hears of that."""
        self._note("back:", host, 5.0, self._back(host))

    def new(self, _: str) -> None:
        if self._spares:
            host = self._spares.pop(0)
            self._hosts.join(host)
            self._note("joins:", host, 5.0, lambda: None)

    def router(self, _: str) -> None:
        self._hosts["head"].process("ray::PlacementRouter").kill()
        self._note("router killed on", "head", 0.0, lambda: None)


# ---- the two together


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    settings = {"codec": "f16", "request_timeout_s": 50}
    with cluster(HOSTS, SPARES, model=MODEL, **settings) as running:
        yield running


def weather(hosts: Hosts, seconds: float, kinds: int) -> None:
    """`kinds`: so many of the events must have happened, which take longer on a busy machine."""
    print(f"KVFERRY_SEED={SEED}, {seconds:g} s, {AGENTS} agents on {' '.join(hosts.devices)}")
    tally, over = Tally(), threading.Event()
    talkers = [Talker(hosts, f"agent{i}", tally, over) for i in range(AGENTS)]
    storm = Storm(hosts, over)
    for thread in (storm, *talkers):
        thread.start()
    over.wait(seconds)
    over.set()
    for thread in (storm, *talkers):
        thread.join(2 * WAIT)
        assert not thread.is_alive(), f"{thread.name} does not end"
    print(tally, dict(storm.seen), flush=True)
    assert storm.error is None, repr(storm.error)
    hosts.restore()
    print(f"{hosts.metric('kvferry_failovers_total'):g} failovers", flush=True)
    for talker in talkers:  # everybody is served, by one owner
        node = talker.turn()
        if node:
            hosts.check_owner(talker.session, node)
    assert tally.failed == []
    assert tally.turns > seconds  # or it proves little
    assert len(storm.seen) >= kinds
    assert hosts.metric("kvferry_failovers_total") > 0

    def idle() -> bool:
        return not any(node["running"] or node["waiting"] for node in hosts.nodes().values())

    until(idle, "the end of all turns")


@pytest.mark.timeout(360)
def test_two_minutes(hosts: Hosts) -> None:
    weather(hosts, 120.0, kinds=3)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ten_minutes(hosts: Hosts) -> None:
    weather(hosts, 600.0, kinds=8)
