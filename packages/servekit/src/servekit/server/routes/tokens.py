"""``POST /tokenize`` and ``/detokenize``, as vLLM's clients know them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from common_platform.errors import RequestError
from servekit.server import fields as f
from servekit.server.body import read_json
from servekit.server.errors import json_response
from servekit.server.protocol import check_body
from servekit.server.state import ServerState, state_of
from servekit.server.templates import ChatPrompt

router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a chat as the model would see it."""
    state = state_of(request)
    body = await read_json(request, state.config.limits)
    if "messages" in body:
        checked = await state.sight.of(partial(check_body, state.door, body, _chat_checks(state), "messages"))
        text = await state.render(
            ChatPrompt(
                messages=checked["messages"],
                tools=checked.get("tools") if state.chat_model.shows_tools else None,
                add_generation_prompt=checked.get("add_generation_prompt", True),
                variables=checked.get("chat_template_kwargs", {}),
                source=checked.get("chat_template"),
            ),
            request.receive,
        )
    else:
        checked = check_body(state.door, body, tokenize_fields(state), "prompt")
        text = checked["prompt"]
    add_special_tokens = checked.get("add_special_tokens", "prompt" in checked)
    tokenizer = state.engine.tokenizer
    ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": state.engine.facts.max_model_len})


@router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    state = state_of(request)
    body = await read_json(request, state.config.limits)
    checked = check_body(state.door, body, detokenize_fields(state), "tokens")
    return json_response({"prompt": state.engine.tokenizer.decode(checked["tokens"], skip_special_tokens=False)})


def detokenize_fields(state: ServerState) -> dict[str, f.Check]:
    facts = state.engine.facts
    tokens = f.token_ids(facts.vocab_size, facts.max_model_len, flag="--max-model-len")
    return {"model": state.door.model, "tokens": tokens}


def tokenize_fields(state: ServerState) -> Mapping[str, f.Check]:
    most = state.config.limits.max_tokenize_chars

    @f.described({"type": "string", "maxLength": most})
    def prompt(value: Any, path: str) -> str:
        text: str = f.text(2**31)(value, path)
        if len(text) > most:
            got, allowed = f"{len(text)} characters", f"0..{most} characters"
            raise RequestError(path, got, allowed, code="context_length_exceeded", flag="--max-tokenize-chars")
        return text

    return {"model": state.door.model, "prompt": prompt, "add_special_tokens": f.boolean}


def _chat_checks(state: ServerState) -> Mapping[str, f.Check]:
    names = (
        "model",
        "messages",
        "tools",
        "add_generation_prompt",
        "add_special_tokens",
        "chat_template",
        "chat_template_kwargs",
    )
    return {name: state.chat_checks[name] for name in names}
