"""The tokenizer of an MLX directory as the Vocab of an engine, through tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from actors.errors import ModelUnavailable

_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>")


class DirectoryVocab:
    """tokenizer.json, and what tokenizer_config.json and the model's config add to it."""

    def __init__(self, path: Path, config: Mapping[str, Any], size: int) -> None:
        """size: of the model's logits. Raises ModelUnavailable."""
        try:
            self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ModelUnavailable(f"{path}: no tokenizer.json it can read ({error})") from error
        extra = _json(path / "tokenizer_config.json")
        self.size = size
        self.bos_text, self.eos_text = _text(extra, "bos_token"), _text(extra, "eos_token")
        self.bos = self._id(self.bos_text)
        self.add_bos = bool(extra.get("add_bos_token", False)) and self.bos >= 0
        eos = config.get("eos_token_id")
        ends = {*(eos if isinstance(eos, list) else [eos]), self._id(self.eos_text)}
        ends |= {self._id(text) for text in _ENDS}
        self.eog = frozenset(i for i in ends if isinstance(i, int) and i >= 0)
        template = path / "chat_template.jinja"
        self.chat_template = template.read_text() if template.exists() else _template(extra)
        special = self._tokenizer.get_added_tokens_decoder()
        self._special = {i for i, token in special.items() if token.special}
        self._added = {i: token.content for i, token in special.items()}
        decoder = json.loads(self._tokenizer.to_str()).get("decoder") or {}
        self._byte_level = "ByteLevel" in json.dumps(decoder)

    def _id(self, text: str) -> int:
        found = self._tokenizer.token_to_id(text) if text else None
        return -1 if found is None else int(found)

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if self._byte_level:
            return bytes(_BYTES[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: every byte as a printable character."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTES = _byte_alphabet()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelUnavailable(f"{path}: {error}") from error
    return found if isinstance(found, dict) else {}


def _text(extra: Mapping[str, Any], name: str) -> str:
    token = extra.get(name) or ""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _template(extra: Mapping[str, Any]) -> str:
    template = extra.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = next((x["template"] for x in template if x.get("name") == "default"), "")
    return str(template)
