"""Following a grammar token by token: what may come next, what must, and what has come."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from common_platform.errors import RequestError
from servekit.sampling.parameters import StructuredOutput
from servekit.sampling.structured.grammar import engine, field_of, to_grammar
from servekit.sampling.structured.limits import GrammarLimits

MAX_CACHED = 256  # compiled grammars kept; the least recently used goes first


class GrammarState:
    """Where one sequence stands in its grammar."""

    __slots__ = ("_matcher", "_words")

    def __init__(self, matcher: Any, num_words: int) -> None:
        self._matcher = matcher
        self._words = num_words

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Write the allowed tokens of the next position into ``row`` [ceil(vocab / 32)] int32, bit i of word j for
        token 32 * j + i.

        Raises:
            RequestError: code ``grammar_failed``, when the grammar has met one of its limits.
        """
        if not row.flags.c_contiguous or row.dtype != np.int32 or row.size != self._words:
            raise RequestError(
                "grammar", f"{row.dtype}[{row.size}]", f"contiguous int32[{self._words}]", code="grammar_failed"
            )
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check()

    def accept(self, tokens: Sequence[int]) -> bool:
        """Move on by ``tokens``; False, and no move at all, where one of them is not allowed."""
        wanted = list(tokens)
        done = self._matcher.try_consume_tokens(wanted)
        if done < len(wanted) and done:
            self._matcher.rollback(done)
        return bool(done == len(wanted))

    def allowed_prefix(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens``, from the first on, the grammar allows from here."""
        return int(self._matcher.validate_tokens(list(tokens)))

    def rollback(self, num_tokens: int) -> None:
        """Undo the last ``num_tokens`` accepted tokens."""
        if num_tokens and not self._matcher.rollback(num_tokens):
            self._check()

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would write them; empty where there is a choice."""
        return list(self._matcher.compute_ff_tokens())

    @property
    def is_complete(self) -> bool:
        """Whether the grammar is satisfied, so that the sequence may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end of the sequence may follow."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> GrammarState:
        """A state of its own that stands at the same place."""
        return GrammarState(self._matcher.deep_copy(), self._words)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError("grammar", _first_line(self._matcher.get_error()), code="grammar_failed")


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
        self._num_words = (vocab_size + 31) // 32
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=(limits or GrammarLimits()).max_grammar_states, verbose_errors=False
        )
        self._pristine: OrderedDict[bytes, Any] = OrderedDict()

    @property
    def num_mask_words(self) -> int:
        return self._num_words

    def compile(self, spec: StructuredOutput) -> GrammarState:
        """A state at the start of ``spec``.

        Raises:
            RequestError: code ``grammar_invalid`` or ``grammar_too_large``; ``param`` is the spec's field.
        """
        key = hashlib.sha256(msgspec.msgpack.encode(spec)).digest()
        matcher = self._pristine.get(key)
        if matcher is None:
            matcher = self._pristine[key] = self._compiled(spec)
            if len(self._pristine) > MAX_CACHED:
                self._pristine.popitem(last=False)
        self._pristine.move_to_end(key)
        return GrammarState(matcher.deep_copy(), self._num_words)

    def _compiled(self, spec: StructuredOutput) -> Any:
        matcher = engine().LLMatcher(self._tokenizer, to_grammar(spec), log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask finds what only the automaton shows
        if matcher.is_error():
            raise _refusal(field_of(spec), matcher.get_error())
        return matcher


def _refusal(param: str, reason: str) -> RequestError:
    line = _first_line(reason)
    if "TooComplex" in reason or "too large" in reason or "too many" in reason:
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
