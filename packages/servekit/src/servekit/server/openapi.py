"""The routes as OpenAPI 3.1 describes them, made of the very checks that requests pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servekit import __version__
from servekit.server import embeddings
from servekit.server import fields as f
from servekit.server.routes import tokens
from servekit.server.state import ServerState

Json = dict[str, Any]
ERROR: Json = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "maxLength": 400},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
        }
    },
    "required": ["error"],
}
REFUSALS = {
    "400": "What was asked cannot be.",
    "401": "No key, or a wrong one.",
    "404": "No such model, or response.",
    "405": "The route does not know this method.",
    "408": "The body did not arrive in time, or the answer did not.",
    "413": "The body is too large.",
    "415": "The body is no JSON.",
    "429": "The caller is over its share.",
    "500": "A fault of the server.",
    "503": "No room now, or no engine.",
}


def document(state: ServerState) -> Json:
    """What ``GET /openapi.json`` answers."""
    paths: dict[str, Json] = {path: {"get": _operation(path, text)} for path, text in GETS.items()}
    for path, (text, fields, required) in _posts(state).items():
        model = {"model": f.described({"enum": list(state.config.served_model_names)})(f.any_value)}
        schema = f.object_schema({**fields, **model}, "model", *required)
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": _operation(path, text) | {"requestBody": body}}
    paths["/ping"]["post"] = _operation("/ping", "The same.") | {"operationId": "ping_post"}
    paths["/v1/models/{name}"] = {"get": _operation("/v1/models/{name}", "One model.") | _in_path("name")}
    about = "/v1/responses/{response_id}"
    paths[about] = {
        "get": _operation(about, "A stored response.") | _in_path("response_id"),
        "delete": _operation(f"{about}/delete", "Forget it.") | _in_path("response_id"),
    }
    paths[f"{about}/cancel"] = {"post": _operation(f"{about}/cancel", "End it.") | _in_path("response_id")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "servekit", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}] if state.keys else [],
    }


def _in_path(name: str) -> Json:
    return {
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    }


GETS = {
    "/health": "Whether the server works; public.",
    "/health/ready": "Whether it takes requests.",
    "/ping": "The same, for SageMaker.",
    "/version": "Its version.",
    "/v1/models": "The models that it serves.",
    "/metrics": "Its figures, for Prometheus.",
    "/openapi.json": "This.",
}
Post = tuple[str, Mapping[str, f.Check], tuple[str, ...]]


def _posts(state: ServerState) -> dict[str, Post]:
    door = state.door
    posts: dict[str, Post] = {
        "/v1/completions": ("Continue prompts.", state.completion_checks, ("prompt",)),
        "/v1/chat/completions": ("Answer a chat.", state.chat_checks, ("messages",)),
        "/v1/responses": ("Answer, in OpenAI's newer form.", state.response_checks, ("input",)),
        "/v1/messages": ("Answer, in Anthropic's form.", state.anthropic_checks, ("messages", "max_tokens")),
        "/v1/messages/count_tokens": ("Count its tokens.", state.count_checks, ("messages",)),
        "/tokenize": ("Token ids of a text.", tokens.tokenize_fields(state), ("prompt",)),
        "/detokenize": ("The text of token ids.", tokens.detokenize_fields(state), ("tokens",)),
    }
    if state.embedding_model.pooling:
        served = embeddings.embedding_fields(door, state.embedding_model)
        posts["/v1/embeddings"] = ("Vectors of texts.", served, ("input",))
        for path in ("/v1/rerank", "/rerank"):
            posts[path] = ("Sort documents.", embeddings.rerank_fields(door), ("query", "documents"))
        for path in ("/v1/score", "/score"):
            posts[path] = ("Compare texts.", embeddings.score_fields(door), ("text_1", "text_2"))
    return posts


def _operation(path: str, summary: str) -> Json:
    kind = "text/plain" if path == "/metrics" else "application/json"
    answers: Json = {"200": {"description": "The answer."}}
    if path != "/ping":  # which has no body
        answers["200"]["content"] = {kind: {}}
    if path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
        answers["200"]["content"]["text/event-stream"] = {}
    for status, text in REFUSALS.items():
        schema = {"$ref": "#/components/schemas/Error"}
        answers[status] = {"description": text, "content": {"application/json": {"schema": schema}}}
    return {"summary": summary, "operationId": path.strip("/").replace("/", "_"), "responses": answers}
