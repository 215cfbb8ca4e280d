"""llama.cpp's tokenizer as the Vocab of an engine."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp as llama

from actors.engines import llama_spec
from actors.tools import SHOWN


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
        self.chat_template = llama_spec.metadata(model).get("tokenizer.chat_template", "")
        self.bos_text = self._text(self.bos)
        self.eos_text = self._text(llama.llama_vocab_eos(self._vocab))
        self._bytes: dict[int, bytes] = {}
        for text in SHOWN:
            ids = self.tokenize(text)
            if len(ids) == 1:
                self._bytes[ids[0]] = text.encode()

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
            known = self._bytes[token_id] = self._piece(token_id)
        return known

    def _piece(self, token_id: int) -> bytes:
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama.llama_token_to_piece(self._vocab, token_id, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n
