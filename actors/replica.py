"""ModelReplica: the actor's face of one device. Thin: streams, ownership calls, reports.

Hosted by Ray (cluster.pool) as an asynchronous actor, but imports no Ray. Its event loop only
passes messages; the engine has a thread of its own, so status answers while a step runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import TypeVar

from actors.branches import UNKNOWN, Before
from actors.carrier import Carried, Carriers
from actors.checks import check_packages
from actors.config import ReplicaConfig
from actors.engine_settings import speculation_of
from actors.errors import ActorError, EngineFault, ModelUnavailable
from actors.exporter import Held
from actors.handoff import Copied, Frozen
from actors.loop import LoopConfig, ReplicaLoop
from actors.memory import Memory, MemoryConfig
from actors.models import open_draft, open_local, open_profiled, open_store
from actors.outbox import Outbox, interval
from actors.preload import Fetched
from actors.report import (
    HeldPrefixes,
    ReplicaInfo,
    ReplicaStatus,
    local_status,
    status_of,
    versions,
)
from actors.scheduler import SchedulerConfig
from actors.turn import Alive, StreamItem, TurnFailed, TurnRequest, is_last
from actors.weights import WeightsProvider, provide
from storage.card import AgentId, Owner
from storage.codec import get_codec, refused_layers, row_bytes
from storage.errors import StorageError, StoreUnavailable
from storage.peers import BlockSource
from storage.tiers import Tiers

T = TypeVar("T")
logger = logging.getLogger(__name__)
_CALL_TIMEOUT_S = 30.0
_BEAT_S = 0.5
_MAX_CODEC_THREADS = 4  # memory is the limit beyond that


class ModelReplica:
    """One model on one device. Every call has a deadline and may raise ActorError."""

    def __init__(
        self, config: ReplicaConfig, node: str, weights: WeightsProvider | None = None
    ) -> None:
        """Loads the model, which `weights` may have to bring first. Raises ModelUnavailable,
        StoreUnavailable, WeightsUnavailable, ValueError."""
        check_packages()
        if weights is not None:
            config = provide(config, weights, node)
        store = open_store(config)
        store.probe()
        codec = get_codec(config.codec)
        speculation = speculation_of(config)
        engine, profile = open_profiled(config)
        draft = open_draft(config, engine)
        if not any(group.part == "full" for group in engine.key.spec.groups):
            raise ModelUnavailable("every layer of this model slides: nothing names its blocks")
        for reason, layers in refused_layers(engine.key.spec, codec).items():
            raise ModelUnavailable(f"layers {layers}: {reason}; codec = 'f16' stores any")
        self._owner = Owner(node, secrets.token_hex(8))
        self._config = config
        local = open_local(config, node, engine.key)
        tiers = Tiers(store, engine.key.spec, codec, config.pool_bytes, local)
        threads = min(_MAX_CODEC_THREADS, config.threads or config.cores or os.cpu_count() or 1)
        memory_config = MemoryConfig(codec_threads=threads)
        self._memory = Memory(
            store, engine.key, codec, tiers, self._owner, memory_config, {"engine": engine.name}
        )
        scheduler = SchedulerConfig(
            config.max_waiting, config.prefill_chunk, config.prefill_chunk_busy, config.max_step_s
        )
        loop_config = LoopConfig(
            scheduler,
            default_max_tokens=config.max_tokens,
            turn_timeout_s=config.turn_timeout_s,
            sync=config.durability == "sync",
            speculation=speculation,
        )
        self._loop = ReplicaLoop(engine, self._memory, loop_config, node, draft)
        self._loop.warm()
        if profile:
            figures = profile.figures
            self._loop.rates.expect(figures.prefill_tokens_per_s, figures.decode_s)
        self._prefixes = HeldPrefixes(engine.key.spec.block_tokens)
        threading.Thread(target=self._recover, name="recover", daemon=True).start()
        self._carriers = Carriers(self.run_turn)
        self._workers = ThreadPoolExecutor(8, "replica")
        self._met: Sequence[BlockSource] = ()

    def info(self) -> ReplicaInfo:
        engine = self._loop.engine
        return ReplicaInfo(
            node=self._owner.node,
            incarnation=self._owner.incarnation,
            pid=os.getpid(),
            raylet_pid=os.getppid(),
            engine=engine.name,
            device=engine.device,
            n_ctx=engine.n_ctx,
            slots=engine.n_seq_max,
            codec=self._config.codec,
            key=engine.key,
            kv_bytes=engine.kv_bytes + self._loop.speculator.kv_bytes,
            row_bytes=row_bytes(engine.key.spec, get_codec(self._config.codec)),
            versions=versions(),
        )

    def _recover(self) -> None:
        try:
            self._memory.tiers.probe_links()
        except StorageError as error:  # the first reads will tell
            logger.warning("the links are not measured yet: %s", error)
        self._memory.recover()

    def close(self) -> None:
        """Store what is queued, free the engine; for replicas that are no actors."""
        self._loop.close()

    # ---- turns

    async def carry(self, name: str, request: TurnRequest) -> AsyncGenerator[list[Carried], None]:
        """Run a turn on a stream that others may board."""
        async with aclosing(self._carriers.carry(name, request)) as lists:
            async for carried in lists:
                yield carried

    async def board(self, name: str, request: TurnRequest) -> bool:
        """Run a turn on an open stream; False: there is none of that name."""
        return self._carriers.board(name, request)

    async def attend(self, name: str) -> None:
        """Who reads a stream is still there."""
        self._carriers.attend(name)

    async def run_turn(self, request: TurnRequest) -> AsyncGenerator[list[StreamItem], None]:
        """Items as they come, those that are ready together in a list. Closed, it cancels it."""
        items = Outbox(lambda: interval(request, len(self._loop.scheduler.running)))
        try:
            self._loop.submit(request, items.put)
        except ActorError as error:
            yield [TurnFailed(request.attempt, error)]
            return
        beating = asyncio.create_task(self._beat(request.attempt, items))
        try:
            ready: list[StreamItem] = []
            while not is_last(ready):
                ready = await items.take()
                self._prefixes.note(request, ready)
                yield ready
        finally:
            beating.cancel()
            self._loop.cancel(request.id, request.attempt)

    async def _beat(self, attempt: int, items: Outbox) -> None:
        """Signs of life where there are no others, while the engine's thread lives and is not
        stuck."""
        loop = self._loop
        while loop.alive and not loop.stuck:
            rest = _BEAT_S - items.silent_s
            if rest <= 0:
                items.put(Alive(attempt))
                rest = _BEAT_S
            await asyncio.sleep(rest)
        reason = "a step of the engine does not end" if loop.alive else "the engine's thread died"
        items.put(TurnFailed(attempt, EngineFault(reason)))

    async def cancel(self, turn_id: str, attempt: int | None = None) -> None:
        """End a turn, or only this attempt at it, at the next token, or before it has begun."""
        self._carriers.cancel(turn_id, attempt)
        self._loop.cancel(turn_id, attempt)

    # ---- ownership

    async def adopt(
        self, agent: AgentId, frozen: Frozen | None = None, peer: BlockSource | None = None
    ) -> int:
        """Claim the agent; returns the epoch. What was prefetched is its, or dropped, and so are
        the rows that the owner gave with the freeze. With the card on the disk of the node that had
        it (`peer`), what the shared store lacks is ours to bring there. Raises Fenced,
        StoreUnavailable."""
        preloader, frozen = self._loop.preloader, frozen or Frozen()
        tail = frozen.tail
        before = Before(frozen.card, peer, frozen.latest)
        claiming = self._in_thread(lambda: self._memory.adopt(agent, before))
        loading = self._in_thread(lambda: preloader.extend(agent, tail))
        try:
            epoch, _ = await asyncio.gather(claiming, loading)
        except (StorageError, ActorError):
            await self._on_loop(lambda: preloader.drop(agent))
            raise
        await self._on_loop(lambda: preloader.claimed(agent, tail))
        return epoch

    async def precopy(self, agent: AgentId, near: bool = False, store: bool = True) -> Copied:
        """What the shared store has of an agent that runs on, or this node's disk (`near`); with
        `store`, once what it lacked has been stored. Raises AgentMoved."""
        handoff = self._loop.handoff
        if store:
            await _done(await self._on_loop(lambda: handoff.precopy(agent, near=near)))
        return await self._on_loop(lambda: handoff.copied(agent, near=near))

    async def freeze(self, agent: AgentId, held: Held | None = None, near: bool = False) -> Frozen:
        """Stop the agent at a token boundary. Its card is committed where the shared store, or this
        node's disk (`near`), lacks more than goes with the answer or is computed soon. Raises
        AgentMoved, and StoreUnavailable where that fails: it is frozen all the same."""
        handoff, asked = self._loop.handoff, time.monotonic()
        waited_s, (tail, tried) = await self._on_loop(
            lambda: (time.monotonic() - asked, handoff.freeze(agent, held, near=near))
        )
        await _done(tried)
        if near or not self._memory.is_stored(agent):
            enough = await self._on_loop(lambda: handoff.lacks_little(agent, tail, near=near))
            if not enough:
                place = "this node's disk" if near else self._config.store
                raise StoreUnavailable(place, f"it lacks rows of agent {agent}")
        card, latest = handoff.answer(agent)
        return Frozen(card if near else None, tail, latest, waited_s)

    async def thaw(self, agent: AgentId) -> None:
        """A migration failed: go on with the agent after claiming it again."""
        await self._on_loop(lambda: self._loop.handoff.thaw(agent))

    async def release(self, agent: AgentId) -> None:
        """The agent is another replica's now."""
        await self._on_loop(lambda: self._loop.handoff.release(agent))

    async def meet(self, disks: Sequence[BlockSource]) -> None:
        """Those of the cluster's nodes, before they are needed: a process that has not met an actor
        stands still until Ray's head has told it about that."""
        self._met = disks
        if (tiers := self._memory.tiers).local is not None:  # else blocks come from the store
            tiers.peers.meet(disk for disk in disks if disk.node != self._owner.node)

    async def prefetch(self, agent: AgentId, was: Before = UNKNOWN) -> Fetched:
        """Bring an agent's rows into RAM and engine before it is adopted. Raises StoreUnavailable,
        EngineFault."""
        fetching = self._in_thread(lambda: self._loop.preloader.fetch(agent, was))
        names = self._memory.store.condemned.names  # which the claim will ask for
        return (await asyncio.gather(fetching, self._in_thread(lambda: names(agent.tenant))))[0]

    async def delete(self, agent: AgentId) -> None:
        """Forget the agent for good. Raises AgentMoved while a turn runs, Fenced."""
        await self._on_loop(lambda: self._loop.drop(agent))
        await self._in_thread(lambda: self._memory.delete(agent))

    async def evict(self) -> int:
        """Empty idle sequences and the pool, as memory pressure would; returns sequences freed.
        What is not stored yet stays."""
        await _done(self._memory.commits.settle())
        freed = await self._on_loop(self._loop.residency.evict_idle)
        self._memory.tiers.pool.evict_all()
        self._prefixes.clear()
        return freed

    async def flush(self) -> None:
        """Done when everything handed over so far is stored, or the store has refused it."""
        await _done(await self._on_loop(self._loop.flush))

    # ---- reports

    async def status(self, since: float = 0.0) -> ReplicaStatus:
        """Raises EngineFault when the engine's thread has died or hangs: replace the replica."""
        loop, memory = self._loop, self._memory
        if not loop.alive or loop.stuck:
            raise EngineFault(f"the engine's thread {'is stuck' if loop.alive else 'has died'}")
        at = time.time()
        # Their locks are held while files are removed: beats must not wait for that.
        known, local = await asyncio.to_thread(lambda: (memory.agents(), local_status(memory)))
        return status_of(loop, at, since, known, local, self._prefixes.held())

    async def _on_loop(self, function: Callable[[], T]) -> T:
        return await _done(self._loop.call(function))

    async def _in_thread(self, function: Callable[[], T]) -> T:
        future: Future[T] = self._workers.submit(function)
        return await _done(future)


async def _done(future: Future[T]) -> T:
    """Raises TimeoutError, and what the future's work raised."""
    async with asyncio.timeout(_CALL_TIMEOUT_S):
        return await asyncio.wrap_future(future)
