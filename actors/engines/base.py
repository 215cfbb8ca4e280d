"""The Engine protocol: a model with a KV cache of many sequences, and nothing else.

An engine knows tokens, positions and rows. It does not know agents, storage, scheduling or text
beyond its vocabulary. One thread owns it; only `vocab` may be used from others. Rows enter and
leave in the engine-neutral form of storage.spec.GroupRows: float16, keys after RoPE, half-split.
An engine whose cells can hold a codec's values without loss takes its tensors, too (loads_encoded).

Sliding-window layers. The rows of sliding groups are needed for the last positions only, and an
engine drops the others when it likes. So they travel apart: `export` gives the full part, whose
rows all exist, `export_window` the sliding part, as far as it is held. In both, groups of the other
part have T = 0. A sequence of n rows goes on correctly while the sliding rows of positions
n - window + 1 .. n are held; an engine refuses to compute otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from storage.codec import Tensors
from storage.spec import CompatibilityKey, KVRows

Logits = NDArray[np.float32]  # (n_vocab,), or (n, n_vocab) of a step


@dataclass(frozen=True)
class Chunk:
    """One sequence's share of a step: tokens at positions start, start + 1, …"""

    seq_id: int
    token_ids: Sequence[int]
    start: int
    n_logits: int  # of its last tokens, so many


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
    """Sequences are 0 .. n_seq_max - 1. Raises actors.errors.EngineFault when it breaks. Engines
    inherit from it what follows from the rest."""

    name: str
    device: str
    key: CompatibilityKey
    vocab: Vocab
    n_ctx: int  # tokens one sequence may hold
    n_cells: int  # tokens all sequences may hold together
    n_seq_max: int
    n_batch: int  # tokens of one step
    window: int  # of the sliding layers, in tokens; 0: the model has none
    kv_bytes: int  # allocated for the cells
    loads_encoded: str  # name of the codec whose tensors load_encoded takes; "": of none
    exports_encoded: (
        str  # name of the codec in whose tensors export_encoded gives all rows; "": none
    )
    tile: int = 0  # tokens of a step from which on it is computed in another way; 0: none
    idle_rows_cost: bool = False  # whether the rows of some sequences slow the steps of others down

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        """Compute all chunks in one batch; the (n_logits, n_vocab) logits of those that want any,
        by seq_id, writable, valid until the next call."""
        ...

    def export(self, seq_id: int, start: int, stop: int) -> KVRows:
        """A copy of rows start..stop of the full part."""
        ...

    def export_window(self, seq_id: int, start: int, stop: int) -> KVRows:
        """A copy of the sliding part's rows that end before position `stop`: of start..stop those
        in the window before `stop` and still held. The number of rows says which."""
        ...

    def export_encoded(self, seq_id: int, start: int, stop: int) -> Tensors:
        """As export, code by code as the cells hold them: what is stored is what was computed with,
        and rows that were loaded leave as they came."""
        ...

    def load(self, seq_id: int, start: int, rows: KVRows) -> None:
        """Append rows at position `start`, which must be the sequence's length; verified. Sliding
        groups have the last rows of the same run: all, fewer, or none where no window to come
        will reach them. On EngineFault the sequence is as it was."""
        ...

    def load_encoded(self, seq_id: int, start: int, tensors: Tensors) -> None:
        """As load, with the full part's rows as the codec has stored them; no value changes. Rows
        of sliding layers are among them if the model has such layers."""
        ...

    def fork(self, source: int, target: int, n_rows: int) -> None:
        """The empty `target` gets the first rows of `source`; cells are shared if possible. Raises
        EngineFault unless can_truncate(source, n_rows)."""
        ...

    def window_start(self, seq_id: int) -> int:
        """First position from which on all sliding rows are held; n_rows: none is. Without sliding
        layers 0."""
        ...

    def can_truncate(self, seq_id: int, n_rows: int) -> bool:
        """Whether the sequence can be cut to its first n_rows and go on correctly; asked with its
        present length, whether it can go on as it is. Without sliding layers: always."""
        if not 0 < n_rows <= self.n_rows(seq_id):
            return n_rows == 0
        return self.window_start(seq_id) <= max(0, n_rows - self.window + 1)

    def truncate(self, seq_id: int, n_rows: int) -> None:
        """Keep the first n_rows; 0 frees the sequence, its length or more changes nothing. Raises
        EngineFault unless can_truncate."""
        ...

    def n_rows(self, seq_id: int) -> int:
        """Length of a sequence by the engine's own count."""
        ...

    def close(self) -> None:
        """Free everything; the engine is not used again."""
        ...


def count_rows(rows: KVRows) -> int:
    """T of a run of rows whose sliding groups may have fewer."""
    return max(int(group.k.shape[1]) for group in rows)
