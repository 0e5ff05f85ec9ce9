"""Following a grammar token by token: what may come next, what must, and what has come."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from common_platform.errors import RequestError
from servekit.sampling.parameters import StructuredOutput
from servekit.sampling.structured.grammar import engine, field_of, to_grammar
from servekit.sampling.structured.limits import GrammarLimits

# What a compiled grammar takes is not told, so it is taken for more: measured, 29 KB for a text of 52 characters,
# 86 KB for one of 615, and 1.2 MB for one of 57,000.
BYTES_OF_EACH, BYTES_OF_A_CHARACTER = 32_768, 96
TOO_LARGE = ("TooComplex", "too large", "too many states", "Too many items", "Unable to determine if regex is empty")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a state must know of the model's tokens."""

    size: int  # rows of the model's logits
    eos_token_ids: frozenset[int]

    @property
    def num_mask_words(self) -> int:
        return (self.size + 31) // 32


class GrammarState:
    """Where one sequence stands in its grammar.

    The end of a sequence is this class's own business: it may come wherever the grammar is complete, once or more.
    """

    __slots__ = ("_matcher", "_num_ends", "_vocabulary")

    def __init__(self, matcher: Any, vocabulary: Vocabulary, num_ends: int = 0) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._num_ends = num_ends  # end tokens that stand behind what the matcher has seen

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Write the allowed tokens of the next position into ``row`` [ceil(vocab / 32)] int32, bit i of word j for
        token 32 * j + i.

        Raises:
            RequestError: code ``grammar_failed``, when the grammar has met one of its limits.
        """
        words = self._vocabulary.num_mask_words
        if not row.flags.c_contiguous or row.dtype != np.int32 or row.size != words:
            raise RequestError(
                "grammar", f"{row.dtype}[{row.size}]", f"contiguous int32[{words}]", code="grammar_failed"
            )
        if self._num_ends:
            _allow_only(row, self._vocabulary.eos_token_ids)
            return
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()

    def accept(self, tokens: Sequence[int]) -> bool:
        """Move on by ``tokens``; False, and no move at all, where one of them is not allowed."""
        for done, token in enumerate(tokens):
            if not self._accept_one(token):
                self.rollback(done)
                return False
        return True

    def allowed_prefix(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens``, from the first on, the grammar allows from here."""
        done = 0
        while done < len(tokens) and self._accept_one(tokens[done]):
            done += 1
        self.rollback(done)
        return done

    def rollback(self, num_tokens: int) -> None:
        """Undo the last ``num_tokens`` accepted tokens."""
        ends = min(num_tokens, self._num_ends)
        self._num_ends -= ends
        if num_tokens > ends:
            self._matcher.rollback(num_tokens - ends)
            self._check()

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would write them; empty where there is a choice."""
        return [] if self._num_ends else list(self._matcher.compute_ff_tokens())

    @property
    def is_complete(self) -> bool:
        """Whether the grammar is satisfied, so that the sequence may end here."""
        return self._num_ends > 0 or bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""
        return self._num_ends > 0 or bool(self._matcher.is_stopped())

    def copy(self) -> GrammarState:
        """A state of its own that stands at the same place."""
        return GrammarState(self._matcher.deep_copy(), self._vocabulary, self._num_ends)

    def _accept_one(self, token: int) -> bool:
        if token in self._vocabulary.eos_token_ids and self.is_complete:
            self._num_ends += 1
            return True
        if self._num_ends or not 0 <= token < self._vocabulary.size:
            return False
        return bool(self._matcher.try_consume_tokens([token]))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError("grammar", _first_line(self._matcher.get_error()), code="grammar_failed")


def _allow_only(row: NDArray[np.int32], tokens: Iterable[int]) -> None:
    bits = row.view(np.uint32)
    bits[:] = 0
    for token in tokens:
        bits[token // 32] |= np.uint32(1 << token % 32)


class GrammarCompiler:
    """Makes GrammarStates for one tokenizer; equal constraints are compiled once.

    Args:
        tokenizer_json: the text of ``tokenizer.json``.
        vocab_size: rows of the model's logits.
        eos_token_ids: tokens that end a sequence.

    Cost: making it reads the vocabulary (0.3 s for 50,000 tokens); a state of a known constraint is a copy.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int], limits: GrammarLimits | None = None
    ) -> None:
        llguidance = engine()
        self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        self._vocabulary = Vocabulary(vocab_size, frozenset(eos_token_ids))
        limits = limits or GrammarLimits()
        self._limits = llguidance.LLParserLimits(max_lexer_states=limits.max_grammar_states, verbose_errors=False)
        self._most_bytes = limits.cache_bytes
        self._num_bytes = 0
        self._pristine: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()  # the least recently used goes first
        self._lock = threading.Lock()  # of ``_pristine``: one thread compiles while another takes copies

    @property
    def num_mask_words(self) -> int:
        return self._vocabulary.num_mask_words

    def compile(self, spec: StructuredOutput) -> GrammarState:
        """A state at the start of ``spec``.

        Raises:
            RequestError: code ``grammar_invalid`` or ``grammar_too_large``; ``param`` is the spec's field.
        """
        key = hashlib.sha256(msgspec.msgpack.encode(spec)).digest()
        with self._lock:
            known = self._pristine.get(key)
        matcher, size = known or self._compiled(spec)
        with self._lock:
            self._keep(key, matcher, size)
            return GrammarState(matcher.deep_copy(), self._vocabulary)

    @property
    def num_cached_bytes(self) -> int:
        """What the compiled grammars that are kept are taken to need."""
        return self._num_bytes

    def _keep(self, key: bytes, matcher: Any, size: int) -> None:
        if key not in self._pristine:
            self._num_bytes += size
        self._pristine[key] = matcher, size
        self._pristine.move_to_end(key)
        while self._num_bytes > self._most_bytes:
            self._num_bytes -= self._pristine.popitem(last=False)[1][1]

    def _compiled(self, spec: StructuredOutput) -> tuple[Any, int]:
        """A matcher, and about how many bytes it needs."""
        grammar = to_grammar(spec)
        matcher = engine().LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask finds what only the automaton shows
        if matcher.is_error():
            raise _refusal(field_of(spec), matcher.get_error())
        return matcher, BYTES_OF_EACH + BYTES_OF_A_CHARACTER * len(grammar)


def _refusal(param: str, reason: str) -> RequestError:
    line = _first_line(reason)
    if any(words in reason for words in TOO_LARGE):
        return RequestError(param, line, "a smaller one", code="grammar_too_large", flag="--max-grammar-states")
    if line.startswith("NoExtension"):
        line = "left recursion or a rule that can never end"
    if line.startswith("Unsatisfiable"):
        return RequestError(param, line, "one that some text fits", code="grammar_unsatisfiable")
    return RequestError(param, line, "a valid one", code="grammar_invalid")


def _first_line(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error:")]
    return (errors or lines or ["unknown"])[0]
