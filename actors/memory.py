"""The agents this replica owns: claimed from the store, remembered here, committed as cards.

A branch is one line of token ids; its rows lie in the engine (see residency), in the Q4 pool, on
the node's disk, in the shared store, or in several of these (see rows, commits). Knows no engine
and no Ray.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from actors import journal
from actors.branches import (
    UNKNOWN,
    AgentMemory,
    Before,
    Branch,
    branch_of,
    card_of,
    note_shared,
    state_of,
    with_runs,
)
from actors.commits import Commits
from actors.errors import AgentMoved
from actors.faults import Faults
from actors.matching import Match
from actors.outage import Outage
from actors.persister import Persister
from actors.rows import Rows
from actors.turn import CacheState
from storage.card import AgentId, BranchCard, CacheCard, OpenTurn, Owner
from storage.claims import new_card
from storage.codec import Codec, codec_parameters
from storage.errors import StorageError, StoreUnavailable
from storage.local import LocalTier
from storage.spec import CompatibilityKey
from storage.store import CacheStore
from storage.tiers import Tiers

_PROBE_S = 2.0  # for a store to be seen again
_SEEN_S = 1.0  # that a migration's claim stands, by its own look, until the turn comes
_LOOK_S = 5.0  # for a look at an agent's claim: before its turn, and before what takes longer


@dataclass(frozen=True)
class MemoryConfig:
    max_branches: int = 4  # per agent
    max_agents: int = 4096  # records of idle agents in RAM; the store has them all
    codec_threads: int = 1  # that encode or decode one block


class Memory:
    """All agents this replica owns. Thread-safe; the store is reached outside the lock."""

    def __init__(
        self,
        store: CacheStore,
        key: CompatibilityKey,
        codec: Codec,
        tiers: Tiers,
        owner: Owner,
        config: MemoryConfig,
        provenance: dict[str, str],
    ) -> None:
        self.store, self.key, self.codec, self.tiers = store, key, codec, tiers
        self.owner, self.config = owner, config
        self.persister, self.faults = Persister(), Faults()
        self.rows = Rows(key, codec, tiers, self.persister, self.faults, config.codec_threads)
        store.on_fault = self.faults.card
        self.outage = Outage(lambda: store.files.names(store.files.path("probe"), _PROBE_S))
        if tiers.local is not None:
            tiers.local.store.on_fault = self.faults.card
        parts = self.rows, tiers, self.persister, self.faults, self.outage
        self.commits = Commits(*parts, self.forget)
        self._provenance = provenance
        self._agents: OrderedDict[AgentId, AgentMemory] = OrderedDict()
        self._lock = threading.RLock()
        self._claiming = [threading.Lock() for _ in range(64)]  # one agent is opened by one thread

    # ---- owning

    def template(self, agent: AgentId) -> CacheCard:
        return new_card(
            agent,
            self.key,
            self.codec.name,
            self.owner,
            codec_parameters=codec_parameters(self.key.spec, self.codec),
            provenance=self._provenance,
        )

    def open(self, agent: AgentId) -> AgentMemory:
        """The agent's memory, owned by this replica: known, or claimed from the store.

        While the store does not answer, serving goes on: from what is known here, or for one turn
        whose memory is not kept, as for an agent that is frozen. Raises Fenced when another replica
        wins the claim, AgentMoved while it is frozen here.
        """
        try:
            with self._claiming[hash(agent) % len(self._claiming)]:
                return self._known(agent) or self._claimed(agent)
        except StoreUnavailable as error:
            self.outage.began()
            self.faults.count("unclaimed", error)
            known = self.get(agent)
            return known if known and known.state == "owned" else self.one_off(agent)

    def _known(self, agent: AgentId) -> AgentMemory | None:
        memory = self.get(agent)
        if memory is None or memory.card is None:
            return None
        if memory.state == "frozen" and not self.outage.lasts:
            raise AgentMoved(f"agent {agent} is being migrated")
        seen, memory.seen = memory.seen, -math.inf
        if time.monotonic() - seen < _SEEN_S:
            return memory
        self._reach()
        if self.store.epoch(agent, self.key, _LOOK_S) != memory.card.epoch:
            self.forget(memory)  # claimed elsewhere while we looked away
            return None
        return memory

    def _reach(self) -> None:
        """Raises StoreUnavailable at once while nobody expects an answer."""
        if self.outage.lasts:
            raise StoreUnavailable(self.store.url, "it has not answered since an earlier call")

    def _claimed(self, agent: AgentId, was: Before = UNKNOWN) -> AgentMemory:
        self._reach()
        claim = self.store.claim(
            self.template(agent), after=was.epoch, look_s=_LOOK_S, known=was.known(self.key)
        )
        before = claim.previous
        here = before is None or before.owner.node == self.owner.node
        card = claim.card
        branches = [branch_of(branch, "shared") for branch in card.branches]
        if was.handed is not None and journal.goes_on(was.handed, before):
            branches = self._taken_over(was.handed, card)
            ahead: CacheCard | None = replace(was.handed, branches=self._as_stored(branches))
        else:
            ahead = journal.ahead(self.tiers.local, self.owner, agent, before)
            if ahead is not None:
                branches = [branch_of(branch, "local") for branch in ahead.branches]
                note_shared(branches, card)
        if ahead is not None:
            card = replace(card, generation=ahead.generation, branches=ahead.branches)
        self.rows.know(branches)
        origin: CacheState = "warm" if here else "remote"
        memory = AgentMemory(agent, card, origin, branches, shared=claim.stored, peer=was.peer)
        with self._lock:
            self._agents[agent] = memory
            self._drop_idle_records()
        if ahead is not None and self.tiers.local is not None:
            try:  # before a crash can part the claim from what it leads on to
                self.tiers.local.write_card(card)
            except StoreUnavailable as error:
                self.faults.count("store_unavailable", error)
            self.commits.later(memory)
        return memory

    def _taken_over(self, handed: CacheCard, shared: CacheCard) -> list[Branch]:
        """Branches of another node's card, with the blocks that this node's disk or the shared
        store has. The others are stored from RAM with the next commit, or computed again."""
        branches = [branch_of(branch, "local") for branch in handed.branches]
        note_shared(branches, shared)
        for run in (run for branch in branches for run in branch.runs):
            local = self.tiers.local
            run.local = journal.held(local, handed.agent, run) if local is not None else {}
        return branches

    def _as_stored(self, branches: list[Branch]) -> tuple[BranchCard, ...]:
        window = self.key.spec.window
        return tuple(with_runs(state_of(b, card_of(b)), "local", window) for b in branches)

    def recover(self) -> None:
        """Own again what this node's disk holds and the shared store lacks, and bring it there.
        Other nodes' claims since then win. Raises nothing of storage."""
        local = self.tiers.local
        if local is None:
            return
        for card in list(local.cards()):
            try:
                with self._claiming[hash(card.agent) % len(self._claiming)]:
                    if self.get(card.agent) is None:
                        self._recover(card, local)
            except StorageError as error:
                self.faults.count("store_unavailable", error)

    def _recover(self, card: CacheCard, local: LocalTier) -> None:
        loaded = self.store.latest(card.agent, self.key)
        shared = loaded.card if loaded is not None else None
        if journal.ahead(local, self.owner, card.agent, shared) is not None:
            self._claimed(card.agent)
        elif self.store.epoch(card.agent, self.key) > card.epoch:
            local.forget(card.agent, card.epoch)

    def adopt(self, agent: AgentId, before: Before = UNKNOWN) -> int:
        """Claim the agent for a migration; returns the epoch. Raises Fenced, StoreUnavailable."""
        with self._claiming[hash(agent) % len(self._claiming)]:
            if owned := self.get(agent):
                owned.seen = -math.inf  # this time it looks
            memory = self._known(agent) or self._claimed(agent, before)
        memory.seen = time.monotonic()
        assert memory.card is not None
        return memory.card.epoch

    def reclaim(self, memory: AgentMemory) -> None:
        """Own a frozen agent again: its next epoch. Raises Fenced if the target claimed it,
        StoreUnavailable soon where nothing answers: the persister's other work waits for this."""
        assert memory.card is not None, "a one-off agent is never frozen"
        self._reach()
        after = memory.card.epoch
        claim = self.store.claim(self.template(memory.agent), after=after, look_s=_LOOK_S)
        with self._lock:
            memory.card, memory.shared = claim.card, claim.stored
            memory.state = "owned"

    def one_off(self, agent: AgentId) -> AgentMemory:
        """Memory for one turn, never stored."""
        return AgentMemory(agent, None, "cold")

    def forget(self, memory: AgentMemory) -> None:
        """This replica no longer holds the agent; what is queued for it is not committed."""
        with self._lock:
            memory.state = "released"
            if self._agents.get(memory.agent) is memory:
                del self._agents[memory.agent]
        self.commits.forget(memory)

    def get(self, agent: AgentId) -> AgentMemory | None:
        with self._lock:
            return self._agents.get(agent)

    def agents(self) -> list[AgentMemory]:
        with self._lock:
            return list(self._agents.values())

    def _drop_idle_records(self) -> None:
        for memory in list(self._agents.values()):
            if len(self._agents) <= self.config.max_agents:
                return
            busy = self.commits.busy(memory) or any(b.turn for b in memory.branches)
            if memory.state == "owned" and not busy:
                self.forget(memory)

    def enter(self, memory: AgentMemory, match: Match, turn: OpenTurn, tokens: list[int]) -> None:
        """The turn begins: the branch now says `tokens`; rows past the match are cut off."""
        branch, source, keep = match.branch, match.source, match.keep
        branch.replies = [r for r in (source or branch).replies if r.stop <= keep]
        branch.tokens, branch.turn, branch.last_used = tokens, turn, time.time()
        if source is not None:
            self.rows.fork(memory, source, branch, keep)
        elif keep < branch.exported:
            self.rows.cut(memory, branch, keep)
        if match.dropped in memory.branches:
            memory.branches.remove(match.dropped)
        if branch not in memory.branches:
            memory.branches.append(branch)
        memory.last_used = memory.changed = branch.last_used
        with self._lock:
            if memory.agent in self._agents:
                self._agents.move_to_end(memory.agent)

    def is_stored(self, agent: AgentId) -> bool:
        """Whether the shared store has all of it that was handed over."""
        memory = self.get(agent)
        return memory is None or self.commits.is_stored(memory)

    def stored(self, agent: AgentId, was: Before = UNKNOWN) -> AgentMemory | None:
        """The agent's last branch, as the shared store has it, without owning it; with a card that
        is on a peer's disk, as that has it, and the others behind it. None when it has none, or it
        is owned here. Raises StoreUnavailable."""
        loaded = was.known(self.key)
        if loaded is None:
            self._reach()
            loaded = self.store.latest(agent, self.key, _LOOK_S)
        shared = loaded.card if loaded is not None else None
        near = was.handed is not None and journal.goes_on(was.handed, shared)
        card = was.handed if near else shared
        cards = sorted(card.branches if card else (), key=lambda b: -b.last_used)
        if card is None or not cards or self.get(agent) is not None:
            return None
        if card.codec != self.codec.name:
            return None
        branches = [branch_of(b, "local" if near else "shared") for b in cards]
        if shared is not None:
            note_shared(branches, shared)
        shown = branches if near else branches[:1]
        return AgentMemory(agent, card, "remote", shown, peer=was.peer)

    def delete(self, agent: AgentId) -> None:
        """Forget the agent here and bury it in the store. Raises Fenced, StoreUnavailable."""
        if (memory := self.get(agent)) is not None:
            self.forget(memory)
        self.store.delete(self.template(agent))
