"""What the routes share."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import Request

from servekit.engine.async_engine import AsyncEngine
from servekit.server import fields as f
from servekit.server.admission import Admission
from servekit.server.chat import chat_fields
from servekit.server.completions import completion_fields
from servekit.server.config import ServerConfig
from servekit.server.embedding_model import EmbeddingModel, embedding_model
from servekit.server.generation import Generation
from servekit.server.health import Heartbeat
from servekit.server.metrics import Metrics
from servekit.server.protocol import Door
from servekit.server.template import template_variables


@dataclass(slots=True)
class ServerState:
    """Made once for an app; reached by ``state_of(request)``."""

    engine: AsyncEngine
    config: ServerConfig
    admission: Admission
    heartbeat: Heartbeat
    door: Door
    metrics: Metrics
    embedding_model: EmbeddingModel
    completion_checks: dict[str, f.Check] = field(init=False)
    chat_checks: dict[str, f.Check] = field(init=False)

    def __post_init__(self) -> None:
        self.completion_checks = completion_fields(self.door)
        self.chat_checks = chat_fields(self.door, template_variables(self.engine.config.model))

    def generation(self) -> Generation:
        return Generation(self.engine, self.admission, self.metrics)


def make_state(engine: AsyncEngine, config: ServerConfig) -> ServerState:
    admission = Admission(engine, config.limits)
    heartbeat = Heartbeat(engine, step_stall_s=config.limits.step_stall_s)
    metrics = Metrics(config.served_model_names[0])
    embeds = embedding_model(engine.config.model, config.pooling)
    return ServerState(engine, config, admission, heartbeat, Door(engine.facts, config), metrics, embeds)


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state
