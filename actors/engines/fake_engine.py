"""A deterministic engine in numpy: the same contract as a real one, in microseconds per token.

Every row is a hash of its token and of all rows it sees, so a row that is missing, stale, moved or
from another agent changes the next token. Logits depend on the float16 rows alone, so exported rows
carry all of it. Its vocabulary is bytes. `step_delay` and `token_delay` (of every token in a step)
make it as slow as a test wants.

With `window` one more layer slides: a token sees its last `window` rows, itself included, and no
more than the window - 1 rows that the next token will see are kept.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actors.engines.base import Chunk, Engine, Logits, Vocab, count_rows
from actors.errors import EngineFault
from storage.codec import Tensors
from storage.spec import CompatibilityKey, GroupRows, KVRows, LayerSpec, ModelCacheSpec, Part

_LAYERS, _HEADS, _DIM = 2, 2, 32  # of the full part
Row = NDArray[np.float16]  # (n_layers, 2, n_kv_heads, head dim): K and V of one token
_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class FakeVocab:
    """256 bytes, then the control tokens of the template above."""

    specials = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")

    def __init__(self) -> None:
        self.size = 256 + len(self.specials)
        self.bos = -1
        self.add_bos = False
        self.eog = frozenset({256 + self.specials.index("<|end|>")})
        self.chat_template = _TEMPLATE
        self.bos_text = ""
        self.eos_text = "<|end|>"

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            for index, special in enumerate(self.specials):
                if text.startswith(special):
                    ids.append(256 + index)
                    text = text[len(special) :]
                    break
            else:
                ids.extend(text[0].encode())
                text = text[1:]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


class FakeEngine(Engine):
    """See the module docstring. A reply is lower-case letters and spaces, and ends by itself."""

    name = "fake"
    device = "numpy"
    loads_encoded = exports_encoded = ""

    def __init__(
        self,
        n_seq_max: int = 4,
        n_ctx: int = 4096,
        *,
        n_cells: int | None = None,
        step_delay: float = 0.0,
        token_delay: float = 0.0,
        seed: int = 0,
        window: int = 0,
    ) -> None:
        layers = [LayerSpec("full", _HEADS, _DIM, _DIM)] * _LAYERS
        if window:  # first, as in real models: the sliding group is not the last one
            layers.insert(0, LayerSpec("sliding", _HEADS, _DIM, _DIM, window))
        spec = ModelCacheSpec("fake", tuple(layers))
        digest = hashlib.sha256(f"fake-{seed}".encode()).hexdigest()
        self.key = CompatibilityKey(digest, digest, (), spec)
        self.vocab: Vocab = FakeVocab()
        self.n_cells = n_cells or n_ctx * n_seq_max
        self.n_ctx, self.n_seq_max, self.n_batch = min(n_ctx, self.n_cells), n_seq_max, 512
        self.kv_bytes = self.n_cells * spec.f16_row_bytes
        self.window = window
        self._seed = seed
        self._delay, self._token_delay = step_delay, token_delay
        self._rows: list[list[Row]] = [[] for _ in range(n_seq_max)]
        self._states: list[list[bytes]] = [[] for _ in range(n_seq_max)]  # digest of rows so far
        self._sliding: list[dict[int, Row]] = [{} for _ in range(n_seq_max)]  # position -> row
        self._owners: dict[int, int] = {}  # id of a row -> sequences that hold it, if several
        self.cells_used = 0

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        wanted = sum(len(c.token_ids) for c in chunks)
        if self._delay or self._token_delay:
            time.sleep(self._delay + self._token_delay * wanted)
        if self.cells_used + wanted > self.n_cells:
            raise EngineFault(f"no cells for {wanted} tokens")
        if wanted > self.n_batch + self.n_seq_max:
            raise EngineFault(f"a step of {wanted} tokens, the batch holds {self.n_batch}")
        logits = {}
        for chunk in chunks:
            rows = self._rows[chunk.seq_id]
            if len(rows) != chunk.start:
                raise EngineFault(f"position {chunk.start} after {len(rows)} rows")
            if not self.can_truncate(chunk.seq_id, chunk.start):
                raise EngineFault(f"position {chunk.start} without its window")
            states = [self._compute(chunk.seq_id, token) for token in chunk.token_ids]
            if chunk.n_logits:
                logits[chunk.seq_id] = np.stack(
                    [self._logits(state) for state in states[-chunk.n_logits :]]
                )
        return logits

    def _compute(self, seq_id: int, token: int) -> bytes:
        """Append the token's rows; the digest of all it sees, itself included."""
        rows, sliding = self._rows[seq_id], self._sliding[seq_id]
        full, own = self._next_rows(token, self._seen(seq_id, len(rows)))
        if self.window:
            sliding[len(rows)] = own
        self._append(seq_id, full)
        state = self._seen(seq_id, len(rows))
        self._slide(seq_id)
        return state

    def _seen(self, seq_id: int, n_rows: int) -> bytes:
        """Digest of the full rows and of the sliding ones in the window before n_rows."""
        states, sliding = self._states[seq_id], self._sliding[seq_id]
        state = states[n_rows - 1] if n_rows else b""
        if not self.window or not n_rows:
            return state
        first = max(0, n_rows - self.window)
        window = b"".join(sliding[i].tobytes() for i in range(first, n_rows) if i in sliding)
        return hashlib.blake2b(state + window).digest()

    def _slide(self, seq_id: int) -> None:
        """Drop what the next token will not see."""
        first = len(self._rows[seq_id]) - self.window + 1
        for position in [i for i in self._sliding[seq_id] if i < first]:
            del self._sliding[seq_id][position]

    def _append(self, seq_id: int, row: Row) -> None:
        states = self._states[seq_id]
        before = states[-1] if states else b""
        self._rows[seq_id].append(row)
        self.cells_used += 1
        states.append(hashlib.blake2b(before + row.tobytes()).digest())

    def _next_rows(self, token: int, state: bytes) -> tuple[Row, Row]:
        """(full, sliding) rows of a token that sees `state`."""
        digest = hashlib.shake_128(f"{self._seed}.{token}.".encode() + state).digest(384)
        rows = np.frombuffer(digest, np.uint8).astype(np.float16) / np.float16(256)
        rows = rows.reshape(_LAYERS + 1, 2, _HEADS, _DIM)
        return rows[:_LAYERS], rows[_LAYERS:]

    def _logits(self, state: bytes) -> Logits:
        noise = np.frombuffer(state * 5, np.uint8)
        logits = noise[: self.vocab.size].astype(np.float32) / np.float32(64)
        letters = [*range(97, 123), 32]
        logits[letters] += 8
        logits[list(self.vocab.eog)] += 7.2
        return logits

    def export(self, seq_id: int, start: int, stop: int) -> KVRows:
        self._check_range(seq_id, start, stop)
        return self._stacked("full", self._rows[seq_id][start:stop])

    def export_window(self, seq_id: int, start: int, stop: int) -> KVRows:
        self._check_range(seq_id, start, stop)
        first = max(start, self.window_start(seq_id), stop - self.window)
        return self._stacked("sliding", [self._sliding[seq_id][i] for i in range(first, stop)])

    def export_encoded(self, seq_id: int, start: int, stop: int) -> Tensors:
        raise EngineFault("the fake engine encodes nothing")

    def _check_range(self, seq_id: int, start: int, stop: int) -> None:
        if not 0 <= start < stop <= len(self._rows[seq_id]):
            raise EngineFault(f"rows {start}..{stop} of {len(self._rows[seq_id])}")

    def _stacked(self, part: Part, rows: list[Row]) -> KVRows:
        groups = []
        for g in self.key.spec.groups:
            x = np.empty((len(g.layers), 0, 2, _HEADS, _DIM), np.float16)
            if g.part == part and rows:
                x = np.stack(rows, axis=1)  # (n_layers, T, 2, n_kv_heads, head dim)
            groups.append(GroupRows(k=x[:, :, 0].copy(), v=x[:, :, 1].copy()))
        return tuple(groups)

    def load(self, seq_id: int, start: int, rows: KVRows) -> None:
        if len(self._rows[seq_id]) != start:
            raise EngineFault(f"load at {start} after {len(self._rows[seq_id])} rows")
        stop = start + count_rows(rows)
        pairs = list(zip(self.key.spec.groups, rows, strict=True))
        full = [x.k.shape[1] for g, x in pairs if g.part == "full"]
        if stop == start or set(full) != {stop - start}:
            raise EngineFault(f"{full} full rows to fill {start}..{stop}")
        for g, x in pairs:
            stacked = np.stack([x.k, x.v], axis=2).swapaxes(0, 1)  # (T, L, 2, H, D)
            if g.part == "sliding":
                self._sliding[seq_id] |= dict(enumerate(stacked.copy(), stop - len(stacked)))
            else:
                for row in stacked:
                    self._append(seq_id, np.ascontiguousarray(row))
        self._slide(seq_id)

    def load_encoded(self, seq_id: int, start: int, tensors: Tensors) -> None:
        raise EngineFault("float16 rows take no encoded ones")

    def fork(self, source: int, target: int, n_rows: int) -> None:
        if self._rows[target]:
            raise EngineFault(f"fork into sequence {target}, which is not empty")
        if not self.can_truncate(source, n_rows):
            raise EngineFault(f"sequence {source} cannot be forked at {n_rows}: no window there")
        self._rows[target] = self._rows[source][:n_rows]
        for row in self._rows[target]:
            self._owners[id(row)] = self._owners.get(id(row), 1) + 1
        self._states[target] = self._states[source][:n_rows]
        self._sliding[target] = {i: x for i, x in self._sliding[source].items() if i < n_rows}

    def window_start(self, seq_id: int) -> int:
        if not self.window:
            return 0
        first = len(self._rows[seq_id])
        while first - 1 in self._sliding[seq_id]:
            first -= 1
        return first

    def truncate(self, seq_id: int, n_rows: int) -> None:
        if 0 < len(self._rows[seq_id]) <= n_rows:
            return
        if not self.can_truncate(seq_id, n_rows):
            raise EngineFault(f"sequence {seq_id} cannot be cut to {n_rows} rows: no window there")
        for row in self._rows[seq_id][n_rows:]:
            self._leave(row)
        del self._rows[seq_id][n_rows:]
        del self._states[seq_id][n_rows:]
        for position in [i for i in self._sliding[seq_id] if i >= n_rows]:
            del self._sliding[seq_id][position]

    def _leave(self, row: Row) -> None:
        """One sequence less holds the row; its cell is free when none does."""
        owners = self._owners.pop(id(row), 1) - 1
        if not owners:
            self.cells_used -= 1
        elif owners > 1:
            self._owners[id(row)] = owners

    def n_rows(self, seq_id: int) -> int:
        return len(self._rows[seq_id])

    def close(self) -> None:
        self._rows = []
