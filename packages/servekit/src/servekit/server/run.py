"""A server's life: take the port, load the model, say that it is ready, serve, drain, leave nothing behind."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from common_platform.errors import ConfigError, EngineDead, ResourceError
from servekit.engine.async_engine import AsyncEngine
from servekit.engine.config import EngineConfig
from servekit.server.app import build_app
from servekit.server.auth import ApiKeys
from servekit.server.limits import ServerLimits
from servekit.server.state import ServerState

log = logging.getLogger("servekit.server")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
INTERRUPTED = 130
TERMINATED_BEFORE_THE_END = 143


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where to listen, for whom, and how to end."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    api_keys: Sequence[str] = ()
    served_model_name: str | None = None  # None: the folder's name
    shutdown_timeout_s: float = 30.0
    allow_insecure_bind: bool = False
    ignore_unknown_fields: bool = False
    limits: ServerLimits = field(default_factory=ServerLimits)

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.api_keys and not self.allow_insecure_bind:
            raise ConfigError(
                "host", self.host, "127.0.0.1 while there is no API key", flag="--api-key or --allow-insecure-bind"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", self.port, "0..65535", flag="--port")


def serve(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve until a signal comes; the process's exit status."""
    listener = take_port(server.host, server.port)
    with listener:
        return uvloop.run(_Server(engine, server, listener).run())


def take_port(host: str, port: int) -> socket.socket:
    """A listening socket, before anything expensive is done.

    Raises:
        ResourceError: the port is in use, or may not be used.
        ConfigError: there is no such address here.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            taken = "in use" if error.errno == errno.EADDRINUSE else "not permitted"
            raise ResourceError("port", f"{port}, {taken}", "a free port", code="port_in_use", flag="--port") from error
        raise ConfigError("host", host, "an address of this machine", flag="--host") from error
    return listener


class _Server:
    def __init__(self, engine: EngineConfig, server: ServerConfig, listener: socket.socket) -> None:
        self._engine_config = engine
        self._config = server
        self._listener = listener
        self._signals: asyncio.Queue[signal.Signals] = asyncio.Queue()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
        starting = asyncio.ensure_future(AsyncEngine.from_config(self._engine_config))
        stopped = asyncio.ensure_future(self._signals.get())
        await _first_of(starting, stopped)
        if stopped.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return INTERRUPTED if stopped.result() is signal.SIGINT else TERMINATED_BEFORE_THE_END
        engine = starting.result()
        try:
            return await self._serve(engine, stopped)
        finally:
            await engine.shutdown()

    async def _serve(self, engine: AsyncEngine, stopped: asyncio.Future[signal.Signals]) -> int:
        config = self._config
        name = config.served_model_name or Path(self._engine_config.model).name
        state = ServerState(engine, name, config.limits, config.ignore_unknown_fields)
        web = uvicorn.Server(
            uvicorn.Config(
                build_app(state, ApiKeys(config.api_keys)),
                http="httptools",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=True,
                lifespan="off",
                timeout_keep_alive=30,
                h11_max_incomplete_event_size=config.limits.max_header_bytes,
            )
        )
        web.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        serving = asyncio.ensure_future(web._serve([self._listener]))
        host, port = self._listener.getsockname()[:2]
        print(f"servekit: ready on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
        await _first_of(serving, stopped)
        number = stopped.result() if stopped.done() else signal.SIGTERM
        drained = await self._drain(state)
        web.should_exit = web.force_exit = True
        await asyncio.wait({serving}, timeout=5)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        if number is signal.SIGINT:
            return INTERRUPTED
        return 0 if drained else TERMINATED_BEFORE_THE_END

    async def _drain(self, state: ServerState) -> bool:
        """No new work; what runs may end, until the time is up or a second signal comes."""
        state.draining = True
        again = asyncio.ensure_future(self._signals.get())
        deadline = asyncio.get_running_loop().time() + self._config.shutdown_timeout_s
        while state.engine.num_requests and not again.done() and asyncio.get_running_loop().time() < deadline:
            await asyncio.wait({again}, timeout=0.05)
        again.cancel()
        left = state.engine.num_requests
        if left:
            log.warning("%d requests were cut off", left)
        return left == 0 and not isinstance(state.engine.dead, EngineDead)


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
