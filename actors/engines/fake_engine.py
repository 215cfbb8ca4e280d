"""A deterministic engine in numpy: the same contract as a real one, in microseconds per token.

Every row is a hash of its token and of all rows before it, so a row that is missing, stale, moved
or from another agent changes the next token. Logits depend on the float16 rows alone, so exported
rows carry all of it. Its vocabulary is bytes. `step_delay` makes it as slow as a test wants.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actors.engines.base import Chunk, Logits, Vocab
from actors.errors import EngineFault
from storage.spec import CompatibilityKey, GroupRows, KVRows, LayerSpec, ModelCacheSpec

_LAYERS, _HEADS, _DIM = 2, 2, 32
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


class FakeEngine:
    """See the module docstring. A reply is lower-case letters and spaces, and ends by itself."""

    name = "fake"
    device = "numpy"

    def __init__(
        self,
        n_seq_max: int = 4,
        n_ctx: int = 4096,
        *,
        n_cells: int | None = None,
        step_delay: float = 0.0,
        seed: int = 0,
    ) -> None:
        spec = ModelCacheSpec("fake", (LayerSpec("full", _HEADS, _DIM, _DIM),) * _LAYERS)
        digest = hashlib.sha256(f"fake-{seed}".encode()).hexdigest()
        self.key = CompatibilityKey(digest, digest, (), spec)
        self.vocab: Vocab = FakeVocab()
        self.n_cells = n_cells or n_ctx * n_seq_max
        self.n_ctx, self.n_seq_max, self.n_batch = min(n_ctx, self.n_cells), n_seq_max, 512
        self.kv_bytes = self.n_cells * spec.f16_row_bytes
        self._seed = seed
        self._delay = step_delay
        self._rows: list[list[NDArray[np.float16]]] = [[] for _ in range(n_seq_max)]
        self._states: list[list[bytes]] = [[] for _ in range(n_seq_max)]  # digest of rows so far

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        if self._delay:
            time.sleep(self._delay)
        wanted = sum(len(c.token_ids) for c in chunks)
        if sum(map(len, self._rows)) + wanted > self.n_cells:
            raise EngineFault(f"no cells for {wanted} tokens")
        if wanted > self.n_batch + self.n_seq_max:
            raise EngineFault(f"a step of {wanted} tokens, the batch holds {self.n_batch}")
        logits = {}
        for chunk in chunks:
            rows = self._rows[chunk.seq_id]
            if len(rows) != chunk.start:
                raise EngineFault(f"position {chunk.start} after {len(rows)} rows")
            states = self._states[chunk.seq_id]
            for token in chunk.token_ids:
                self._append(chunk.seq_id, self._next_row(token, states[-1] if states else b""))
            if chunk.wants_logits:
                logits[chunk.seq_id] = self._logits(states[-1])
        return logits

    def _append(self, seq_id: int, row: NDArray[np.float16]) -> None:
        states = self._states[seq_id]
        before = states[-1] if states else b""
        self._rows[seq_id].append(row)
        states.append(hashlib.blake2b(before + row.tobytes()).digest())

    def _next_row(self, token: int, state: bytes) -> NDArray[np.float16]:
        digest = hashlib.shake_128(f"{self._seed}.{token}.".encode() + state).digest(256)
        row = np.frombuffer(digest, np.uint8).astype(np.float16) / np.float16(256)
        return row.reshape(_LAYERS, 2, _HEADS, _DIM)

    def _logits(self, state: bytes) -> Logits:
        noise = np.frombuffer(state * 5, np.uint8)
        logits = noise[: self.vocab.size].astype(np.float32) / np.float32(64)
        letters = [*range(97, 123), 32]
        logits[letters] += 8
        logits[list(self.vocab.eog)] += 7.2
        return logits

    def export(self, seq_id: int, start: int, stop: int) -> KVRows:
        if not 0 <= start < stop <= len(self._rows[seq_id]):
            raise EngineFault(f"rows {start}..{stop} of {len(self._rows[seq_id])}")
        stacked = np.stack(self._rows[seq_id][start:stop], axis=1)  # (L, T, 2, H, D)
        return (GroupRows(k=stacked[:, :, 0].copy(), v=stacked[:, :, 1].copy()),)

    def load(self, seq_id: int, start: int, rows: KVRows) -> None:
        if len(self._rows[seq_id]) != start:
            raise EngineFault(f"load at {start} after {len(self._rows[seq_id])} rows")
        stacked = np.stack([rows[0].k, rows[0].v], axis=2)
        for row in stacked.swapaxes(0, 1):
            self._append(seq_id, np.ascontiguousarray(row))

    def fork(self, source: int, target: int, n_rows: int) -> None:
        if self._rows[target]:
            raise EngineFault(f"fork into sequence {target}, which is not empty")
        self._rows[target] = self._rows[source][:n_rows]
        self._states[target] = self._states[source][:n_rows]

    def truncate(self, seq_id: int, n_rows: int) -> None:
        del self._rows[seq_id][n_rows:]
        del self._states[seq_id][n_rows:]

    def n_rows(self, seq_id: int) -> int:
        return len(self._rows[seq_id])

    def close(self) -> None:
        self._rows = []
