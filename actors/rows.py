"""Encoded rows: out of the engine into pool and disk, and back again.

Rows are encoded once, by one background thread (the Persister), which is also the only writer of a
branch's `blocks` and `tail`. Jobs run in the order they were submitted. Token ids are copied at
submission, rows are the branch's when the job runs: so they always belong together, whatever the
next turn does. Knows no engine, no card; sliding windows are actors.windows' business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakValueDictionary

from actors import journal
from actors.branches import AgentMemory, Branch, Run, positions
from actors.faults import Faults
from actors.persister import Persister
from actors.runs import Runs
from actors.windows import Kept, Windows
from storage.cache_file import Chain
from storage.codec import Codec, Tensors, concat_rows, count_rows, encode_rows, slice_rows
from storage.spec import CompatibilityKey, KVRows, Part
from storage.tiers import Tiers

_READ_AHEAD = 2  # runs on their way from disk or store, still encoded, while one is decoded


class Rows:
    """The rows of all agents of a replica, for one key and codec."""

    def __init__(
        self,
        key: CompatibilityKey,
        codec: Codec,
        tiers: Tiers,
        persister: Persister,
        faults: Faults,
        threads: int = 1,
    ) -> None:
        self._key, self._codec, self._tiers = key, codec, tiers
        self._persister = persister
        self.runs = Runs(tiers, faults)
        self.block_tokens = key.spec.block_tokens
        self.known: WeakValueDictionary[str, Run] = WeakValueDictionary()  # whole blocks, by id
        self._readers = ThreadPoolExecutor(2 * _READ_AHEAD, "read-ahead")
        # Layers are encoded and decoded side by side where the replica has cores for it.
        self.codec_threads = ThreadPoolExecutor(threads, "codec") if threads > 1 else None
        self.windows = Windows(key.spec, self.runs.tensors, self.runs.keep, tiers.pool.drop)

    # ---- from the loop's thread

    def append(
        self,
        memory: AgentMemory,
        branch: Branch,
        start: int,
        stop: int,
        rows: KVRows | Tensors,
    ) -> None:
        """Hand over rows start..stop, encoded or to be encoded; returns at once. branch.exported
        moves on."""
        branch.exported = stop
        ids = branch.tokens[: branch.exported]
        self._persister.submit(lambda: self._append(memory, branch, start, rows, ids))

    def checkpoint(
        self, memory: AgentMemory, branch: Branch, start: int, rows: KVRows, opening: int = 0
    ) -> None:
        """Hand over the sliding rows of positions from `start` to the branch's end, where its
        window is kept from now on, as it is at `opening`. All rows of the other layers have been
        handed over."""
        at = branch.windowed = branch.exported
        ends = {at for reply in branch.replies[-3:] for at in (reply.stop - 1, reply.stop)}
        kept = Kept(opening, frozenset(ends))
        self._persister.submit(lambda: self._checkpoint(memory, branch, start, at, rows, kept))

    def cut(self, memory: AgentMemory, branch: Branch, keep: int) -> None:
        """Forget the rows after the first `keep`."""
        branch.exported, branch.windowed = min(branch.exported, keep), 0
        ids = branch.tokens[:keep]
        self._persister.submit(lambda: self._take(memory, branch, branch, ids))

    def fork(self, memory: AgentMemory, source: Branch, branch: Branch, keep: int) -> None:
        """The branch, new, begins with the first `keep` rows of `source`."""
        branch.exported = min(source.exported, keep)
        ids = branch.tokens[:keep]
        self._persister.submit(lambda: self._take(memory, branch, source, ids))

    def begin(self, memory: AgentMemory, branch: Branch, runs: Sequence[Run]) -> None:
        """The branch, new, begins with whole blocks that another agent has stored."""
        branch.exported = len(runs) * self.block_tokens
        self._persister.submit(lambda: self._begin(memory, branch, runs))

    def share(self, memory: AgentMemory, branch: Branch, source: Branch, n: int) -> None:
        """The branch goes on with the rows that `source`, another agent's with the same chain, has
        of its first `n` tokens. A one-off agent keeps none."""
        stop = min(source.exported, n)
        if memory.card is None or stop <= branch.exported:
            return
        branch.exported, ids = stop, branch.tokens[:stop]
        self._persister.submit(lambda: self._share(memory, branch, source, ids))

    def know(self, branches: Sequence[Branch]) -> None:
        """Whole blocks of these may be found by their id."""
        self.known.update({run.id: run for branch in branches for run in branch.blocks})

    def chain(self, memory: AgentMemory) -> Chain:
        salt = memory.card.cache_salt if memory.card else ""
        return Chain(self._key.digest, self._codec.name, memory.agent.tenant, salt)

    # ---- on the persister's thread

    def _begin(self, memory: AgentMemory, branch: Branch, runs: Sequence[Run]) -> None:
        branch.blocks = [self._lent(memory, run) for run in runs]
        branch.tail, branch.checkpoints = [], []

    def _share(self, memory: AgentMemory, branch: Branch, source: Branch, ids: list[int]) -> None:
        """As _take, after the branch's own whole blocks. Each agent has records of its own: what
        its card names and which windows it needs is its own business."""
        own = branch.blocks
        if source.rows > branch.rows:
            blocks = [self._lent(memory, run) for run in source.blocks[len(own) :]]
            tail = [self._lent(memory, run) for run in source.tail]
            at = sorted({*branch.checkpoints, *source.checkpoints})
            lent = Branch(0, blocks=[*own, *blocks], tail=tail, checkpoints=at)
            self._take(memory, branch, lent, ids)
        if branch.rows < len(ids):  # what is lost here is exported again
            branch.exported = min(branch.exported, branch.rows)

    def _lent(self, memory: AgentMemory, run: Run) -> Run:
        """The agent's own record of a run, which the node's disk keeps for its next card."""
        lent, local = run.lent(), self._tiers.local
        if memory.card is None or memory.state == "released" or local is None:
            return lent
        lent.local = journal.held(local, memory.agent, lent)
        return lent

    def _append(
        self,
        memory: AgentMemory,
        branch: Branch,
        start: int,
        rows: KVRows | Tensors,
        ids: list[int],
    ) -> None:
        have = branch.rows
        if start > have:  # an earlier run was lost: the next turn exports from there again
            branch.exported = have
            return
        if isinstance(rows, dict):
            tensors = rows
        else:
            tensors = encode_rows(self._key.spec, self._codec, rows, executor=self.codec_threads)
        tensors = slice_rows(tensors, have - start, count_rows(tensors))
        while count := count_rows(tensors):
            filled = sum(run.rows for run in branch.tail)
            take = min(count, self._key.spec.block_tokens - filled)
            piece, tensors = slice_rows(tensors, 0, take), slice_rows(tensors, take, count)
            if filled + take < self._key.spec.block_tokens:
                self._add_segment(memory, branch, piece, ids)
            elif not self._seal(memory, branch, piece, ids):
                return

    def _checkpoint(
        self, memory: AgentMemory, branch: Branch, start: int, at: int, rows: KVRows, kept: Kept
    ) -> None:
        if branch.rows == at:  # else rows were lost, and with them this position
            sliding = encode_rows(self._key.spec, self._codec, rows, "sliding")
            self.windows.checkpoint(memory, branch, start, at, sliding, kept)

    def _seal(self, memory: AgentMemory, branch: Branch, piece: Tensors, ids: list[int]) -> bool:
        """Join the tail and the piece that fills it up to a block, code by code."""
        pieces = []
        for run in branch.tail:
            tensors = self.runs.tensors(memory, run, "full")
            if tensors is None:
                branch.tail = []
                branch.exported = branch.rows
                return False
            pieces.append(tensors)
        size = self._key.spec.block_tokens
        start = size * len(branch.blocks)
        parent = branch.blocks[-1].id if branch.blocks else ""
        run = Run(self.chain(memory).block_id(parent, ids[start : start + size]), size)
        run.carried = self.windows.joined(memory, branch.tail)
        self.known[run.id] = run
        self.runs.keep(memory, run, "full", concat_rows([*pieces, piece]))
        branch.blocks = [*branch.blocks, run]
        branch.tail = []
        return True

    def _add_segment(
        self, memory: AgentMemory, branch: Branch, tensors: Tensors, ids: list[int]
    ) -> Run:
        start = self._key.spec.block_tokens * len(branch.blocks)
        filled, rows = sum(run.rows for run in branch.tail), count_rows(tensors)
        parent = branch.blocks[-1].id if branch.blocks else ""
        in_block = ids[start : start + filled + rows]
        run = Run(self.chain(memory).segment_id(parent, in_block, filled), rows)
        self.runs.keep(memory, run, "full", tensors)
        branch.tail = [*branch.tail, run]
        return run

    def _take(self, memory: AgentMemory, branch: Branch, source: Branch, ids: list[int]) -> None:
        """The branch gets the rows that `source` has of its first tokens, `ids`; codes are copied.
        Whole blocks and whole segments are shared, the one that is cut in the middle is sliced."""
        size, keep = self._key.spec.block_tokens, len(ids)
        runs, source_rows = list(positions(source)), source.rows
        branch.checkpoints = [at for at in source.checkpoints if at <= keep]
        branch.blocks, branch.tail = source.blocks[: keep // size], []
        for start, run in runs:
            if start < size * len(branch.blocks):
                continue
            if start >= keep:
                break
            if run.rows < size and start + run.rows <= keep:
                branch.tail = [*branch.tail, run]
                continue
            tensors = self.runs.tensors(memory, run, "full")
            if tensors is None:
                break
            part = self._add_segment(memory, branch, slice_rows(tensors, 0, keep - start), ids)
            self.windows.cut(memory, run, part)
        if branch.rows < min(keep, source_rows):  # some could not be read: export them again
            branch.exported = min(branch.exported, branch.rows)

    def store_again(self, memory: AgentMemory, branch: Branch) -> None:
        """Try to store what the disk refused before. A run that is nowhere any more is forgotten,
        with what follows, and exported again."""
        for start, run in positions(branch):
            wanted: tuple[Part, ...] = ("full", "sliding") if run.has_window else ("full",)
            for part in wanted:
                if part in run.local or part in run.shared:
                    continue
                tensors = self._tiers.pool.get((run.id, part))
                if tensors is not None:
                    self.runs.keep(memory, run, part, tensors)
                elif part == "full":
                    self._take(memory, branch, branch, branch.tokens[:start])
                    branch.exported, branch.windowed = min(branch.exported, branch.rows), 0
                    return
                else:
                    run.drop_window()

    # ---- from a worker

    def read(
        self, memory: AgentMemory, branch: Branch, keep: int, begin: int = 0
    ) -> Iterator[tuple[Tensors, Tensors | None]]:
        """The encoded rows of tokens begin..keep, run by run in order, each with its sliding rows
        where the window needs them. With sliding windows, rows end at the last checkpoint.
        Stops early at a run that is missing or cannot be trusted; the branch then forgets it and
        what follows."""
        keep, windows = self.windows.restorable(memory, branch, keep)
        runs = [(at, x) for at, x in positions(branch) if begin < at + x.rows and at < keep]
        ahead: deque[Future[Tensors | None]] = deque()
        for n, (start, run) in enumerate(runs):
            while len(ahead) < min(_READ_AHEAD, len(runs) - n):
                wanted = runs[n + len(ahead)][1]
                ahead.append(self._readers.submit(self.runs.tensors, memory, wanted, "full"))
            tensors = ahead.popleft().result()
            if tensors is None:
                self.cut(memory, branch, start)
                return
            first, stop = max(begin - start, 0), min(keep - start, run.rows)
            sliding = windows.get(start)
            if sliding is not None and (n_rows := count_rows(sliding)) > stop - first:
                sliding = slice_rows(sliding, n_rows - (stop - first), n_rows)
            yield slice_rows(tensors, first, stop), sliding

    # ---- reports

    def in_ram(self, branch: Branch, keep: int | None = None, begin: int = 0) -> bool:
        """Whether the encoded rows of tokens begin..keep, or of all, are in the pool."""
        stop = branch.rows if keep is None else keep
        needed = (run for at, run in positions(branch) if begin < at + run.rows and at < stop)
        return all(self._tiers.pool.size_of((run.id, "full")) for run in needed)

    def ram_bytes(self, branches: Sequence[Branch]) -> int:
        """Bytes of the branches' rows in the pool, shared ones counted once."""
        ids = {run.id for b in branches for run in b.runs}
        parts: tuple[Part, ...] = ("full", "sliding")
        return sum(self._tiers.pool.size_of((i, part)) for i in ids for part in parts)
