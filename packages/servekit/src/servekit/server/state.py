"""What the routes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import Request
from starlette.types import Receive

from common_platform.errors import Overloaded, RequestError
from servekit.engine.async_engine import AsyncEngine
from servekit.engine.validate import MAX_CHARS_PER_TOKEN
from servekit.server import fields as f
from servekit.server.admission import Admission
from servekit.server.anthropic import anthropic_fields
from servekit.server.budgets import Budgets
from servekit.server.chat import ChatRequest, chat_fields
from servekit.server.completions import completion_fields
from servekit.server.config import ServerConfig
from servekit.server.embedding_model import EmbeddingModel, embedding_model
from servekit.server.generation import Generation
from servekit.server.health import Heartbeat
from servekit.server.images import Sight
from servekit.server.infill import Infill, infill_of
from servekit.server.keys import KeyRing
from servekit.server.metrics import Metrics
from servekit.server.protocol import Door
from servekit.server.response_store import ResponseStore
from servekit.server.responses import response_fields
from servekit.server.streaming import while_connected
from servekit.server.structured import renamed
from servekit.server.template import ChatModel, chat_model
from servekit.server.templates import ChatPrompt, TemplateLimits, Templates
from servekit.server.turn import Turn


@dataclass(slots=True)
class ServerState:
    """Made once for an app; reached by ``state_of(request)``."""

    engine: AsyncEngine
    config: ServerConfig
    admission: Admission
    heartbeat: Heartbeat
    door: Door
    metrics: Metrics
    keys: KeyRing
    budgets: Budgets
    chat_model: ChatModel
    templates: Templates
    embedding_model: EmbeddingModel
    infill: Infill | None
    sight: Sight
    completion_checks: dict[str, f.Check] = field(init=False)
    chat_checks: dict[str, f.Check] = field(init=False)
    response_checks: dict[str, f.Check] = field(init=False)
    anthropic_checks: dict[str, f.Check] = field(init=False)
    count_checks: dict[str, f.Check] = field(init=False)
    responses: ResponseStore = field(init=False)
    begin_drain: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.completion_checks = completion_fields(self.door, can_infill=self.infill is not None)
        self.chat_checks = chat_fields(self.door, self.chat_model)
        self.response_checks = response_fields(self.door)
        self.anthropic_checks = anthropic_fields(self.door)
        self.count_checks = anthropic_fields(self.door, counts=True)
        limits = self.config.limits
        self.responses = ResponseStore(limits.max_stored_responses, limits.response_store_bytes)

    def check_room(self) -> None:
        """Raise Overloaded, and count it, where no work is taken."""
        try:
            self.admission.check_room()
        except Overloaded as error:
            self.metrics.refused[error.code] += 1
            raise

    def generation(self) -> Generation:
        return Generation(self.engine, self.admission, self.metrics, self.budgets)

    async def turn(self, asked: ChatRequest, receive: Receive) -> Turn:
        """The turn that answers ``asked``, whose prompt is rendered here."""
        try:
            prompt = await self.render(asked.prompt, receive)
        except RequestError as error:
            raise renamed(error, {"messages": (asked.param_names or {}).get("prompt", "messages")}) from error
        return Turn(self.generation(), self.engine.tokenizer, asked, prompt)

    async def render(self, prompt: ChatPrompt, receive: Receive) -> str:
        """The text of a chat; one that could never fit is not rendered.

        Raises:
            RequestError: too long, or refused by the template.
            ClientGone: the caller left before its own template had ended.
        """
        most = self.engine.facts.max_model_len
        num_chars = sum(len(message.get("content") or "") for message in prompt.messages)
        if num_chars > most * MAX_CHARS_PER_TOKEN:
            allowed, got = f"at most {most} tokens, prompt and answer together", f"{num_chars} characters"
            raise RequestError("messages", got, allowed, code="context_length_exceeded", flag="--max-model-len")
        rendering = self.templates.render(prompt)
        return await (rendering if prompt.source is None else while_connected(receive, rendering))


def make_state(engine: AsyncEngine, config: ServerConfig) -> ServerState:
    admission = Admission(engine, config.limits)
    heartbeat = Heartbeat(engine, step_stall_s=config.limits.step_stall_s)
    metrics = Metrics(config.served_model_names[0])
    embeds = embedding_model(engine.config.model, config.pooling)
    model = chat_model(
        engine.config.model,
        tool_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
        template_file=config.chat_template,
        special_ids=engine.tokenizer.special_ids,
    )
    return ServerState(
        engine=engine,
        config=config,
        admission=admission,
        heartbeat=heartbeat,
        door=Door(engine.facts, config),
        metrics=metrics,
        keys=KeyRing(config.api_keys, config.api_key_file),
        budgets=Budgets(config.budget),
        chat_model=model,
        templates=Templates(model, TemplateLimits(timeout_s=config.limits.template_timeout_s)),
        embedding_model=embeds,
        infill=infill_of(engine.tokenizer),
        sight=Sight(config.media, config.limits.media_inflight_bytes),
    )


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


def state_for_work(request: Request) -> ServerState:
    """The state, where there is room for the work of ``request``.

    Raises:
        Overloaded: there is none.
    """
    state = state_of(request)
    state.check_room()
    return state
