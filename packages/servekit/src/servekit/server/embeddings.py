"""``/v1/embeddings``, ``/v1/rerank`` and ``/score``: their fields, and the vectors behind all three."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from common_platform.errors import PlatformError, RequestError
from servekit.sampling.parameters import SamplingParams
from servekit.server import fields as f
from servekit.server.caller import Caller
from servekit.server.completions import prompts_of
from servekit.server.embedding_model import EmbeddingModel
from servekit.server.generation import Generation, Job
from servekit.server.protocol import Door, GenerationRequest, Prompt, check_body

NO_ANSWER = SamplingParams(max_tokens=0, temperature=0.0)
FLAG = "--max-embedding-inputs"
ANY_LENGTH = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    model: str
    prompts: list[Prompt]
    names: list[str]  # of the prompts, for errors
    priority: int = 0
    cache_salt: str = ""
    dimensions: int | None = None
    is_base64: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest(EmbeddingRequest):
    """``prompts``: first the ``num_queries`` queries, then the texts held against them."""

    num_queries: int = 1
    top_n: int | None = None
    return_documents: bool = True


def read_embedding(door: Door, served: EmbeddingModel, body: dict[str, Any]) -> EmbeddingRequest:
    """Raises RequestError for the first fault, or where the model is not served for embeddings."""
    _refuse_if_not_served(door, served, body)
    checked = check_body(door, body, embedding_fields(door, served), "input")
    prompts, is_batch = checked["input"]
    return EmbeddingRequest(
        **_taken(checked),
        prompts=prompts,
        names=_names("input", len(prompts)) if is_batch else ["input"],
        dimensions=checked.get("dimensions"),
        is_base64=checked.get("encoding_format") == "base64",
    )


def embedding_fields(door: Door, served: EmbeddingModel) -> dict[str, f.Check]:
    return _common(door) | {
        "input": prompts_of(door, door.config.limits.max_embedding_inputs, FLAG, "inputs"),
        "encoding_format": f.one_of("float", "base64"),
        "dimensions": f.integer(1, served.size, allowed=f"1..{served.size}, the model's hidden size"),
    }


def read_rerank(door: Door, served: EmbeddingModel, body: dict[str, Any]) -> ScoreRequest:
    _refuse_if_not_served(door, served, body)
    checked = check_body(door, body, rerank_fields(door), "query", "documents")
    documents = checked["documents"]
    return ScoreRequest(
        **_taken(checked),
        prompts=[checked["query"], *documents],
        names=["query", *_names("documents", len(documents))],
        top_n=checked.get("top_n"),
        return_documents=checked.get("return_documents", True),
    )


def rerank_fields(door: Door) -> dict[str, f.Check]:
    most = door.config.limits.max_embedding_inputs
    return _common(door) | {
        "query": _text,
        "documents": f.listed(_document, most, least=1, flag=FLAG),
        "top_n": f.integer(0, most, FLAG),
        "return_documents": f.boolean,
    }


def read_score(door: Door, served: EmbeddingModel, body: dict[str, Any]) -> ScoreRequest:
    _refuse_if_not_served(door, served, body)
    checked = check_body(door, body, score_fields(door), "text_1", "text_2")
    first, second = checked["text_1"], checked["text_2"]
    if len(first) not in (1, len(second)):
        raise RequestError("text_1", f"{len(first)} texts", f"1, or {len(second)} as text_2", code="conflict")
    return ScoreRequest(
        **_taken(checked),
        prompts=[*first, *second],
        names=[*_names("text_1", len(first)), *_names("text_2", len(second))],
        num_queries=len(first),
    )


def score_fields(door: Door) -> dict[str, f.Check]:
    return _common(door) | {"text_1": _texts(door), "text_2": _texts(door)}


def _common(door: Door) -> dict[str, f.Check]:
    return {"model": door.model, "user": f.text(256), "cache_salt": f.text(256, min_chars=1)} | {
        "priority": door.priority
    }


def _taken(checked: dict[str, Any]) -> dict[str, Any]:
    return {name: checked[name] for name in ("model", "priority", "cache_salt") if name in checked}


def _refuse_if_not_served(door: Door, served: EmbeddingModel, body: dict[str, Any]) -> None:
    if not served.pooling:
        model = door.model(body.get("model"), "model") if "model" in body else "the model"
        allowed = "text only: this server gives no embeddings"
        raise f.unsupported("model", model, allowed, flag="--pooling last or mean")


def _names(name: str, count: int) -> list[str]:
    return [f"{name}[{index}]" for index in range(count)]


@f.described({"type": "string", "minLength": 1})
def _text(value: Any, path: str) -> str:
    text: str = f.text(ANY_LENGTH)(value, path)
    if not text:
        raise RequestError(path, "an empty string", "at least one character", code="empty_prompt")
    return text


@f.described({"type": "string", "minLength": 1})
def _document(value: Any, path: str) -> str:
    if isinstance(value, dict):
        return f.check_object(value, path, {"text": _text}, required=("text",))["text"]
    return _text(value, path)


def _texts(door: Door) -> f.Check:
    many = f.listed(_text, door.config.limits.max_embedding_inputs, least=1, flag=FLAG)
    either = f.described({"anyOf": [f.schema_of(_text), f.schema_of(many)]})
    return either(lambda value, path: [_text(value, path)] if isinstance(value, str) else many(value, path))


@dataclass(slots=True)
class Vectors:
    """What came of the prompts, in their order."""

    values: list[list[float]] = field(default_factory=list)
    num_tokens: int = 0


async def vectors_of(
    asked: EmbeddingRequest,
    served: EmbeddingModel,
    caller: Caller,
    *,
    generation: Callable[[], Generation],
    at_once: int,
) -> Vectors:
    """The vector of each prompt, of length 1.

    Args:
        at_once: how many prompts may be in the engine, so that one caller does not fill the queue.

    Raises:
        RequestError: a prompt does not fit; Overloaded, EngineDead: nothing can be computed now.
    """
    made = Vectors()
    request = GenerationRequest(
        model=asked.model,
        params=NO_ANSWER,
        priority=asked.priority,
        cache_salt=asked.cache_salt,
        pooling=served.pooling,
    )
    for start in range(0, len(asked.prompts), at_once):
        part = slice(start, start + at_once)
        job = Job(request, asked.prompts[part], asked.names[part], True)
        await _compute(job, generation(), caller, made)
    if asked.dimensions is not None:
        made.values = [vector[: asked.dimensions] for vector in made.values]
    made.values = [_normal(vector) for vector in made.values]
    return made


async def _compute(job: Job, generation: Generation, caller: Caller, made: Vectors) -> None:
    found: dict[int, list[float]] = {}
    try:
        await generation.open(job, caller)
        async for index, output in generation.outputs():
            if output.finished:
                if not output.pooled:
                    raise PlatformError(message=f"request {output.request_id}: no vector came", code="internal_error")
                found[index] = output.pooled
                made.num_tokens += len(output.prompt_token_ids)
    finally:
        await generation.close()
    made.values += [found[index] for index in sorted(found)]


def _normal(vector: Sequence[float]) -> list[float]:
    length = math.sqrt(math.fsum(x * x for x in vector)) or 1.0
    return [x / length for x in vector]


def scores(vectors: list[list[float]], num_queries: int) -> list[float]:
    """The cosine of each text's vector with its query's; one query is held against every text."""
    queries, texts = vectors[:num_queries], vectors[num_queries:]
    pairs = zip(queries * len(texts) if num_queries == 1 else queries, texts, strict=True)
    return [math.fsum(map(operator.mul, query, text)) for query, text in pairs]
