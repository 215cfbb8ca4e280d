"""An agent's memory on this replica: its branches, their encoded rows, and their way to the store.

A branch is one line of token ids; its rows lie in the engine (see residency), in the Q4 pool, in
the store, or in several of these. Rows are encoded once, by one background thread (the Persister),
which is also the only writer of a branch's `blocks` and `tail`. Knows no engine and no Ray.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from actors.errors import AgentMoved
from actors.persister import Persister
from actors.prompt import EmittedReply, common_prefix
from actors.turn import CacheState
from storage.cache_file import Chain
from storage.card import (
    AgentId,
    BlockRef,
    BranchCard,
    CacheCard,
    OpenTurn,
    Owner,
    Reply,
)
from storage.codec import (
    Codec,
    Tensors,
    concat_rows,
    count_rows,
    encode_rows,
    slice_rows,
)
from storage.errors import CorruptData, Fenced, Incompatible, StorageError, StoreUnavailable
from storage.spec import CompatibilityKey, KVRows
from storage.store import CacheStore, new_card
from storage.tiers import Tiers

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A whole block or a tail segment; `ref` is None until the store has it."""

    id: str
    rows: int
    ref: BlockRef | None = None


@dataclass(eq=False)
class Branch:
    """`tokens` may be longer than the rows that exist. `exported` counts the rows handed to the
    persister or already encoded; the engine exports from there on."""

    id: int
    tokens: list[int] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    blocks: list[Run] = field(default_factory=list)
    tail: list[Run] = field(default_factory=list)
    turn: OpenTurn | None = None
    exported: int = 0
    last_used: float = 0.0

    @property
    def runs(self) -> list[Run]:
        return self.blocks + self.tail

    @property
    def rows(self) -> int:
        """Rows that are encoded."""
        return sum(run.rows for run in self.runs)

    @property
    def last_reply_start(self) -> int:
        if self.turn is not None:
            return self.turn.prompt_tokens
        return self.replies[-1].start if self.replies else len(self.tokens)


@dataclass(eq=False)
class AgentMemory:
    """`card` is the last claim or commit; None for a one-off agent, which has no claim."""

    agent: AgentId
    card: CacheCard | None
    origin: CacheState  # where its rows come from when they are not in RAM: warm or remote
    branches: list[Branch] = field(default_factory=list)
    state: Literal["owned", "frozen", "released"] = "owned"
    last_used: float = field(default_factory=time.time)
    changed: float = field(default_factory=time.time)  # tokens, rows or card, for reports
    commits_queued: int = 0


@dataclass(frozen=True)
class Match:
    """Where a prompt continues: `branch` is the one it lives in, `source` the one it forks from.

    The first `keep` tokens are in `source` (or, without one, in `branch`) already.
    """

    branch: Branch
    source: Branch | None
    keep: int
    dropped: Branch | None = None  # the least recently used one, over the limit


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
        self.persister = Persister()
        self.faults: Counter[str] = Counter()  # kind -> how often memory was lost or refused
        self._provenance = provenance
        self._agents: OrderedDict[AgentId, AgentMemory] = OrderedDict()
        self._lock = threading.RLock()

    # ---- owning

    def template(self, agent: AgentId) -> CacheCard:
        parameters = {
            f"{group.name}.{side}": self.codec.describe(dim)
            for group in self.key.spec.groups
            for side, dim in (("k", group.key_dim), ("v", group.value_dim))
            if dim
        }
        return new_card(
            agent,
            self.key,
            self.codec.name,
            self.owner,
            codec_parameters=parameters,
            provenance=self._provenance,
        )

    def open(self, agent: AgentId) -> AgentMemory:
        """The agent's memory, owned by this replica: known, or claimed from the store.

        Raises Fenced when another replica wins the claim, AgentMoved while it is frozen here,
        StoreUnavailable.
        """
        with self._lock:
            memory = self._agents.get(agent)
        if memory is not None and memory.card is not None:
            if memory.state == "frozen":
                raise AgentMoved(f"agent {agent} is being migrated")
            if self.store.epoch(agent, self.key) == memory.card.epoch:
                return memory
            self.forget(memory)  # claimed elsewhere while we looked away
        claim = self.store.claim(self.template(agent))
        before = claim.previous
        here = before is None or before.owner.node == self.owner.node
        memory = AgentMemory(agent, claim.card, "warm" if here else "remote")
        memory.branches = [_branch_of(card) for card in claim.card.branches]
        with self._lock:
            self._agents[agent] = memory
            self._drop_idle_records()
        return memory

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

    def in_ram(self, branch: Branch) -> bool:
        """Whether every encoded row of the branch is in the pool."""
        return all(self.tiers.size_of(run.id) for run in branch.runs)

    def ram_bytes(self, branches: Sequence[Branch]) -> int:
        """Bytes of the branches' rows in the pool, shared ones counted once."""
        return sum(self.tiers.size_of(i) for i in {run.id for b in branches for run in b.runs})

    # ---- matching

    def match(
        self, memory: AgentMemory, encode: Callable[[Sequence[EmittedReply]], list[int]],
        replies_of: Callable[[Branch], list[EmittedReply]], emitted: Sequence[int] = (),
    ) -> tuple[list[int], Match]:  # fmt: skip
        """(prompt ids, where they continue).

        EXTEND, or a prompt that parts inside the last reply, goes on in its branch. A prompt that
        parts earlier opens a branch and leaves the one it parted from as it is.
        """
        best: tuple[int, list[int], Branch] | None = None
        encoded: dict[tuple[EmittedReply, ...], list[int]] = {}
        for branch in sorted(memory.branches, key=lambda b: b.last_used, reverse=True):
            replies = tuple(replies_of(branch))
            if replies not in encoded:
                encoded[replies] = encode(replies)
            common = common_prefix(branch.tokens, [*encoded[replies], *emitted])
            if best is None or common > best[0]:
                best = (common, encoded[replies], branch)
        if best is None:
            return encode(()), Match(Branch(0), None, 0)
        keep, prompt, branch = best
        if keep >= branch.last_reply_start:
            return prompt, Match(branch, None, keep)
        fresh = Branch(1 + max(b.id for b in memory.branches))
        dropped = None
        if len(memory.branches) >= self.config.max_branches:
            dropped = min(
                (b for b in memory.branches if b is not branch),
                key=lambda b: b.last_used,
                default=None,
            )
        return prompt, Match(fresh, branch if keep else None, keep, dropped)

    def enter(self, memory: AgentMemory, match: Match, turn: OpenTurn, tokens: list[int]) -> None:
        """The turn begins: the branch now says `tokens`; rows past the match are cut off."""
        branch, source, keep = match.branch, match.source, match.keep
        branch.replies = [r for r in (source or branch).replies if r.stop <= keep]
        branch.tokens, branch.turn, branch.last_used = tokens, turn, time.time()
        if source is not None:
            branch.exported = min(source.exported, keep)
            self.persister.submit(lambda: self._take(memory, branch, source, tokens[:keep]))
        elif keep < branch.exported:
            self.cut(memory, branch, keep)
        if match.dropped in memory.branches:
            memory.branches.remove(match.dropped)
        if branch not in memory.branches:
            memory.branches.append(branch)
        memory.last_used = memory.changed = branch.last_used
        with self._lock:
            if memory.agent in self._agents:
                self._agents.move_to_end(memory.agent)

    # ---- rows out of the engine: handed over by the loop's thread, encoded by the persister
    #
    # Jobs run in the order they were submitted. Token ids are copied at submission, rows are the
    # branch's when the job runs: so they always belong together, whatever the next turn does.

    def append(self, memory: AgentMemory, branch: Branch, start: int, rows: KVRows) -> None:
        """Hand over rows start, start + 1, …; returns at once. branch.exported moves on."""
        branch.exported = start + rows[0].k.shape[1]
        ids = branch.tokens[: branch.exported]
        self.persister.submit(lambda: self._append(memory, branch, start, rows, ids))

    def cut(self, memory: AgentMemory, branch: Branch, keep: int) -> None:
        """Forget the rows after the first `keep`."""
        branch.exported = min(branch.exported, keep)
        ids = branch.tokens[:keep]
        self.persister.submit(lambda: self._take(memory, branch, branch, ids))

    def commit_later(self, memory: AgentMemory) -> None:
        """Write a card once everything handed over so far is stored; one commit serves several
        calls that wait together."""
        if memory.card is None:
            return
        with self._lock:
            memory.commits_queued += 1
        branches = [(branch, _card_of(branch)) for branch in memory.branches]
        self.persister.submit(lambda: self._commit(memory, branches))

    def _append(
        self, memory: AgentMemory, branch: Branch, start: int, rows: KVRows, ids: list[int]
    ) -> None:
        have = branch.rows
        if start > have:  # an earlier run was lost: the next turn exports from there again
            branch.exported = have
            return
        tensors = encode_rows(self.key.spec, self.codec, rows)
        tensors = slice_rows(tensors, have - start, count_rows(tensors))
        while count := count_rows(tensors):
            filled = sum(run.rows for run in branch.tail)
            take = min(count, self.key.spec.block_tokens - filled)
            piece, tensors = slice_rows(tensors, 0, take), slice_rows(tensors, take, count)
            if filled + take < self.key.spec.block_tokens:
                self._add_segment(memory, branch, piece, ids)
            elif not self._seal(memory, branch, piece, ids):
                return

    def _seal(self, memory: AgentMemory, branch: Branch, piece: Tensors, ids: list[int]) -> bool:
        """Join the tail and the piece that fills it up to a block, code by code."""
        pieces = []
        for run in branch.tail:
            tensors = self._tensors(memory, run)
            if tensors is None:
                branch.tail = []
                branch.exported = branch.rows
                return False
            pieces.append(tensors)
        size = self.key.spec.block_tokens
        start = size * len(branch.blocks)
        parent = branch.blocks[-1].id if branch.blocks else ""
        run = Run(self._chain(memory).block_id(parent, ids[start : start + size]), size)
        self._keep(memory, run, concat_rows([*pieces, piece]))
        branch.blocks = [*branch.blocks, run]
        branch.tail = []
        return True

    def _add_segment(
        self, memory: AgentMemory, branch: Branch, tensors: Tensors, ids: list[int]
    ) -> None:
        start = self.key.spec.block_tokens * len(branch.blocks)
        filled, rows = sum(run.rows for run in branch.tail), count_rows(tensors)
        parent = branch.blocks[-1].id if branch.blocks else ""
        in_block = ids[start : start + filled + rows]
        run = Run(self._chain(memory).segment_id(parent, in_block, filled), rows)
        self._keep(memory, run, tensors)
        branch.tail = [*branch.tail, run]

    def _chain(self, memory: AgentMemory) -> Chain:
        salt = memory.card.cache_salt if memory.card else ""
        return Chain(self.key.digest, self.codec.name, memory.agent.tenant, salt)

    def _keep(self, memory: AgentMemory, run: Run, tensors: Tensors) -> None:
        """Rows into the pool and the store. If the store fails they stay in RAM while there is
        room, and every commit tries again."""
        self.tiers.put(run.id, tensors, pinned=True)
        try:
            run.ref = self.tiers.write(memory.agent.tenant, run.id, run.rows, tensors)
        except StoreUnavailable as error:
            self._fault("store_unavailable", error)
        finally:
            self.tiers.unpin(run.id)

    def _take(self, memory: AgentMemory, branch: Branch, source: Branch, ids: list[int]) -> None:
        """The branch gets the rows that `source` has of its first tokens, `ids`; codes are copied.
        Whole blocks and whole segments are shared, the one that is cut in the middle is sliced."""
        size, keep = self.key.spec.block_tokens, len(ids)
        runs, source_rows = list(_positions(source)), source.rows
        branch.blocks = source.blocks[: keep // size]
        branch.tail = []
        for start, run in runs:
            if start < size * len(branch.blocks):
                continue
            if start >= keep:
                break
            if run.rows < size and start + run.rows <= keep:
                branch.tail = [*branch.tail, run]
                continue
            tensors = self._tensors(memory, run)
            if tensors is None:
                break
            self._add_segment(memory, branch, slice_rows(tensors, 0, keep - start), ids)
        if branch.rows < min(keep, source_rows):  # some could not be read: export them again
            branch.exported = min(branch.exported, branch.rows)

    def _tensors(self, memory: AgentMemory, run: Run) -> Tensors | None:
        """A run's rows, or None after counting why not."""
        try:
            tensors = self.tiers.read(memory.agent.tenant, run.id, run.rows, run.ref)
        except CorruptData as error:
            self._fault("corrupt", error)
            return None
        except StoreUnavailable as error:
            self._fault("store_unavailable", error)
            return None
        if tensors is None:
            path = run.id
            if run.ref is not None:
                path = self.store.block_path(memory.agent.tenant, run.ref, "full")
            self._fault("missing", CorruptData(path, "the block is missing"))
        return tensors

    # ---- rows back to the engine

    def read_rows(
        self, memory: AgentMemory, branch: Branch, keep: int
    ) -> Iterator[tuple[Tensors, bool]]:
        """The encoded rows of the first `keep` tokens, run by run in order, and whether each was in
        RAM. Stops early at a run that is missing or cannot be trusted; the branch then forgets it
        and what follows."""
        for start, run in list(_positions(branch)):
            if start >= keep:
                return
            in_ram = self.tiers.resident(run.id) is not None
            tensors = self._tensors(memory, run)
            if tensors is None:
                self.cut(memory, branch, start)
                return
            if start + run.rows > keep:
                tensors = slice_rows(tensors, 0, keep - start)
            yield tensors, in_ram

    # ---- cards

    def _commit(self, memory: AgentMemory, branches: list[tuple[Branch, BranchCard]]) -> None:
        """Write the next card; counts faults, raises nothing of storage."""
        with self._lock:
            memory.commits_queued -= 1
        if memory.card is None or memory.state == "released" or memory.commits_queued:
            return
        cards = []
        for branch, card in branches:
            self._store_again(memory, branch)
            cards.append(_with_runs(card, branch))
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
            self._fault("fenced", error)
            self.forget(memory)
        except StoreUnavailable as error:
            self._fault("store_unavailable", error)

    def _store_again(self, memory: AgentMemory, branch: Branch) -> None:
        for run in branch.runs:
            tensors = self.tiers.resident(run.id) if run.ref is None else None
            if tensors is not None:
                self._keep(memory, run, tensors)

    def delete(self, agent: AgentId) -> None:
        """Forget the agent here and bury it in the store. Raises Fenced, StoreUnavailable."""
        memory = self.get(agent)
        if memory is not None:
            self.forget(memory)
        self.store.delete(self.template(agent))

    def on_fault(self, error: StorageError) -> None:
        """For CacheStore: a card that could not be used."""
        self._fault("incompatible" if isinstance(error, Incompatible) else "corrupt", error)

    def _fault(self, kind: str, error: StorageError) -> None:
        self.faults[kind] += 1
        logger.warning("memory not used (%s): %s", kind, error)


def _positions(branch: Branch) -> Iterator[tuple[int, Run]]:
    """(position of its first row, run) in order."""
    start = 0
    for run in branch.runs:
        yield start, run
        start += run.rows


def _branch_of(card: BranchCard) -> Branch:
    return Branch(
        id=card.id,
        tokens=list(card.tokens),
        replies=list(card.replies),
        blocks=[Run(ref.id, ref.rows, ref) for ref in card.blocks],
        tail=[Run(ref.id, ref.rows, ref) for ref in card.tail],
        turn=card.turn,
        exported=card.rows,
        last_used=card.last_used,
    )


def _card_of(branch: Branch) -> BranchCard:
    """The branch's tokens as they are now; its rows are added when they are stored."""
    return BranchCard(
        id=branch.id,
        tokens=tuple(branch.tokens),
        replies=tuple(branch.replies),
        turn=branch.turn,
        last_used=branch.last_used,
    )


def _with_runs(card: BranchCard, branch: Branch) -> BranchCard:
    """What the store holds of a branch: its runs up to the first that is not stored."""
    stored: list[BlockRef] = []
    for run in branch.runs:
        if run.ref is None:
            break
        stored.append(run.ref)
    n_blocks = len(branch.blocks)
    return replace(card, blocks=tuple(stored[:n_blocks]), tail=tuple(stored[n_blocks:]))
