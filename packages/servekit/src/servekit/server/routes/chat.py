"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from common_platform.errors import RequestError
from servekit.engine.async_engine import RequestStream
from servekit.engine.output import CompletionOutput, RequestOutput
from servekit.sampling.parameters import SamplingParams
from servekit.server import formats, messages, protocol
from servekit.server.errors import json_response
from servekit.server.protocol import ChatRequest
from servekit.server.state import ServerState, collect, merged, new_id
from servekit.server.streaming import sse


async def create(state: ServerState, http: Request) -> Response:
    body = protocol.convert(await state.read_body(http), ChatRequest, ignore_unknown=state.ignore_unknown_fields)
    state.check_model(body.model)
    params = _params(body, state)
    prompt = messages.render(body, state.engine.tokenizer, state.limits)
    request_id = new_id("chatcmpl")
    streams = await state.submit(
        request_id,
        [("messages", prompt)],
        params,
        cache_salt=body.cache_salt or "",
        tenant=body.user or "",
        timeout_s=body.timeout,
        add_special_tokens=bool(body.add_special_tokens),
    )
    answer = _Answer(state, body, request_id)
    if body.stream:
        return sse(state, request_id, answer.chunks(streams, params.n), streams)
    outputs = await collect(http, streams)
    return Response(status_code=499) if outputs is None else json_response(200, answer.whole(outputs[0]))


def _params(body: ChatRequest, state: ServerState) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs", body.top_logprobs, "logprobs = true beside it", code="conflict")
    protocol.check_logprobs("top_logprobs", body.top_logprobs)
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise RequestError("max_tokens", body.max_tokens, "only one of max_tokens and max_completion_tokens",
                           code="conflict")  # fmt: skip
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    if asked is not None and not 1 <= asked <= state.engine.facts.max_model_len:
        limit = f"1..{state.engine.facts.max_model_len}"
        raise RequestError(name, asked, limit, code="out_of_range", flag="--max-model-len")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return protocol.sampling_params(
        body, state.limits, state.engine.facts.max_model_len, max_tokens=asked, logprobs=logprobs
    )


class _Answer:
    """The answer to one chat, whole or in pieces."""

    def __init__(self, state: ServerState, body: ChatRequest, request_id: str) -> None:
        self.body = body
        self.tokenizer = state.engine.tokenizer
        self.head = {
            "id": request_id,
            "created": int(time.time()),
            "model": state.model_name,
            "system_fingerprint": None,
        }

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = []
        for answer in output.outputs:
            formats.check_answer(answer)
            choices.append(
                {
                    "index": answer.index,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": self._logprobs(answer.logprobs),
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                }
            )
        tokens = sum(len(answer.token_ids) for answer in output.outputs)
        head = self.head | {"object": "chat.completion"}
        return head | {"choices": choices, "usage": formats.usage([output], tokens)}

    def _logprobs(self, entries: Sequence[Any] | None) -> dict[str, Any] | None:
        return formats.chat_logprobs(entries or [], self.tokenizer) if self.body.logprobs else None

    async def chunks(self, streams: Sequence[RequestStream], n: int) -> AsyncIterator[dict[str, Any]]:
        head = self.head | {"object": "chat.completion.chunk"}
        for index in range(n):
            delta = {"role": "assistant", "content": "", "refusal": None}
            yield head | {"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}
        tokens, last = 0, None
        async for _, output in merged(streams):
            last = output
            for answer in output.outputs:
                formats.check_answer(answer)
                tokens += len(answer.delta_token_ids)
                choice = self._choice(answer)
                if choice:
                    yield head | {"choices": [choice]}
        if last and self.body.stream_options and self.body.stream_options.include_usage:
            yield head | {"choices": [], "usage": formats.usage([last], tokens)}

    def _choice(self, answer: CompletionOutput) -> dict[str, Any] | None:
        if not answer.delta_text and not answer.finish_reason and not answer.delta_logprobs:
            return None
        return {
            "index": answer.index,
            "delta": {"content": answer.delta_text} if answer.delta_text else {},
            "logprobs": self._logprobs(answer.delta_logprobs) if answer.delta_logprobs else None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
