"""What a reply must look like (JSON schema, regex, choice, grammar) as masks over token ids.

llguidance does the work, on a vocabulary's own bytes, so it is the same on every engine. A grammar
is one reply's state: a mask for the next token, advanced token by token; a resumed turn rebuilds it
by replaying its ids. What a client sends is bounded here: its size, the time to compile it, and
what each step may cost.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence as Ids
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress

import llguidance
import numpy as np
from numpy.typing import NDArray

from actors.engines.base import Vocab
from actors.errors import EngineFault, InvalidRequest, Overloaded
from actors.turn import Guide

MAX_SOURCE = 1 << 16  # bytes
MAX_CALLS = 1 << 18  # of the grammar of all tools together
_COMPILE_TIMEOUT_S = 10.0
_BUSY_TIMEOUT_S = 10.0  # until others' are compiled
_WARM_TIMEOUT_S = 60.0
_MAX_KNOWN = 32  # grammars of tools
# llguidance's recursion goes as deep as the rules of a grammar are chained: a source of MAX_SOURCE
# overflows a thread's usual 8 MB, which ends the process.
_STACK_BYTES = 256 << 20
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=1_000,  # JSON schema: about 250 optional properties of one object
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,  # about 7 ms
    step_max_items=10_000,
    max_lexer_states=20_000,  # about 40 MB
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Grammar:
    """One reply's state. Used by one thread at a time."""

    def __init__(self, matcher: llguidance.LLMatcher, param: str, n_vocab: int) -> None:
        self._matcher, self._param, self._n_vocab = matcher, param, n_vocab

    def copy(self) -> Grammar:
        """One that goes its own way from here."""
        return Grammar(self._matcher.deep_copy(), self._param, self._n_vocab)

    def mask(self) -> NDArray[np.bool_]:
        """(n_vocab,) tokens that may come next. Raises InvalidRequest when a limit is reached."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _invalid(self._param, self._matcher.get_error())
        return np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        """Raises InvalidRequest when a limit is reached, EngineFault for a token that the mask does
        not allow."""
        if not self._matcher.consume_token(token):
            reason = self._matcher.get_error()
            if "doesn't satisfy the grammar" in reason:
                raise EngineFault(f"token {token}: {_short(reason)}")
            raise _invalid(self._param, reason)

    @property
    def complete(self) -> bool:
        """Nothing may follow."""
        return self._matcher.is_stopped()


class GrammarCompiler:
    """Compiles for one vocabulary, on a thread of its own. Any thread may ask."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._known: dict[Guide, Grammar] = {}  # as compiled, the least recently used first

    def warm(self) -> None:
        """Read the vocabulary now. With 262144 tokens it takes a second or more, in which no other
        thread of the process runs; signs of life are due more often."""
        wait([self._submit(Guide("regex", "a", "warm"), threading.Event())], _WARM_TIMEOUT_S)

    def compile(self, guide: Guide, reply: Ids[int] = ()) -> Grammar:
        """The grammar after `reply`. Raises InvalidRequest for a source that is malformed, too
        large, or that no text can satisfy; it names the part at fault where there are several.
        Raises Overloaded when others' take too long."""
        try:
            grammar = self._compiled(guide)
        except InvalidRequest:
            with suppress(Overloaded):  # the whole may still be under way
                for part in guide.parts:
                    self._compiled(part)
            raise
        for token in reply:
            grammar.accept(token)
        return grammar

    def _compiled(self, guide: Guide) -> Grammar:
        """A grammar at its start. An agent sends its tools with every turn: theirs are kept."""
        if guide.kind != "calls":
            return self._compile_now(guide)
        with self._lock:
            known = self._known.pop(guide, None)
        if known is None:
            known = self._compile_now(guide)
        copy = known.copy()
        with self._lock:
            self._known[guide] = known
            while len(self._known) > _MAX_KNOWN:
                del self._known[next(iter(self._known))]
        return copy

    def _compile_now(self, guide: Guide) -> Grammar:
        limit = MAX_CALLS if guide.kind == "calls" else MAX_SOURCE
        if len(guide.source.encode()) > limit:
            raise _invalid(guide.param, f"longer than {limit} bytes")
        began = threading.Event()
        compiled = self._submit(guide, began)
        if not began.wait(_BUSY_TIMEOUT_S) and compiled.cancel():
            raise Overloaded("other requests' grammars are being compiled", _BUSY_TIMEOUT_S)
        try:
            return compiled.result(_COMPILE_TIMEOUT_S)
        except TimeoutError:
            raise _invalid(guide.param, "too complex: compiling it takes too long") from None

    def _submit(self, guide: Guide, began: threading.Event) -> Future[Grammar]:
        def compile_now() -> Grammar:
            began.set()
            return self._compile(guide)

        with self._lock:
            if self._thread is None:
                before = threading.stack_size(_STACK_BYTES)  # of threads that start from here on
                try:
                    self._thread = ThreadPoolExecutor(1, "grammar")
                    return self._thread.submit(compile_now)
                finally:
                    threading.stack_size(before)
            return self._thread.submit(compile_now)

    def _compile(self, guide: Guide) -> Grammar:
        if self._tokenizer is None:
            self._tokenizer = llguidance.LLTokenizer(
                _Tokenizer(self._vocab),  # type: ignore[arg-type]
                eos_token=sorted(self._vocab.eog),
            )
        try:
            source = _source(guide)
        except ValueError as error:
            raise _invalid(guide.param, str(error)) from error
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _invalid(guide.param, matcher.get_error())
        grammar = Grammar(matcher, guide.param, self._vocab.size)
        grammar.mask()  # shows what nothing can satisfy
        return grammar


class _Tokenizer:
    """A Vocab as llguidance's TokenizerWrapper has it; tokens without text are in no mask."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocab: Vocab) -> None:
        self.eos_token_id = min(vocab.eog)
        self.special_token_ids: list[int] = []
        self.tokens = [vocab.token_bytes(token) for token in range(vocab.size)]
        self._vocab = vocab

    def __call__(self, text: str) -> list[int]:
        return self._vocab.tokenize(text)


def _source(guide: Guide) -> str:
    """In llguidance's own form. Raises ValueError."""
    match guide.kind:
        case "json":
            # Compact, as OpenAI's: free white space lets a small model go on for ever.
            return llguidance.LLMatcher.grammar_from_json_schema(
                guide.source, overrides={"whitespace_flexible": False}
            )
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(guide.source)
        case "choice":
            choices = [json.dumps(text, ensure_ascii=False) for text in json.loads(guide.source)]
            return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
        case "grammar":
            if "::=" in guide.source:
                raise ValueError("GBNF; this server reads Lark")
            return llguidance.LLMatcher.grammar_from_lark(guide.source)
        case "calls":
            return llguidance.LLMatcher.grammar_from_lark(guide.source)


def _invalid(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {_short(reason)}", param, "invalid_value")


def _short(reason: str) -> str:
    """What llguidance says without the listing of the source, which may be long."""
    said = reason.partition("\n<")[0].strip()
    if said == "NoExtensionBias":
        said = "no text can satisfy it"
    return said if len(said) <= 500 else said[:500] + " …"
