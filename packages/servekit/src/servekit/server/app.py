"""The app: routes inside, keys around them, an envelope around all."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp

from servekit.engine.async_engine import AsyncEngine
from servekit.server import errors
from servekit.server.auth import Auth
from servekit.server.config import ServerConfig
from servekit.server.middleware import Envelope
from servekit.server.routes import chat, completions, embeddings, health, messages, metrics, models, responses, tokens
from servekit.server.state import make_state

ROUTES = (health, metrics, models, completions, chat, responses, messages, embeddings, tokens)


def build_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """An ASGI app that serves ``engine``, which is ready, until somebody else shuts it down.

    There are no documentation routes. ``app.state.server`` holds what the routes share.
    """
    app = FastAPI(title="servekit", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.server = make_state(engine, config)
    for routes in ROUTES:
        app.router.routes.extend(routes.router.routes)  # flat: the door looks at the route that answers
    errors.install(app)
    return app


def guarded(app: FastAPI, config: ServerConfig) -> ASGIApp:
    """What listens to the network: ``app`` behind its keys."""
    return Envelope(Auth(app, app.router, config.api_keys), app.state.server.metrics.answered)
