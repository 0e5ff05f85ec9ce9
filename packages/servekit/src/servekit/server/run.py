"""A server from its start to its end: socket, engine, signals, drain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from common_platform.errors import ConfigError, ResourceError
from servekit.engine.async_engine import STOP_LIMIT_S, AsyncEngine
from servekit.engine.collector import fewer_collections
from servekit.engine.config import EngineConfig
from servekit.engine.supervisor import RestartPolicy
from servekit.server.config import ServerConfig
from servekit.server.http import protocol_class
from servekit.server.limits import flag_of

if TYPE_CHECKING:
    from servekit.server.state import ServerState

APP = "servekit.server.app"  # loaded while the engine is: it takes a third of a second
log = logging.getLogger("servekit.server")
BACKLOG = 2048
YOUNG_OBJECTS = 5_000  # looked through at once: some 10 ms in which nobody is answered
LAST_WORDS_S = 0.5
CUT_OFF_S = 0.5  # for an engine to end where nobody waits any longer
KEEP_ALIVE_S = 30  # an idle connection
LOST, INTERRUPTED, TERMINATED = 1, 130, 143


def serve(engine: EngineConfig, config: ServerConfig) -> int:
    """Serve until a signal comes; the process's exit status.

    SIGTERM: no new requests, those under way have ``shutdown_timeout_s`` to end; 0, or 143 where some had to be cut
    off. SIGINT: the same, 130. A second signal ends the waiting. SIGHUP: read the file of keys again. 1: the engine
    died too often.

    Raises:
        ResourceError: a port is taken.
        ArtifactError, ConfigError: the engine cannot serve this model.
    """
    with contextlib.ExitStack() as open_here:
        listener = open_here.enter_context(bind(config.host, config.port))
        admin_listener = None
        if config.admin_port is not None:
            admin_listener = open_here.enter_context(bind(config.admin_host, config.admin_port, "admin_port"))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Lifetime(engine, config, listener, admin_listener).run())


def bind(host: str, port: int, name: str = "port") -> socket.socket:
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
                name, f"{port}, {taken}", "a free port", flag=flag_of(name), code="port_in_use"
            ) from error
        raise ResourceError(
            "host", host, "an address of this machine", flag=flag_of(name.replace("port", "host"))
        ) from error
    return listener


class _Lifetime:
    """What happens between start and end. Signals come at any time."""

    def __init__(
        self,
        engine_config: EngineConfig,
        config: ServerConfig,
        listener: socket.socket,
        admin_listener: socket.socket | None,
    ) -> None:
        self._engine_config = engine_config
        self._config = config
        self._listener = listener
        self._admin_listener = admin_listener
        self._state: ServerState | None = None
        self._is_lost = False  # the engine stays dead
        self._server: uvicorn.Server | None = None
        self._signals: list[int] = []
        self._is_cut_off = False
        self._loading: asyncio.Task[AsyncEngine] | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._on_hang_up)
        restart = RestartPolicy(self._config.max_engine_restarts)
        self._loading = asyncio.create_task(AsyncEngine.from_config(self._engine_config, restart))
        loop.run_in_executor(None, import_module, APP)
        try:
            engine = await self._loading
        except asyncio.CancelledError:
            return self._status(cut_off=True)
        try:
            return self._status(cut_off=await self._serve(engine))
        finally:
            await engine.shutdown(limit_s=CUT_OFF_S if self._is_cut_off else STOP_LIMIT_S)
            await self._last_words()

    async def _serve(self, engine: AsyncEngine) -> bool:
        """True where requests had to be cut off."""
        from servekit.server.app import build_admin_app, build_app, guarded, guarded_admin

        app = build_app(engine, self._config)
        state = self._state = app.state.server
        state.begin_drain = self._begin_drain
        await state.templates.start()
        server = self._server = _Server(self._uvicorn_config(guarded(app, self._config)))
        if self._signals:  # one came while the model was being loaded
            return True
        admin = _Server(self._uvicorn_config(guarded_admin(build_admin_app(app), self._config)))
        beside = [state.heartbeat.run(), self._say_ready(server), self._watch(engine)]
        if self._admin_listener is not None:
            beside.append(admin.serve(sockets=[self._admin_listener]))
        tasks = [asyncio.create_task(work) for work in beside]
        gc.collect()
        gc.freeze()  # what serves all requests is here to stay
        try:
            with fewer_collections(YOUNG_OBJECTS):
                await server.serve(sockets=[self._listener])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await state.responses.close()
            await state.templates.close()
        return self._is_cut_off

    async def _watch(self, engine: AsyncEngine) -> None:
        """A server whose engine stays dead is of no use."""
        await engine.given_up.wait()
        log.error("the engine died too often; change with --max-engine-restarts")
        self._is_lost = True
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True

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
            ssl_certfile=self._config.ssl_certfile,
            ssl_keyfile=self._config.ssl_keyfile,
            ssl_ca_certs=self._config.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_REQUIRED if self._config.ssl_ca_certs else ssl.CERT_NONE,
        )

    async def _say_ready(self, server: uvicorn.Server) -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        scheme = "https" if self._config.ssl_certfile else "http"
        for words, listener in (("ready", self._listener), ("management", self._admin_listener)):
            if listener is not None:
                host, port = listener.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                print(f"servekit: {words} on {scheme}://{shown}:{port}", file=sys.stderr, flush=True)

    def _on_hang_up(self) -> None:
        """Keys that cannot be read leave those from before in their place."""
        if self._state is None:
            return
        try:
            self._state.keys.reload()
            log.info("the keys were read again")
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error)

    def _on_signal(self, number: int) -> None:
        self._signals.append(number)
        if self._server is None:
            if self._loading is not None:
                self._loading.cancel()
            return
        if self._server.should_exit:
            self._cut_off()
            return
        self._begin_drain()

    def _begin_drain(self) -> None:
        """No new requests; those under way have their time."""
        if self._server is None or self._server.should_exit:
            return
        if self._state is not None:
            self._state.admission.closed_for = "draining"
        self._server.should_exit = True
        asyncio.get_running_loop().call_later(self._config.shutdown_timeout_s, self._cut_off)

    def _cut_off(self) -> None:
        """Wait no longer: uvicorn ends, and what is still open learns from the engine's end."""
        if self._server is not None:
            self._is_cut_off = bool(self._server.server_state.tasks)
            self._server.force_exit = True

    def _status(self, *, cut_off: bool) -> int:
        if self._is_lost:
            return LOST
        if signal.SIGINT in self._signals:
            return INTERRUPTED
        return TERMINATED if cut_off else 0


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are ours."""
        yield
