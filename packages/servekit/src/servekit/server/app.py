"""The app: routes inside, keys around them, an envelope around all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from servekit.engine.async_engine import AsyncEngine
from servekit.server import errors
from servekit.server.auth import Auth
from servekit.server.config import ServerConfig
from servekit.server.cors import Cors
from servekit.server.gate import Gate
from servekit.server.keys import KeyRing
from servekit.server.middleware import Envelope
from servekit.server.routes import (
    admin,
    chat,
    completions,
    description,
    embeddings,
    health,
    messages,
    metrics,
    models,
    page,
    responses,
    tokens,
)
from servekit.server.state import ServerState, make_state

ROUTES = (health, metrics, models, completions, chat, responses, messages, embeddings, tokens, description)
ADMIN_ROUTES = (admin, health, metrics)


def build_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """An ASGI app that serves ``engine``, which is ready, until somebody else shuts it down.

    There are no pages of documentation. ``app.state.server`` holds what the routes share.
    """
    app = _app_of(ROUTES, make_state(engine, config))
    app.router.routes.extend(page.make_router(is_public=config.public_page).routes)
    return app


def build_admin_app(app: FastAPI) -> FastAPI:
    """The app of the management listener, beside ``app``, whose state it shares."""
    return _app_of(ADMIN_ROUTES, app.state.server)


def _app_of(modules: Iterable[Any], state: ServerState) -> FastAPI:
    app = FastAPI(title="servekit", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.server = state
    for module in modules:
        app.router.routes.extend(module.router.routes)  # flat: the door looks at the route that answers
    errors.install(app)
    return app


def guarded(app: FastAPI, config: ServerConfig) -> ASGIApp:
    """What listens to the network: ``app`` behind its keys."""
    state: ServerState = app.state.server
    gate = Gate(app, app.router.routes, state)
    return Envelope(Cors(Auth(gate, app.router, state.keys), config.allowed_origins), state.metrics.answered)


def guarded_admin(app: FastAPI, config: ServerConfig) -> ASGIApp:
    """The management app behind its own key; callers' keys are known here, and have no rights."""
    state: ServerState = app.state.server
    return Envelope(Auth(app, app.router, KeyRing(config.admin_keys), state.keys), state.metrics.answered)
