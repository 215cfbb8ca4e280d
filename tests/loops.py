"""Builders for tests that run turns on a ReplicaLoop: loops, conversations, streams, stores."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.engines.base import Engine
from actors.loop import LoopConfig, ReplicaLoop
from actors.memory import AgentMemory, Memory, MemoryConfig
from actors.turn import (
    Progress,
    Resume,
    SamplingParams,
    StreamItem,
    Tokens,
    TurnFailed,
    TurnFinished,
    TurnMoved,
    TurnRequest,
    TurnStarted,
)
from storage.card import AgentId, Owner
from storage.codec import get_codec
from storage.local import LocalTier
from storage.store import CacheStore
from storage.tiers import Tiers

WAIT = 30.0  # seconds until a test gives up on an event


def agent_id(session: str = "a") -> AgentId:
    return AgentId("default", session)


def make_loop(
    engine: Engine,
    store: CacheStore | Path,
    *,
    codec: str = "f16",
    node: str = "n0",
    pool_bytes: int = 1 << 30,
    loop: LoopConfig | None = None,
    memory: MemoryConfig | None = None,
    local: Path | None = None,
    local_bytes: int = 1 << 30,
    draft: Engine | None = None,
) -> ReplicaLoop:
    """A replica without Ray. The caller closes it."""
    if isinstance(store, Path):
        store = CacheStore(str(store))
    chosen = get_codec(codec)
    disk = LocalTier(CacheStore(str(local)), engine.key, local_bytes) if local else None
    tiers = Tiers(store, engine.key.spec, chosen, pool_bytes, disk)
    made = Memory(
        store, engine.key, chosen, tiers, Owner(node, "life"), memory or MemoryConfig(), {}
    )
    return ReplicaLoop(engine, made, loop or LoopConfig(), node, draft)


@dataclass
class Answer:
    """A turn from its first item to its last."""

    started: TurnStarted | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    last: TurnFinished | TurnMoved | TurnFailed | None = None

    @property
    def prompt(self) -> list[int]:
        assert self.started is not None, self.last
        return list(self.started.prompt_ids)

    @property
    def cached(self) -> int:
        assert self.started is not None, self.last
        return self.started.cached_tokens

    @property
    def prefilled(self) -> int:
        return len(self.prompt) - self.cached

    @property
    def cache(self) -> str:
        assert self.started is not None, self.last
        return self.started.cache

    @property
    def reason(self) -> str:
        assert isinstance(self.last, TurnFinished), self.last
        return self.last.reason


class Stream:
    """One turn's sink. Checks the protocol as items arrive; `violations` must stay empty."""

    def __init__(self, request: TurnRequest) -> None:
        self.request = request
        self.answer = Answer()
        self.violations: list[str] = []
        self._items: queue.SimpleQueue[StreamItem] = queue.SimpleQueue()
        self._emitted = len(request.resume.emitted) if request.resume else 0
        self._started = self._ended = False

    def __call__(self, item: StreamItem) -> None:
        if self._ended:
            self.violations.append(f"{item} after the last item")
        if item.attempt != self.request.attempt:
            self.violations.append(f"{item} of another attempt")
        if isinstance(item, TurnStarted):
            if self._started:
                self.violations.append("started twice")
            self._started = True
        elif isinstance(item, Tokens):
            if item.index != self._emitted or not item.ids or not self._started:
                self.violations.append(f"{item} at {self._emitted}")
            self._emitted += len(item.ids)
        elif isinstance(item, TurnFinished) and item.index != self._emitted:
            self.violations.append(f"{item} at {self._emitted}")
        self._ended |= isinstance(item, (TurnFinished, TurnMoved, TurnFailed))
        self._items.put(item)

    def __iter__(self) -> Iterator[StreamItem]:
        """Items until the last, put together in `answer`."""
        while self.answer.last is None:
            item = self._items.get(timeout=WAIT)
            if isinstance(item, TurnStarted):
                self.answer.started = item
            elif isinstance(item, Tokens):
                self.answer.ids += item.ids
                self.answer.text += item.text
            elif not isinstance(item, Progress):
                self.answer.last = item
                self.answer.text += item.text if isinstance(item, TurnFinished) else ""
            yield item

    def take(self, n: int) -> list[int]:
        """Wait until the reply has at least n ids of this attempt."""
        for _ in self:
            if len(self.answer.ids) >= n:
                break
        return self.answer.ids

    def result(self) -> Answer:
        """The whole answer, whatever its end."""
        for _ in self:
            pass
        assert not self.violations
        return self.answer


def start(
    loop: ReplicaLoop,
    messages: list[dict[str, str]],
    *,
    session: str = "a",
    n: int | None = 20,
    temperature: float = 0.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    turn_id: str = "turn",
    persist: bool = True,
    attempt: int = 0,
    resume: Resume | None = None,
    **more: Any,
) -> Stream:
    """`more`: further fields of SamplingParams."""
    sampling = SamplingParams(n, temperature, seed=seed, stop=stop, **more)
    request = TurnRequest(
        turn_id, agent_id(session), tuple(messages), sampling, persist, attempt, resume
    )
    stream = Stream(request)
    loop.submit(request, stream)
    return stream


def run(loop: ReplicaLoop, messages: list[dict[str, str]], **options: object) -> Answer:
    """One turn, to its end."""
    return start(loop, messages, **options).result()  # type: ignore[arg-type]


def talk(
    loop: ReplicaLoop, messages: list[dict[str, str]], question: str, **options: object
) -> Answer:
    """One more question of a conversation; its reply is appended to `messages`."""
    messages.append(user(question))
    answer = run(loop, messages, **options)
    messages.append(assistant(answer.text))
    return answer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def settle(loop: ReplicaLoop) -> None:
    """Until finished turns have handed over their rows and the store has what it gets, or has
    refused it."""
    done = threading.Event()

    def look() -> None:
        if loop._book.draining:
            loop.call(look)
        else:
            done.set()

    loop.call(look)
    assert done.wait(WAIT)
    loop.memory.commits.settle().result(WAIT)


def memory_of(loop: ReplicaLoop, session: str = "a") -> AgentMemory:
    memory = loop.memory.get(agent_id(session))
    assert memory is not None
    return memory


def evict(loop: ReplicaLoop, *, pool: bool = False) -> None:
    """All idle agents leave the engine; with `pool` their encoded rows leave RAM, too."""
    settle(loop)
    loop.call(loop.residency.evict_idle).result(WAIT)
    if pool:
        loop.memory.tiers.pool.evict_all()


def block_files(store: Path) -> dict[str, bytes]:
    """Every stored block and segment, by name."""
    return {p.name: p.read_bytes() for p in sorted((store / "blocks").rglob("*.safetensors"))}
