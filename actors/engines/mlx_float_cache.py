"""The rows of one layer for several sequences at once, in float16: mlx-lm's batch-cache protocol.

The sequences of a batch end in the same column, so shorter ones have padding on their left:

    _held = [5, 2, 3]     . = padding        columns 0 .. _idx - 1
    a a a a a
    . . . b b
    . . c c c

With a `window` a cache forgets rows that no window to come will reach. Every layer of a batch
forgets at the same steps, and one mask serves all layers of a kind. The caches know no model and no
engine; mlx_batches moves sequences between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import mlx.core as mx

from actors.engines import mlx_codec
from storage.quantizers import F16, Quantizer

Fields = list[mx.array]  # (B, n_kv_heads, columns, width) each: of the keys, then of the values
Mask = mx.array | Literal["causal"] | None


class BatchKVCache:
    """Float16 rows. `latent`: there are no values but the first so many dims of the keys (MLA)."""

    step = 256  # columns are allocated by so many
    spare = 64  # rows kept before a window: a reply that is cut by less keeps its window
    slack = 256  # columns a windowed cache may have beyond what it keeps

    def __init__(
        self, left_padding: Sequence[int] = (0,), *, window: int = 0, latent: int = 0
    ) -> None:
        """left_padding: of prompts that are about to be fed, one number per sequence."""
        self.window, self.latent = window, latent
        self._fields: Fields = []  # no columns yet
        self._idx = 0
        self._held = [-n for n in left_padding]
        self._offset = list(self._held)  # length of each sequence, forgotten rows included
        self._right_padding: list[int] = []

    # ---- what subclasses change

    @property
    def quantizers(self) -> tuple[Quantizer, Quantizer]:
        return F16(), F16()

    def attend(
        self, queries: mx.array, keys: mx.array, values: mx.array | None, scale: float, mask: Mask
    ) -> mx.array:
        """Append the rows of (B, n_kv_heads, L, D) and attend to all there are: queries
        (B, n_heads, L, D) -> (B, n_heads, L, D of the values). `mask`: of make_mask(L)."""
        k, v = self.update_and_fetch(keys, values)
        return mx.fast.scaled_dot_product_attention(
            queries, k.astype(queries.dtype), v.astype(queries.dtype), scale=scale, mask=mask
        )

    def update_and_fetch(self, keys: mx.array, values: mx.array | None) -> tuple[Any, Any]:
        """Append rows; all keys and values, (B, n_kv_heads, columns, D) float16."""
        k, *v = self._append(self._pack(keys, values))
        return k, v[0] if v else k[..., : self.latent]

    # ---- the protocol

    @property
    def offset(self) -> mx.array:
        """(B,) int32: the position of each sequence's next token."""
        return mx.array(self._offset)

    @property
    def left_padding(self) -> mx.array:
        return mx.array([self._idx - n for n in self._held])

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Which columns the next `n` tokens see: (n, columns), with padding (B, 1, n, columns), or
        short for it. mlx-lm asks before the tokens are appended."""
        window, padded = window_size or self.window, min(self._held) < self._idx
        if not padded and not (window and self._idx + n > window) and not return_array:
            return None if n == 1 else "causal"
        columns = mx.arange(self._idx + n)
        rows = columns[self._idx :, None]
        mask = columns <= rows
        if window:
            mask = mask & (columns > rows - window)
        if padded:
            mask = mask & (columns >= self.left_padding[:, None, None, None])
        return mask

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say how the prompts about to be fed are padded. Raises ValueError for left padding after
        the first row."""
        if left_padding is not None:
            if self._fields:
                raise ValueError("left padding of a cache that has rows")
            self._held = [n - pad for n, pad in zip(self._held, left_padding, strict=True)]
            self._offset = list(self._held)
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = list(right_padding)

    def finalize(self) -> None:
        """The right padding that `prepare` announced was fed: let the sequences end together."""
        pads, self._right_padding = self._right_padding, []
        if not pads:
            return
        rows = []
        for i, pad in enumerate(pads):
            row = [x[i : i + 1, :, : self._idx - pad] for x in self._fields]
            rows.append(_pad_left(row, pad))
        self._fields = [mx.concatenate(list(xs)) for xs in zip(*rows, strict=True)]
        self._held = [n - pad for n, pad in zip(self._held, pads, strict=True)]
        self._offset = [n - pad for n, pad in zip(self._offset, pads, strict=True)]

    def filter(self, batch_indices: Sequence[int] | mx.array) -> None:
        """Keep these sequences, in this order."""
        keep: list[int] = _ints(batch_indices)
        self._held = [self._held[i] for i in keep]
        self._offset = [self._offset[i] for i in keep]
        # padding that no sequence needs; what `prepare` announced may not have been fed yet
        first = min(self._idx, max(0, self._idx - max(self._held)))
        self._fields = [x[:, :, first : self._idx] for x in self._fields]
        if keep != [0] or (len(self._fields) and self._fields[0].shape[0] > 1):
            self._fields = [x[mx.array(keep)] for x in self._fields]
        self._idx -= first

    def extend(self, other: BatchKVCache) -> None:
        """Add another batch's sequences after these."""
        idx = max(self._idx, other._idx)
        like = self._fields or other._fields
        sides = [_pad_left(c._columns(like), idx - c._idx) for c in (self, other)]
        self._fields = [mx.concatenate(list(xs)) for xs in zip(*sides, strict=True)]
        self._idx = idx
        self._held += other._held
        self._offset += other._offset

    @classmethod
    def merge(cls, caches: Sequence[BatchKVCache]) -> BatchKVCache:
        """One batch of all their sequences, in order."""
        batch = caches[0].copy()
        for cache in caches[1:]:
            batch.extend(cache)
        return batch

    def extract(self, idx: int) -> BatchKVCache:
        """One sequence as a batch of its own, without padding."""
        cache = self.copy()
        cache.filter([idx])
        return cache

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last `n` rows of every sequence; how many it were. What a window cannot give
        back is missing from `n_held`."""
        n = min(n, max(self._offset))
        self._idx = max(0, self._idx - n)
        self._held = [max(0, held - n) for held in self._held]
        self._offset = [offset - n for offset in self._offset]
        return n

    def size(self) -> int:
        """Columns."""
        return self._idx

    def empty(self) -> bool:
        return not self._fields

    @property
    def nbytes(self) -> int:
        return sum(int(x.nbytes) for x in self._fields)

    @property
    def state(self) -> tuple[Any, ...]:
        return (self._fields, self._idx, self._held, self._offset, self.window, self.latent)

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        self._fields, self._idx, self._held, self._offset, self.window, self.latent = state
        self._right_padding = []

    # ---- what engines use besides

    def n_rows(self, index: int) -> int:
        """Length of a sequence."""
        return self._offset[index]

    def n_held(self, index: int) -> int:
        """How many of its last rows are there; all, without a window."""
        return self._held[index]

    @property
    def n_sequences(self) -> int:
        return len(self._held)

    @property
    def fields(self) -> Fields:
        """The arrays, to be evaluated."""
        return self._fields

    def read(self, index: int, start: int, stop: int) -> Fields:
        """Rows start..stop of one sequence, which must be there: (n_kv_heads, rows, width) each."""
        first = self._idx - self._offset[index]
        return [x[index, :, first + start : first + stop] for x in self._fields]

    def write(self, fields: Fields, n_rows: int) -> None:
        """Append `n_rows` rows to a batch of one sequence, of which `fields` has the last ones in
        their stored form, (1, n_kv_heads, rows, width) each; none at all for (). Where rows are
        missing, those before them are forgotten."""
        count = int(fields[0].shape[2]) if fields else 0
        if count < n_rows:
            self._fields, self._idx, self._held = [], 0, [0]
        if count:
            self._append(fields)
        self._offset[0] += n_rows - count

    def copy(self) -> BatchKVCache:
        """The same rows; nothing is copied before one of both is written to."""
        cache = type(self).__new__(type(self))
        cache.state = self.state
        cache._fields = list(self._fields)
        cache._held, cache._offset = list(self._held), list(self._offset)
        return cache

    def _pack(self, keys: mx.array, values: mx.array | None) -> Fields:
        packed = list(mlx_codec.encode(self.quantizers[0], keys).values())
        if values is not None:
            packed += mlx_codec.encode(self.quantizers[1], values).values()
        return packed

    def _append(self, fields: Fields) -> Fields:
        """All columns, those that are forgotten from now on included."""
        n = int(fields[0].shape[2])
        columns = int(self._fields[0].shape[2]) if self._fields else 0
        stop = self._idx + n
        if stop > columns:
            more = -(-(stop - self._idx) // self.step) * self.step
            old = self._columns(fields)
            self._fields = [
                mx.concatenate([x, mx.zeros((*y.shape[:2], more, y.shape[3]), y.dtype)], axis=2)
                for x, y in zip(old, fields, strict=True)
            ]
        for x, y in zip(self._fields, fields, strict=True):
            x[:, :, self._idx : stop] = y
        self._idx = stop
        self._held = [held + n for held in self._held]
        self._offset = [offset + n for offset in self._offset]
        whole = [x[:, :, :stop] for x in self._fields]
        keep = self.window + self.spare
        if self.window and stop > keep + self.slack and not self._right_padding:
            self._fields = [x[:, :, stop - keep : stop] for x in self._fields]
            self._idx = keep
            self._held = [min(held, keep) for held in self._held]
        return whole

    def _columns(self, like: Fields) -> Fields:
        """The columns in use; of an empty cache none, in the form of `like`."""
        if self._fields:
            return [x[:, :, : self._idx] for x in self._fields]
        n = len(self._held)
        return [mx.zeros((n, x.shape[1], 0, x.shape[3]), x.dtype) for x in like]


def _pad_left(fields: Fields, n: int) -> Fields:
    if not n:
        return fields
    return [mx.pad(x, [(0, 0), (0, 0), (n, 0), (0, 0)]) for x in fields]


def _ints(indices: Sequence[int] | mx.array) -> list[int]:
    return indices.tolist() if isinstance(indices, mx.array) else list(indices)  # type: ignore
