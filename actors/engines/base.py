"""The Engine protocol: a model with a KV cache of many sequences, and nothing else.

An engine knows tokens, positions and rows. It does not know agents, storage, scheduling or text
beyond its vocabulary. One thread owns it; only `vocab` may be used from others. Rows enter and
leave in the engine-neutral form of storage.spec.GroupRows: float16, keys after RoPE, half-split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from storage.spec import CompatibilityKey, KVRows

Logits = NDArray[np.float32]  # (n_vocab,)


@dataclass(frozen=True)
class Chunk:
    """One sequence's share of a step: tokens at positions start, start + 1, …"""

    seq_id: int
    token_ids: Sequence[int]
    start: int
    wants_logits: bool  # of the last token


class Vocab(Protocol):
    """Tokens <-> text. Safe to use from any thread."""

    size: int
    bos: int  # -1: none
    add_bos: bool
    eog: frozenset[int]  # tokens that end a generation
    chat_template: str  # Jinja source; "" when the model has none
    bos_text: str
    eos_text: str

    def tokenize(self, text: str) -> list[int]:
        """Token ids; special tokens written out in the text are recognised, none is added."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text; empty for control tokens."""
        ...


class Engine(Protocol):
    """Sequences are 0 .. n_seq_max - 1. Raises actors.errors.EngineFault when it breaks."""

    name: str
    device: str
    key: CompatibilityKey
    vocab: Vocab
    n_ctx: int  # tokens one sequence may hold
    n_cells: int  # tokens all sequences may hold together
    n_seq_max: int
    n_batch: int  # tokens of one step
    kv_bytes: int  # allocated for the cells

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        """Compute all chunks in one batch; logits by seq_id, valid until the next call."""
        ...

    def export(self, seq_id: int, start: int, stop: int) -> KVRows:
        """A copy of rows start..stop."""
        ...

    def load(self, seq_id: int, start: int, rows: KVRows) -> None:
        """Append rows at position `start`, which must be the sequence's length; verified."""
        ...

    def fork(self, source: int, target: int, n_rows: int) -> None:
        """The empty `target` gets the first rows of `source`; cells are shared if possible."""
        ...

    def truncate(self, seq_id: int, n_rows: int) -> None:
        """Keep the first n_rows; 0 frees the sequence."""
        ...

    def n_rows(self, seq_id: int) -> int:
        """Length of a sequence by the engine's own count."""
        ...

    def close(self) -> None:
        """Free everything; the engine is not used again."""
        ...
