"""What a request may ask of the sampler, with every range checked once, here."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from common_platform.errors import RequestError

MAX_N = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
INT64_MAX = 2**63 - 1
GREEDY_BELOW = 1e-5  # a temperature; logits over a smaller one are no numbers any more


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Exactly one of these constrains what may be generated (names as vLLM's clients send them)."""

    json: str | None = None  # a JSON schema, as text
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark or EBNF
    lark: str | None = None  # a grammar that the server wrote itself
    json_object: bool = False

    def __post_init__(self) -> None:
        given = [f for f in self.__struct_fields__ if getattr(self, f) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                "structured_outputs", given, "exactly one of json, regex, choice, grammar", code="conflict"
            )


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen; the names and defaults are vLLM's.

    Raises:
        RequestError: a value is out of its range; ``param`` names the field.

    Source of the methods: nucleus, Holtzman et al. 2020; typical, Meister et al. 2022; min-p, Nguyen
    et al. 2024; repetition penalty, Keskar et al. 2019 (CTRL).
    """

    n: int = 1  # sequences returned
    best_of: int | None = None  # sequences generated, of which the n with the highest mean logprob return
    temperature: float = 1.0  # below 1e-5 is greedy; 0..2
    top_p: float = 1.0  # (0, 1]
    top_k: int = -1  # -1 or 0 keeps all
    min_p: float = 0.0  # 0..1, share of the most likely token's probability
    typical_p: float = 1.0  # (0, 1]
    presence_penalty: float = 0.0  # -2..2
    frequency_penalty: float = 0.0  # -2..2
    repetition_penalty: float = 1.0  # 0.01..10, over prompt and output
    logit_bias: dict[int, float] | None = None  # token id -> -100..100
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None  # filled at the door from bad_words
    max_tokens: int | None = 16  # None: to the end of the context
    min_tokens: int = 0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None  # 64-bit signed
    logprobs: int | None = None  # None: none; 0: the sampled token's; k: the k most likely as well
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    structured_outputs: StructuredOutput | None = None
    logits_processors: list[str] = []  # names registered at start-up
    extra_args: dict[str, Any] | None = None  # read by custom logits processors

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N, flag="--max-n")
        if self.best_of is not None:
            _integer("best_of", self.best_of, self.n, MAX_N, flag="--max-n")
        _number("temperature", self.temperature, 0.0, 2.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _number("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("top_k", self.top_k, -1, INT64_MAX)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _integer("min_tokens", self.min_tokens, 0, INT64_MAX)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, INT64_MAX)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    "min_tokens", self.min_tokens, f"0..max_tokens={self.max_tokens}", code="out_of_range"
                )
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), INT64_MAX)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS, flag="--max-logprobs")
        self._check_lists()

    def _check_lists(self) -> None:
        _count("stop", self.stop, MAX_STOP, flag="--max-stop")
        for i, text in enumerate(self.stop):
            if not text or len(text) > MAX_STOP_CHARS:
                raise RequestError(
                    f"stop[{i}]", text, f"1..{MAX_STOP_CHARS} characters", code="out_of_range", flag="--max-stop-chars"
                )
        _count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS, flag="--max-stop-token-ids")
        if self.logit_bias:
            _count("logit_bias", self.logit_bias, MAX_LOGIT_BIAS, flag="--max-logit-bias")
            for token, bias in self.logit_bias.items():
                _number(f"logit_bias.{token}", bias, -100.0, 100.0)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids", [], "at least one token id", code="out_of_range")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError for a token id that the model does not have."""
        fields: dict[str, Any] = {
            "logit_bias": self.logit_bias or {},
            "allowed_token_ids": self.allowed_token_ids or [],
            "stop_token_ids": self.stop_token_ids,
        }
        for name, ids in fields.items():
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(f"{name}", token, f"token ids 0..{vocab_size - 1}", code="out_of_range")
        if self.top_k > vocab_size:
            raise RequestError("top_k", self.top_k, f"-1 or 1..{vocab_size}", code="out_of_range")


def _integer(name: str, value: Any, low: int, high: int, flag: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(name, value, "an integer", code="invalid_type")
    if not low <= value <= high:
        raise RequestError(name, value, f"{low}..{high}", code="out_of_range", flag=flag)


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(name, value, "a number", code="invalid_type")
    inside = (low < value if above else low <= value) and value <= high
    if not (math.isfinite(value) and inside):
        limit = f"({low:g}, {high:g}]" if above else f"{low:g}..{high:g}"
        raise RequestError(name, value, limit, code="out_of_range")


def _count(name: str, value: Any, limit: int, flag: str) -> None:
    if len(value) > limit:
        raise RequestError(name, len(value), f"at most {limit} entries", code="out_of_range", flag=flag)
