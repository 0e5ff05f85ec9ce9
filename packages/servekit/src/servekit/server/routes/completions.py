"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from common_platform.errors import RequestError
from servekit.core.plan import TokenLogprob
from servekit.engine.async_engine import RequestStream
from servekit.engine.output import CompletionOutput, RequestOutput
from servekit.sampling.parameters import SamplingParams
from servekit.server import formats, protocol
from servekit.server.errors import json_response
from servekit.server.protocol import CompletionRequest
from servekit.server.state import ServerState, collect, merged, new_id
from servekit.server.streaming import sse


async def create(state: ServerState, http: Request) -> Response:
    body = protocol.convert(await state.read_body(http), CompletionRequest, ignore_unknown=state.ignore_unknown_fields)
    state.check_model(body.model)
    prompts = protocol.prompts_of(body, state.limits)
    params = _params(body, state, len(prompts))
    request_id = new_id("cmpl")
    streams = await state.submit(
        request_id,
        prompts,
        params,
        cache_salt=body.cache_salt or "",
        tenant=body.user or "",
        timeout_s=body.timeout,
        add_special_tokens=body.add_special_tokens is not False,
    )
    answer = _Answer(state, body, params, request_id)
    if body.stream:
        return sse(state, request_id, answer.chunks(streams), streams)
    outputs = await collect(http, streams)
    return Response(status_code=499) if outputs is None else json_response(200, answer.whole(outputs))


def _params(body: CompletionRequest, state: ServerState, num_prompts: int) -> SamplingParams:
    if body.suffix is not None:
        raise RequestError("suffix", body.suffix, "a model with infill", code="unsupported")
    if body.prompt_embeds is not None:
        raise RequestError("prompt_embeds", "embeddings", "text or token ids", code="prompt_embeds_disabled",
                           flag="--enable-prompt-embeds")  # fmt: skip
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens", 0, "1 or more unless echo is true", code="out_of_range")
    if body.max_tokens is not None and not 0 <= body.max_tokens <= state.engine.facts.max_model_len:
        limit = f"1..{state.engine.facts.max_model_len}"
        raise RequestError("max_tokens", body.max_tokens, limit, code="out_of_range", flag="--max-model-len")
    if body.stream and body.best_of is not None and body.best_of > (body.n or 1):
        raise RequestError("best_of", body.best_of, "n where stream is true", code="conflict")
    if body.best_of is not None and body.n is not None and 1 <= body.best_of < body.n:
        raise RequestError("best_of", body.best_of, f"n = {body.n} or more", code="conflict")
    protocol.check_logprobs("logprobs", body.logprobs)
    max_tokens = protocol.DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    more: dict[str, Any] = {"best_of": body.best_of, "logprobs": body.logprobs}
    if body.echo and body.logprobs is not None:
        more["prompt_logprobs"] = body.logprobs
    return protocol.sampling_params(
        body,
        state.limits,
        state.engine.facts.max_model_len,
        max_tokens=max_tokens,
        num_prompts=num_prompts,
        **more,
    )


class _Answer:
    """The answer to one request, whole or in pieces."""

    def __init__(self, state: ServerState, body: CompletionRequest, params: SamplingParams, request_id: str) -> None:
        self.body = body
        self.params = params
        self.tokenizer = state.engine.tokenizer
        self.head = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.model_name,
            "system_fingerprint": None,
        }

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = []
        for index, output in enumerate(outputs):
            for answer in output.outputs:
                formats.check_answer(answer)
                choices.append(self._choice(index, output, answer))
        tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        return self.head | {"choices": choices, "usage": formats.usage(outputs, tokens)}

    def _choice(self, index: int, output: RequestOutput, answer: CompletionOutput) -> dict[str, Any]:
        prompt = self._prompt_text(output)
        choice = {
            "index": index * self.params.n + answer.index,
            "text": prompt + answer.text,
            "logprobs": self._logprobs(output, answer.logprobs or [], len(prompt)),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = _prompt_logprobs(output, self.tokenizer)
        return choice

    def _prompt_text(self, output: RequestOutput) -> str:
        if not self.body.echo:
            return ""
        return output.prompt if output.prompt is not None else self.tokenizer.decode(output.prompt_token_ids)

    def _logprobs(
        self, output: RequestOutput, entries: Sequence[TokenLogprob], offset: int, *, with_prompt: bool = True
    ) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        if not (self.body.echo and with_prompt):
            return formats.completion_logprobs(entries, "", self.tokenizer, offset)
        first = self.tokenizer.token_text(output.prompt_token_ids[0])
        return formats.completion_logprobs([None, *(output.prompt_logprobs or []), *entries], first, self.tokenizer, 0)

    async def chunks(self, streams: Sequence[RequestStream]) -> AsyncIterator[dict[str, Any]]:
        last: dict[int, RequestOutput] = {}
        offsets: dict[tuple[int, int], int] = {}
        tokens = 0
        async for index, output in merged(streams):
            last[index] = output
            for answer in output.outputs:
                formats.check_answer(answer)
                tokens += len(answer.delta_token_ids)
                chunk = self._chunk(index, output, answer, offsets)
                if chunk:
                    yield chunk
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield self.head | {"choices": [], "usage": formats.usage(list(last.values()), tokens)}

    def _chunk(
        self, index: int, output: RequestOutput, answer: CompletionOutput, offsets: dict[tuple[int, int], int]
    ) -> dict[str, Any] | None:
        key = (index, answer.index)
        first = key not in offsets
        text = (self._prompt_text(output) if first else "") + answer.delta_text
        if not text and not answer.finish_reason and not answer.delta_logprobs:
            return None
        logprobs = self._logprobs(output, answer.delta_logprobs, offsets.get(key, 0), with_prompt=first)
        offsets[key] = offsets.get(key, 0) + len(text)
        choice = {
            "index": index * self.params.n + answer.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        return self.head | {"choices": [choice]}


def _prompt_logprobs(output: RequestOutput, tokenizer: Any) -> list[dict[str, Any] | None]:
    """vLLM's form: one dictionary a prompt token, by token id."""
    found: list[dict[str, Any] | None] = [None]
    for entry in output.prompt_logprobs or []:
        pairs = [(entry.token_id, entry.logprob, entry.rank)]
        pairs += [(token, logprob, rank + 1) for rank, (token, logprob) in enumerate(entry.top)]
        found.append(
            {
                str(token): {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.token_text(token)}
                for token, logprob, rank in pairs
            }
        )
    return found
