"""The agents this replica owns: claimed from the store, remembered here, committed as cards.

A branch is one line of token ids; its rows lie in the engine (see residency), in the Q4 pool, in
the store, or in several of these (see rows). Knows no engine and no Ray.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from actors.branches import AgentMemory, Branch, branch_of, card_of, with_runs
from actors.errors import AgentMoved
from actors.faults import Faults
from actors.matching import Match
from actors.persister import Persister
from actors.rows import Rows
from storage.card import AgentId, BranchCard, CacheCard, OpenTurn, Owner
from storage.codec import Codec, codec_parameters
from storage.errors import Fenced, StoreUnavailable
from storage.spec import CompatibilityKey
from storage.store import CacheStore, new_card
from storage.tiers import Tiers


@dataclass(frozen=True)
class MemoryConfig:
    max_branches: int = 4  # per agent
    max_agents: int = 4096  # records of idle agents in RAM; the store has them all


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
        self.rows = Rows(store, key, codec, tiers, self.persister, self.faults)
        store.on_fault = self.faults.card
        self._provenance = provenance
        self._agents: OrderedDict[AgentId, AgentMemory] = OrderedDict()
        self._lock = threading.RLock()

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
        whose memory is not kept. Raises Fenced when another replica wins the claim, AgentMoved
        while it is frozen here.
        """
        try:
            return self._known(agent) or self._claimed(agent)
        except StoreUnavailable as error:
            self.faults.count("unclaimed", error)
            memory = self.get(agent)
            return memory if memory is not None else self.one_off(agent)

    def _known(self, agent: AgentId) -> AgentMemory | None:
        memory = self.get(agent)
        if memory is None or memory.card is None:
            return None
        if memory.state == "frozen":
            raise AgentMoved(f"agent {agent} is being migrated")
        if self.store.epoch(agent, self.key) != memory.card.epoch:
            self.forget(memory)  # claimed elsewhere while we looked away
            return None
        return memory

    def _claimed(self, agent: AgentId) -> AgentMemory:
        claim = self.store.claim(self.template(agent))
        before = claim.previous
        here = before is None or before.owner.node == self.owner.node
        memory = AgentMemory(agent, claim.card, "warm" if here else "remote")
        memory.branches = [branch_of(card) for card in claim.card.branches]
        with self._lock:
            self._agents[agent] = memory
            self._drop_idle_records()
        return memory

    def adopt(self, agent: AgentId) -> int:
        """Claim the agent for a migration; returns the epoch. Raises Fenced, StoreUnavailable."""
        memory = self._known(agent) or self._claimed(agent)
        assert memory.card is not None
        return memory.card.epoch

    def reclaim(self, memory: AgentMemory) -> None:
        """Own a frozen agent again: its next epoch. Raises Fenced if the target claimed it."""
        assert memory.card is not None, "a one-off agent is never frozen"
        claim = self.store.claim(self.template(memory.agent), after=memory.card.epoch)
        with self._lock:
            memory.card = claim.card
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
            busy = memory.commits_queued or any(b.turn for b in memory.branches)
            if memory.state == "owned" and not busy:
                self.forget(memory)

    # ---- turns

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

    # ---- cards

    def commit_later(self, memory: AgentMemory) -> None:
        """Write a card once everything handed over so far is stored; one commit serves several
        calls that wait together."""
        if memory.card is None:
            return
        with self._lock:
            memory.commits_queued += 1
        branches = [(branch, card_of(branch)) for branch in memory.branches]
        self.persister.submit(lambda: self._commit(memory, branches))

    def _commit(self, memory: AgentMemory, branches: list[tuple[Branch, BranchCard]]) -> None:
        """Write the next card; counts faults, raises nothing of storage."""
        with self._lock:
            memory.commits_queued -= 1
        if memory.card is None or memory.state == "released" or memory.commits_queued:
            return
        cards = []
        for branch, card in branches:
            self.rows.store_again(memory, branch)
            cards.append(with_runs(card, branch))
        new = replace(
            memory.card,
            generation=memory.card.generation + 1,
            branches=tuple(cards),
            updated=time.time(),
        )
        memory.changed = new.updated
        try:
            memory.card = self.store.commit(new).card
        except Fenced as error:
            self.faults.count("fenced", error)
            self.forget(memory)
        except StoreUnavailable as error:
            self.faults.count("store_unavailable", error)

    def delete(self, agent: AgentId) -> None:
        """Forget the agent here and bury it in the store. Raises Fenced, StoreUnavailable."""
        memory = self.get(agent)
        if memory is not None:
            self.forget(memory)
        self.store.delete(self.template(agent))
