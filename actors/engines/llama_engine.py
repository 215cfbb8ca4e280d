"""The Engine on llama.cpp, through llama-cpp-python's low-level API.

One context, unified KV, flash attention, float16 compute; sequence n_seq_max is a scratch sequence
through which rows enter and leave without touching the rest. Keys of architectures with interleaved
rope are reordered at this edge. Refuses, before it is ready, models whose cache it cannot carry.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from actors.engines import llama_state
from actors.engines.base import Chunk, Logits, Vocab
from actors.errors import EngineFault, ModelUnavailable
from storage.spec import CompatibilityKey, GroupRows, KVRows, LayerSpec, ModelCacheSpec

logger = logging.getLogger(__name__)
_ROPE_INTERLEAVED, _ROPE_HALF_SPLIT = 0, 2  # llama_rope_type NORM, NEOX
_UBATCH = 512


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        logger.error("llama.cpp: %s", text.decode(errors="replace").strip())


class LlamaVocab:
    """The model's tokenizer; llama.cpp's is safe to use from several threads."""

    def __init__(self, model: Any) -> None:
        self._vocab = llama.llama_model_get_vocab(model)
        self.size = llama.llama_vocab_n_tokens(self._vocab)
        self.bos = llama.llama_vocab_bos(self._vocab)
        self.add_bos = bool(llama.llama_vocab_get_add_bos(self._vocab))
        self.eog = frozenset(
            i for i in range(self.size) if llama.llama_vocab_is_eog(self._vocab, i)
        )
        self.chat_template = _metadata(model).get("tokenizer.chat_template", "")
        self.bos_text = self._text(self.bos)
        self.eos_text = self._text(llama.llama_vocab_eos(self._vocab))
        self._bytes: dict[int, bytes] = {}

    def _text(self, token_id: int) -> str:
        if token_id < 0:
            return ""
        return bytes(llama.llama_vocab_get_text(self._vocab, token_id)).decode()

    def tokenize(self, text: str) -> list[int]:
        raw = text.encode()
        size = len(raw) + 8
        while True:
            ids = (llama.llama_token * size)()
            n = llama.llama_tokenize(self._vocab, raw, len(raw), ids, size, False, True)
            if n >= 0:
                return list(ids[:n])
            size = -n

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            buffer = ctypes.create_string_buffer(256)
            n = llama.llama_token_to_piece(self._vocab, token_id, buffer, 256, 0, False)
            known = self._bytes[token_id] = buffer.raw[: max(n, 0)]
        return known


class LlamaEngine:
    """n_seq_max sequences that share n_cells cells; see Engine for the calls.

    Raises ModelUnavailable for a file llama.cpp cannot load or a cache this engine cannot carry.
    """

    name = "llama.cpp"
    device = "cpu"

    def __init__(
        self, path: Path, *, n_seq_max: int, n_ctx: int, n_cells: int, n_threads: int
    ) -> None:
        """n_ctx: tokens per sequence, at most the model's; n_cells: tokens of all sequences."""
        llama.llama_log_set(_log, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self._context: Any = None
        self._model: Any = llama.llama_model_load_from_file(
            os.fsencode(path), llama.llama_model_default_params()
        )
        if not self._model:
            raise ModelUnavailable(f"{path}: llama.cpp cannot load this file")
        self._metadata = _metadata(self._model)
        self._rope = llama.llama_model_rope_type(self._model)
        spec = self._spec(path)  # refuses before the file is hashed
        self.key = CompatibilityKey(*_digests(path), rope=self._rope_parameters(), spec=spec)
        self.vocab: Vocab = LlamaVocab(self._model)
        self.n_ctx = min(n_ctx, llama.llama_model_n_ctx_train(self._model), n_cells)
        self.n_seq_max = n_seq_max
        self.n_batch = _UBATCH
        self._scratch = n_seq_max
        self._state = np.empty(0, np.uint8)
        self._open_context(n_cells, n_threads)
        self.kv_bytes = self.n_cells * self.key.spec.f16_row_bytes
        self._check_state()

    def _open_context(self, n_cells: int, n_threads: int) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = n_cells
        params.n_batch = self.n_batch + self.n_seq_max
        params.n_ubatch = _UBATCH
        params.n_seq_max = self.n_seq_max + 1
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.kv_unified = True
        params.no_perf = True
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise ModelUnavailable(f"llama.cpp cannot make a context of {n_cells} cells")
        self.n_cells = llama.llama_n_ctx(self._context)
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(params.n_batch, 0, 1)
        self._tokens = np.ctypeslib.as_array(self._batch.token, (params.n_batch,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, (params.n_batch,))
        self._wanted = np.ctypeslib.as_array(self._batch.logits, (params.n_batch,))
        np.ctypeslib.as_array(self._batch.n_seq_id, (params.n_batch,))[:] = 1

    def _spec(self, path: Path) -> ModelCacheSpec:
        model, arch = self._model, self._metadata["general.architecture"]
        if llama.llama_model_is_recurrent(model) or llama.llama_model_is_hybrid(model):
            raise ModelUnavailable(f"{path}: {arch} has recurrent layers, which are not supported")
        if llama.llama_model_n_swa(model):
            raise ModelUnavailable(
                f"{path}: {arch} has sliding-window layers, which are not supported yet"
            )
        if f"{arch}.attention.kv_lora_rank" in self._metadata:
            raise ModelUnavailable(f"{path}: {arch} has latent layers (MLA), not supported yet")
        if self._rope not in (_ROPE_INTERLEAVED, _ROPE_HALF_SPLIT):
            raise ModelUnavailable(f"{path}: {arch} has rope type {self._rope}, not supported")
        head = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
        layer = LayerSpec(
            "full",
            llama.llama_model_n_head_kv(model),
            int(self._metadata.get(f"{arch}.attention.key_length", head)),
            int(self._metadata.get(f"{arch}.attention.value_length", head)),
        )
        return ModelCacheSpec(arch, (layer,) * llama.llama_model_n_layer(model))

    def _rope_parameters(self) -> tuple[tuple[str, float | str], ...]:
        found, arch = self._metadata, self._metadata["general.architecture"]
        head = llama.llama_model_n_embd(self._model) // llama.llama_model_n_head(self._model)
        self._rope_dims = int(found.get(f"{arch}.rope.dimension_count", head))
        return (
            ("base", float(found.get(f"{arch}.rope.freq_base", 10000.0))),
            ("dims", float(self._rope_dims)),
            ("factor", float(found.get(f"{arch}.rope.scaling.factor", 1.0))),
            ("scaling", found.get(f"{arch}.rope.scaling.type", "none")),
        )

    def _check_state(self) -> None:
        """Two tokens out and in again: this build's state bytes are the ones llama_state knows."""
        try:
            self.step([Chunk(0, [0, 0], 0, False)])
            rows = self.export(0, 0, 2)
            self.truncate(0, 0)
            self.load(0, 0, rows)
            again = self.export(0, 0, 2)
            if not (rows[0].k == again[0].k).all() or not (rows[0].v == again[0].v).all():
                raise EngineFault("rows do not come back as they went in")
            self.truncate(0, 0)
        except EngineFault as error:
            raise ModelUnavailable(
                f"cannot export and import this model's cache: {error}"
            ) from error

    def step(self, chunks: Sequence[Chunk]) -> dict[int, Logits]:
        n = sum(len(chunk.token_ids) for chunk in chunks)
        if n > self._tokens.size:
            raise EngineFault(f"a step of {n} tokens, the batch holds {self._tokens.size}")
        n = 0
        rows = {}
        self._wanted[: self.n_batch + self.n_seq_max] = 0
        for chunk in chunks:
            end = n + len(chunk.token_ids)
            self._tokens[n:end] = chunk.token_ids
            self._positions[n:end] = np.arange(chunk.start, chunk.start + end - n)
            for i in range(n, end):
                self._batch.seq_id[i][0] = chunk.seq_id
            if chunk.wants_logits:
                self._wanted[end - 1] = 1
                rows[chunk.seq_id] = end - 1
            n = end
        self._batch.n_tokens = n
        code = llama.llama_decode(self._context, self._batch)
        if code:
            raise EngineFault(f"llama_decode of {n} tokens failed with {code}")
        return {
            seq_id: np.ctypeslib.as_array(
                llama.llama_get_logits_ith(self._context, row), (self.vocab.size,)
            )
            for seq_id, row in rows.items()
        }

    def export(self, seq_id: int, start: int, stop: int) -> KVRows:
        if not 0 <= start < stop <= self.n_rows(seq_id):
            raise EngineFault(f"rows {start}..{stop} of {self.n_rows(seq_id)}")
        llama.llama_memory_seq_cp(self._memory, seq_id, self._scratch, start, stop)
        try:
            size = llama.llama_state_seq_get_size(self._context, self._scratch)
            if size > self._state.size:  # reused: touching new pages costs more than the copy
                self._state = np.empty(size, np.uint8)
            pointer = self._state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            got = llama.llama_state_seq_get_data(self._context, pointer, size, self._scratch)
        finally:
            llama.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        if got != size:
            raise EngineFault(f"export of rows {start}..{stop} gave {got} of {size} bytes")
        k, v = llama_state.parse(self._state.data[:size], start, stop)
        layer = self.key.spec.groups[0]
        if k.shape[0] != len(layer.layers):
            raise EngineFault(f"state has {k.shape[0]} layers, the spec {len(layer.layers)}")
        k, v = self._heads(k, layer.key_dim), self._heads(v, layer.value_dim)
        if self._rope == _ROPE_INTERLEAVED:
            k = llama_state.to_half_split(k, self._rope_dims)
        else:
            k = k.copy()
        return (GroupRows(k, v.copy()),)

    def _heads(self, side: NDArray[np.float16], dim: int) -> NDArray[np.float16]:
        """(n_layers, T, n_kv_heads * dim) -> (n_layers, T, n_kv_heads, dim)."""
        heads = self.key.spec.groups[0].n_kv_heads
        if side.shape[2] != heads * dim:
            raise EngineFault(f"rows of {side.shape[2]} values, the spec has {heads} x {dim}")
        return side.reshape(*side.shape[:2], heads, dim)

    def load(self, seq_id: int, start: int, rows: KVRows) -> None:
        if self.n_rows(seq_id) != start:
            raise EngineFault(f"load at {start} after {self.n_rows(seq_id)} rows")
        k, v = rows[0].k, rows[0].v
        stop = start + k.shape[1]
        if self._rope == _ROPE_INTERLEAVED:
            k = llama_state.to_interleaved(k, self._rope_dims)
        flat = (*k.shape[:2], -1)
        raw = llama_state.build(k.reshape(flat), v.reshape(flat), start, self._scratch)
        pointer = raw.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        got = llama.llama_state_seq_set_data(self._context, pointer, raw.size, self._scratch)
        first = llama.llama_memory_seq_pos_min(self._memory, self._scratch)
        last = llama.llama_memory_seq_pos_max(self._memory, self._scratch)
        if got == raw.size and (first, last) == (start, stop - 1):
            llama.llama_memory_seq_cp(self._memory, self._scratch, seq_id, start, stop)
        llama.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        if self.n_rows(seq_id) != stop:
            raise EngineFault(f"rows {start}..{stop} were not restored ({got} of {raw.size} bytes)")

    def fork(self, source: int, target: int, n_rows: int) -> None:
        if self.n_rows(target):
            raise EngineFault(f"fork into sequence {target}, which is not empty")
        llama.llama_memory_seq_cp(self._memory, source, target, 0, n_rows)

    def truncate(self, seq_id: int, n_rows: int) -> None:
        if not llama.llama_memory_seq_rm(self._memory, seq_id, n_rows or -1, -1):
            raise EngineFault(f"sequence {seq_id} cannot be cut to {n_rows} rows")

    def n_rows(self, seq_id: int) -> int:
        return int(llama.llama_memory_seq_pos_max(self._memory, seq_id)) + 1

    def close(self) -> None:
        if self._context:
            llama.llama_batch_free(self._batch)
            llama.llama_free(self._context)
            self._context = None
        if self._model:
            llama.llama_model_free(self._model)
            self._model = None


def _metadata(model: Any) -> dict[str, str]:
    """The GGUF's scalar metadata and chat template, as llama.cpp prints them."""
    found = {}
    for index in range(llama.llama_model_meta_count(model)):
        name = ctypes.create_string_buffer(256)
        llama.llama_model_meta_key_by_index(model, index, name, 256)
        size = 4096
        while True:
            value = ctypes.create_string_buffer(size)
            n = llama.llama_model_meta_val_str_by_index(model, index, value, size)
            if n < size:
                break
            size = n + 1
        found[name.value.decode()] = value.value.decode(errors="replace")
    return found


def _digests(path: Path) -> tuple[str, str]:
    """(weights, tokenizer) sha256 of a GGUF; cached by path, size and time of change."""
    stat = path.stat()
    key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    entry = root / "kvferry" / "digests" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    try:
        weights, tokenizer = json.loads(entry.read_text())
        return str(weights), str(tokenizer)
    except (OSError, ValueError):
        pass
    with path.open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    tokenizer = _tokenizer_digest(path)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_suffix(f".{secrets.token_hex(4)}")
        temporary.write_text(json.dumps([weights, tokenizer]))
        temporary.replace(entry)
    except OSError as error:
        logger.warning("cannot cache the digests of %s: %s", path, error)
    return weights, tokenizer


def _tokenizer_digest(path: Path) -> str:
    """Over every tokenizer.ggml.* field; the chat template is text, not tokenizer."""
    from gguf import GGUFReader  # slow to import, and needed only for a file not seen before

    digest = hashlib.sha256()
    for name, field in sorted(GGUFReader(path).fields.items()):
        if name.startswith("tokenizer.ggml."):
            for part in field.parts:
                digest.update(part.tobytes())
    return digest.hexdigest()
