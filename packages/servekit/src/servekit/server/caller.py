"""Who asks: what every layer below the routes needs to know of an HTTP request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request


@dataclass(frozen=True, slots=True)
class Caller:
    """``tenant`` is the key as a name, empty where no keys are set; ``log`` goes into the line of the access log."""

    request_id: str
    tenant: str
    log: dict[str, Any]


def caller_of(request: Request) -> Caller:
    state = request.scope["state"]
    return Caller(str(state["request_id"]), str(state.get("tenant", "")), state.setdefault("log", {}))
