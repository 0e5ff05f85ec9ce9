"""The door: whatever a request can get wrong is found here, before the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from common_platform.errors import RequestError
from servekit.core.facts import ModelFacts
from servekit.core.prompt_embeds import PLACEHOLDER, PromptEmbeds
from servekit.sampling.parameters import SamplingParams

if TYPE_CHECKING:  # the engine's process, which needs EngineRequest, starts sooner without
    from servekit.engine.tokenizer import Tokenizer

MAX_CHARS_PER_TOKEN = 64  # a prompt longer than this times the context cannot fit: refused without tokenizing
MAX_ID_CHARS = 128
MAX_SALT_CHARS = 256
MAX_TIMEOUT_S = 24 * 3600.0


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request that the engine can serve. Made by ``validate``; nothing about it needs a second look."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    timeout_s: float | None = None  # from its arrival at the engine
    pooling: str = ""  # last | mean | all: what to return of the prompt's hidden states, without an answer
    final_only: bool = False  # nothing is told before the end
    embeds: PromptEmbeds | None = None  # in place of the prompt's tokens, whose ids are placeholders then

    @property
    def num_sequences(self) -> int:
        return self.sampling.best_of or self.sampling.n

    def told_at_the_end(self) -> EngineRequest:
        """The request as one of which nothing is told before its end, where nothing has to be: that costs less."""
        params = self.sampling
        needs_news = params.stop or params.logprobs is not None or self.num_sequences > params.n
        return self if needs_news else msgspec.structs.replace(self, final_only=True)

    def child_id(self, index: int) -> str:
        return f"{self.request_id}#{index}"


def validate(
    request_id: str,
    prompt: str | Sequence[int] | PromptEmbeds,
    params: SamplingParams,
    facts: ModelFacts,
    tokenizer: Tokenizer,
    *,
    add_special_tokens: bool = True,
    priority: int = 0,
    tenant: str = "",
    cache_salt: str = "",
    timeout_s: float | None = None,
    param: str = "prompt",
    pooling: str = "",
) -> EngineRequest:
    """Decide whether the engine can serve this, and tokenize it.

    Args:
        param: the name that the caller knows the prompt by, for errors.

    Raises:
        RequestError: the first thing that is wrong.
    """
    if len(request_id) > MAX_ID_CHARS:
        raise RequestError("request_id", len(request_id), f"1..{MAX_ID_CHARS} characters", code="out_of_range")
    if len(cache_salt) > MAX_SALT_CHARS:
        raise RequestError("cache_salt", len(cache_salt), f"at most {MAX_SALT_CHARS} characters", code="out_of_range")
    if timeout_s is not None and not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise RequestError("timeout", timeout_s, f"seconds in (0, {MAX_TIMEOUT_S:g}]", code="out_of_range")
    params.check_vocabulary(facts.vocab_size)
    embeds = prompt if isinstance(prompt, PromptEmbeds) else None
    if isinstance(prompt, PromptEmbeds):
        _check_embeds(prompt, params, facts, param)
        token_ids = [PLACEHOLDER] * prompt.num_tokens
    else:
        token_ids = _tokens(prompt, facts, tokenizer, add_special_tokens, param)
    _check_length(len(token_ids), params, facts, param)
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=token_ids,
        sampling=_with_bad_words(params, facts, tokenizer),
        priority=priority,
        tenant=tenant,
        cache_salt=cache_salt,
        timeout_s=timeout_s,
        pooling=pooling,
        embeds=embeds,
    )


def _check_embeds(embeds: PromptEmbeds, params: SamplingParams, facts: ModelFacts, param: str) -> None:
    if not facts.embed_size:
        raise RequestError(param, "embeddings", "tokens: this model takes nothing else", code="unsupported")
    if embeds.hidden_size != facts.embed_size:
        got = f"[{embeds.num_tokens},{embeds.hidden_size}]"
        raise RequestError(param, got, f"[*,{facts.embed_size}]", code="invalid_shape")
    if params.prompt_logprobs is not None:
        limit = "none with embeddings: they are of no tokens"
        raise RequestError("prompt_logprobs", params.prompt_logprobs, limit, code="conflict")


def _tokens(
    prompt: str | Sequence[int], facts: ModelFacts, tokenizer: Tokenizer, add_special_tokens: bool, param: str
) -> list[int]:
    limit = facts.max_model_len
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError(param, "", "at least one character", code="empty_prompt")
        if len(prompt) > limit * MAX_CHARS_PER_TOKEN:
            raise _too_long(param, f"{len(prompt)} characters", facts)
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(param, "a lone surrogate", "valid Unicode", code="invalid_unicode") from error
        token_ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        token_ids = list(prompt)
        if len(token_ids) > limit:
            raise _too_long(param, f"{len(token_ids)} tokens", facts)
        for index, token in enumerate(token_ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise RequestError(f"{param}[{index}]", token, "a token id", code="invalid_type")
            if not 0 <= token < facts.vocab_size:
                allowed = f"token ids 0..{facts.vocab_size - 1}"
                raise RequestError(f"{param}[{index}]", token, allowed, code="out_of_range")
    if not token_ids:
        raise RequestError(param, "no tokens", "at least one token", code="empty_prompt")
    return token_ids


def _too_long(param: str, what: str, facts: ModelFacts) -> RequestError:
    allowed = f"at most {facts.max_model_len} tokens, prompt and answer together"
    return RequestError(param, what, allowed, code="context_length_exceeded", flag="--max-model-len")


def _check_length(count: int, params: SamplingParams, facts: ModelFacts, param: str) -> None:
    limit, asked = facts.max_model_len, params.max_tokens
    if asked is not None and asked > limit:
        raise RequestError("max_tokens", asked, f"1..{limit}", code="out_of_range", flag="--max-model-len")
    if count + (1 if asked is None else asked) > limit:
        wanted = f"{count} tokens" if asked is None else f"{count} tokens and max_tokens={asked}"
        raise _too_long(param, wanted, facts)


def _with_bad_words(params: SamplingParams, facts: ModelFacts, tokenizer: Tokenizer) -> SamplingParams:
    """``bad_words`` as token ids: each word as it stands at the beginning of a text and after a space."""
    if not params.bad_words:
        return params
    banned: list[list[int]] = []
    for index, word in enumerate(params.bad_words):
        if not word.strip():
            raise RequestError(f"bad_words[{index}]", word, "a word", code="out_of_range")
        for text in (word, " " + word.lstrip()):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in banned and max(ids) < facts.vocab_size:
                banned.append(ids)
    return msgspec.structs.replace(params, bad_words_token_ids=banned)
