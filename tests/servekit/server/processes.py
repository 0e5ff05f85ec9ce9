"""A real ``servekit serve`` in a process of its own, and what may be asked about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

READY = "servekit: ready on "
START_LIMIT_S = 60.0


class ServerProcess:
    """Started and waited for by its constructor; ended by ``stop``."""

    def __init__(self, model: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "servekit.cli", "serve", str(model), "--port", "0"]
        command += ["--served-model-name", "M", "--dtype", "float32", "--num-threads", "1"]
        command += ["--kernels", "reference", *flags]  # others end the tiny model's answers before a test can meddle
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )
        self.said: list[str] = []
        self._address: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait()
        self.port = int(self.url.rpartition(":")[2])
        self.engine_pid = self.engine()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith(READY):
                self._address.append(line.removeprefix(READY).strip())

    def _wait(self) -> str:
        deadline = time.monotonic() + START_LIMIT_S
        while not self._address:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("the server did not start:\n" + "".join(self.said))
            time.sleep(0.02)
        return self._address[0]

    def children(self) -> list[int]:
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in found.split()]

    def engine(self) -> int:
        """The engine's process id; 0 while there is none."""
        for pid in self.children():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text()
            except OSError:
                continue
            if "servekit.engine.process" in command:
                return pid
        return 0

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The engine stands still: no answer ends meanwhile, however fast it is and however slow the test."""
        pid = self.engine()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def log_lines(self) -> list[dict[str, Any]]:
        """The access log."""
        return [json.loads(line) for line in list(self.said) if line.startswith("{")]

    def end(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = 20) -> int:
        status = self.process.wait(timeout)
        self._close()
        return status

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
        self._close()

    def _close(self) -> None:
        self._reader.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Any, limit_s: float = 5.0) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
