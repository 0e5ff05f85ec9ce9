"""A server from its start to its end: socket, engine, signals, drain."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn
import uvloop

from common_platform.errors import ResourceError
from servekit.engine.async_engine import AsyncEngine
from servekit.engine.config import EngineConfig
from servekit.server.admission import Admission
from servekit.server.app import build_app, guarded
from servekit.server.config import ServerConfig
from servekit.server.http import protocol_class
from servekit.server.limits import flag_of

log = logging.getLogger("servekit.server")
BACKLOG = 2048
LAST_WORDS_S = 0.5
KEEP_ALIVE_S = 30  # an idle connection
INTERRUPTED, TERMINATED = 130, 143


def serve(engine: EngineConfig, config: ServerConfig) -> int:
    """Serve until a signal comes; the process's exit status.

    SIGTERM: no new requests, those under way have ``shutdown_timeout_s`` to end; 0, or 143 where some had to be cut
    off. SIGINT: the same, 130. A second signal ends the waiting.

    Raises:
        ResourceError: the port is taken.
        ArtifactError, ConfigError: the engine cannot serve this model.
    """
    listener = bind(config.host, config.port)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Lifetime(engine, config, listener).run())
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """The port is ours before the model is loaded, so that a taken one is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            taken = "in use" if error.errno == errno.EADDRINUSE else "not permitted"
            raise ResourceError(
                "port", f"{port}, {taken}", "a free port", flag=flag_of("port"), code="port_in_use"
            ) from error
        raise ResourceError("host", host, "an address of this machine", flag=flag_of("host")) from error
    return listener


class _Lifetime:
    """What happens between start and end. Signals come at any time."""

    def __init__(self, engine_config: EngineConfig, config: ServerConfig, listener: socket.socket) -> None:
        self._engine_config = engine_config
        self._config = config
        self._listener = listener
        self._server: uvicorn.Server | None = None
        self._admission: Admission | None = None
        self._signals: list[int] = []
        self._is_cut_off = False
        self._loading: asyncio.Task[AsyncEngine] | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        self._loading = asyncio.create_task(AsyncEngine.from_config(self._engine_config))
        try:
            engine = await self._loading
        except asyncio.CancelledError:
            return self._status(cut_off=True)
        try:
            return self._status(cut_off=await self._serve(engine))
        finally:
            await engine.shutdown()
            await self._last_words()

    async def _serve(self, engine: AsyncEngine) -> bool:
        """True where requests had to be cut off."""
        app = build_app(engine, self._config)
        self._admission = app.state.server.admission
        templates = app.state.server.templates
        await templates.start()
        server = self._server = _Server(self._uvicorn_config(guarded(app, self._config)))
        if self._signals:  # one came while the model was being loaded
            return True
        heartbeat = asyncio.create_task(app.state.server.heartbeat.run())
        ready = asyncio.create_task(self._say_ready(server))
        try:
            await server.serve(sockets=[self._listener])
        finally:
            heartbeat.cancel()
            ready.cancel()
            await asyncio.gather(heartbeat, ready, return_exceptions=True)
            await app.state.server.responses.close()
            await templates.close()
        return self._is_cut_off

    async def _last_words(self) -> None:
        """Streams that were cut off say so."""
        tasks = self._server.server_state.tasks if self._server is not None else set()
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS_S)

    def _uvicorn_config(self, app: object) -> uvicorn.Config:
        return uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=protocol_class(self._config.limits),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
        )

    async def _say_ready(self, server: uvicorn.Server) -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        host, port = self._listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"servekit: ready on http://{shown}:{port}", file=sys.stderr, flush=True)

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        if self._server is None:
            if self._loading is not None:
                self._loading.cancel()
            return
        if self._server.should_exit:
            self._cut_off()
            return
        if self._admission is not None:
            self._admission.is_draining = True
        self._server.should_exit = True
        asyncio.get_running_loop().call_later(self._config.shutdown_timeout_s, self._cut_off)

    def _cut_off(self) -> None:
        """Wait no longer: uvicorn ends, and what is still open learns from the engine's end."""
        if self._server is not None:
            self._is_cut_off = bool(self._server.server_state.tasks)
            self._server.force_exit = True

    def _status(self, *, cut_off: bool) -> int:
        if signal.SIGINT in self._signals:
            return INTERRUPTED
        return TERMINATED if cut_off else 0


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are ours."""
        yield
