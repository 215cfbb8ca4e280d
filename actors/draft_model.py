"""A second, small model drafts for the first: greedily, a few tokens ahead of every sequence.

What it holds is a cache of its own and never persisted: of each of the first engine's sequences the
ids it has computed. They are cut to what they have in common with the ids that count, and the rest
is prefilled, a chunk per step; so a turn that was preempted, restored or cut needs no word of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field

from actors.engines.base import Chunk, Engine, Logits
from actors.errors import EngineFault, ModelUnavailable
from actors.sequence import Sequence

logger = logging.getLogger(__name__)
_CATCH_UP = 256  # tokens in one step, of all sequences


@dataclass
class _Held:
    """The ids of one sequence's rows; the first `known` are those of `sequence`."""

    sequence: Sequence | None = None
    ids: list[int] = field(default_factory=list)
    known: int = 0


class DraftModel:
    """Used by the loop's thread. `engine` has as many sequences as the engine it drafts for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held = [_Held() for _ in range(engine.n_seq_max)]
        self._recent: dict[int, None] = {}  # sequences with rows, least recently used first
        self.broken = False
        self.step_s: float | None = None  # of one drafted token, all sequences at once
        self.busy_s = 0.0  # since the start

    def draft(self, wanted: Ids[tuple[Sequence, int]]) -> dict[int, list[int]]:
        """By seq_id, at most k ids that may come next. Nothing for a sequence that is still being
        prefilled, or does not fit; nothing at all once the engine has failed."""
        if self.broken:
            return {}
        try:
            return self._draft(wanted)
        except EngineFault as error:
            logger.error("the draft model failed, and is not asked again: %s", error)
            self.broken = True
            return {}

    @property
    def kv_bytes(self) -> int:
        return self._engine.kv_bytes

    def close(self) -> None:
        self._engine.close()

    def _draft(self, wanted: Ids[tuple[Sequence, int]]) -> dict[int, list[int]]:
        n_ctx, eog = self._engine.n_ctx, self._engine.vocab.eog
        wanted = [(s, k) for s, k in wanted if len(s.tokens) + k <= n_ctx]
        if not self._make_room(wanted):
            return {}
        chunks = self._catch_up(wanted)
        left = {s.seq_id: k for s, k in wanted}
        guesses: dict[int, list[int]] = {}
        while chunks:
            logits, chunks = self._step(chunks), []
            for seq_id, rows in logits.items():
                token = int(rows[-1].argmax())
                if token in eog:
                    continue
                guesses.setdefault(seq_id, []).append(token)
                left[seq_id] -= 1
                if left[seq_id]:
                    chunks.append(Chunk(seq_id, [token], self._engine.n_rows(seq_id), 1))
        return guesses

    def _catch_up(self, wanted: Ids[tuple[Sequence, int]]) -> list[Chunk]:
        """The ids that are missing, as many as one step takes; logits where none will be."""
        chunks, budget = [], _CATCH_UP
        for sequence, _ in wanted:
            start, n_tokens = self._cut(sequence), len(sequence.tokens)
            stop = min(n_tokens, start + budget)
            budget -= stop - start
            if stop > start:
                ids, whole = sequence.tokens[start:stop], int(stop == n_tokens)
                chunks.append(Chunk(sequence.seq_id, ids, start, whole))
        return chunks

    def _step(self, chunks: list[Chunk]) -> dict[int, Logits]:
        began = time.perf_counter()
        logits = self._engine.step(chunks)
        seconds = time.perf_counter() - began
        self.busy_s += seconds
        if all(len(chunk.token_ids) == 1 for chunk in chunks):
            before = self.step_s
            self.step_s = seconds if before is None else before + 0.2 * (seconds - before)
        for chunk in chunks:
            self._held[chunk.seq_id].ids.extend(chunk.token_ids)
        return logits

    def _cut(self, sequence: Sequence) -> int:
        """Keep the rows of ids that are the sequence's, all but its last; how many are left."""
        seq_id, tokens = sequence.seq_id, sequence.tokens
        held = self._held[seq_id]
        most = min(len(held.ids), len(tokens) - 1)
        same = min(held.known, most) if held.sequence is sequence else 0
        while same < most and held.ids[same] == tokens[same]:
            same += 1
        if not self._engine.can_truncate(seq_id, same):
            same = 0
        self._engine.truncate(seq_id, same)
        del held.ids[same:]
        held.sequence, held.known = sequence, same
        self._recent.pop(seq_id, None)
        self._recent[seq_id] = None
        return same

    def _make_room(self, wanted: Ids[tuple[Sequence, int]]) -> bool:
        """Cells for these; sequences that are not among them leave, the longest unused first."""
        engine, staying = self._engine, {sequence.seq_id for sequence, _ in wanted}
        needed = sum(len(sequence.tokens) + k for sequence, k in wanted)
        others = [seq_id for seq_id in self._recent if seq_id not in staying]
        used = sum(engine.n_rows(seq_id) for seq_id in others)
        for seq_id in others:
            if needed + used <= engine.n_cells:
                break
            used -= engine.n_rows(seq_id)
            engine.truncate(seq_id, 0)
            self._held[seq_id] = _Held()
            del self._recent[seq_id]
        return needed <= engine.n_cells


def check_draft(engine: Engine, draft: Engine) -> None:
    """Raises ModelUnavailable unless both models have one vocabulary."""
    if draft.vocab.size != engine.vocab.size:
        raise ModelUnavailable(
            f"draft_model: it has {draft.vocab.size} tokens, the model {engine.vocab.size}; "
            "a draft model needs the model's own vocabulary"
        )
    if draft.key.tokenizer != engine.key.tokenizer:
        raise ModelUnavailable(
            f"draft_model: its tokenizer is {draft.key.tokenizer[:12]}…, the model's "
            f"{engine.key.tokenizer[:12]}…; where they are the same but for fields that do not "
            "count, say so with equivalent_digests"
        )
