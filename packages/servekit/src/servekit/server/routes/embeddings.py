"""``POST /v1/embeddings``, ``/v1/rerank`` and ``/score``."""

from __future__ import annotations

import array
import base64
import sys
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from servekit.server.body import read_json
from servekit.server.caller import Caller, caller_of
from servekit.server.embeddings import (
    EmbeddingRequest,
    Vectors,
    read_embedding,
    read_rerank,
    read_score,
    scores,
    vectors_of,
)
from servekit.server.errors import json_response
from servekit.server.gate import work
from servekit.server.state import ServerState, state_for_work
from servekit.server.streaming import while_connected

router = APIRouter()


@router.post("/v1/embeddings")
@work
async def embeddings(request: Request) -> Response:
    state, caller = state_for_work(request), caller_of(request)
    asked = read_embedding(state.door, state.embedding_model, await read_json(request, state.config.limits))
    made = await while_connected(request.receive, _vectors(state, asked, caller))
    shown = [_base64(vector) if asked.is_base64 else vector for vector in made.values]
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown)]
    about = {"id": f"embd-{caller.request_id[4:]}", "object": "list", "created": int(time.time())}
    return json_response(about | {"model": asked.model, "data": data, "usage": _usage(made)})


@router.post("/v1/rerank")
@router.post("/rerank")
@work
async def rerank(request: Request) -> Response:
    """The documents, most like the query first."""
    state, caller = state_for_work(request), caller_of(request)
    asked = read_rerank(state.door, state.embedding_model, await read_json(request, state.config.limits))
    made = await while_connected(request.receive, _vectors(state, asked, caller))
    ranked = sorted(enumerate(scores(made.values, 1)), key=lambda pair: -pair[1])[: asked.top_n or None]
    results: list[dict[str, Any]] = []
    for index, score in ranked:
        document = {"document": {"text": asked.prompts[index + 1]}} if asked.return_documents else {}
        results.append({"index": index} | document | {"relevance_score": score})
    answer = {"id": f"rerank-{caller.request_id[4:]}", "model": asked.model, "results": results}
    return json_response(answer | {"usage": _usage(made)})


@router.post("/v1/score")
@router.post("/score")
@work
async def score(request: Request) -> Response:
    """How alike texts are, -1..1, pair by pair."""
    state, caller = state_for_work(request), caller_of(request)
    asked = read_score(state.door, state.embedding_model, await read_json(request, state.config.limits))
    made = await while_connected(request.receive, _vectors(state, asked, caller))
    found = scores(made.values, asked.num_queries)
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(found)]
    about = {"id": f"score-{caller.request_id[4:]}", "object": "list", "created": int(time.time())}
    return json_response(about | {"model": asked.model, "data": data, "usage": _usage(made)})


async def _vectors(state: ServerState, asked: EmbeddingRequest, caller: Caller) -> Vectors:
    at_once = state.engine.config.max_num_seqs
    return await vectors_of(asked, state.embedding_model, caller, generation=state.generation, at_once=at_once)


def _usage(made: Vectors) -> dict[str, int]:
    return {"prompt_tokens": made.num_tokens, "total_tokens": made.num_tokens}


def _base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's clients read it."""
    packed = array.array("f", vector)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")
