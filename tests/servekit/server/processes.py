"""A real ``servekit serve`` in a process of its own, and what may be asked about it.

Tests run beside others on machines that may stall for seconds anywhere. So they wait for a thing itself, with a limit
that only a failure meets; and what must be looked at while it happens is held still (``frozen``), not raced with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

READY, MANAGED = "servekit: ready on ", "servekit: management on "
ADMIN_KEY = "key-of-the-tests-own"
START_LIMIT_S = 180.0
PATIENCE_S = 60.0  # until a wait is given up: long beside what is waited for, as machines may stall
LONGEST_LOOK_S = 0.25


class ServerProcess:
    """Started and waited for by its constructor; ended by ``stop``."""

    def __init__(self, model: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "servekit.cli", "serve", str(model), "--port", "0"]
        command += ["--served-model-name", "M", "--dtype", "float32", "--num-threads", "1"]
        command += ["--kernels", "reference", "--admin-port", "0", *flags]  # the same arithmetic on every machine
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SERVEKIT_ADMIN_KEY": ADMIN_KEY, **(env or {})},
        )
        self._admin_key = (env or {}).get("SERVEKIT_ADMIN_KEY", ADMIN_KEY)
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait()
        self.port = int(self.url.rpartition(":")[2])
        self.engine_pid = self.engine()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    def _wait(self) -> str:
        deadline = time.monotonic() + START_LIMIT_S
        while not self._told(MANAGED):  # which is said last
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError("the server did not start:\n" + "".join(self.said))
            time.sleep(0.02)
        return self._told(READY)

    def _told(self, words: str) -> str:
        return next((line.removeprefix(words).strip() for line in list(self.said) if line.startswith(words)), "")

    def children(self) -> list[int]:
        """Of all its threads: the system counts a child as that of the thread that started it."""
        found = []
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(OSError):  # it has ended meanwhile
                found += [int(pid) for pid in (thread / "children").read_text().split()]
        return found

    def running(self, module: str) -> list[int]:
        """The process ids of children that run ``module``."""
        found = []
        for pid in self.children():
            with suppress(OSError):  # it has ended meanwhile
                if module in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found

    def engine(self) -> int:
        """The engine's process id; 0 while there is none."""
        return next(iter(self.running("servekit.engine.process")), 0)

    def signal_engine(self, number: int) -> int:
        """The process id of the engine, which has been sent ``number``."""
        pid = self.engine()
        if not pid:
            raise RuntimeError("there is no engine")  # 0 would be this process, and those beside it
        os.kill(pid, number)
        return pid

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The engine stands still: no answer ends meanwhile, however fast it is and however slow the test.

        Half a minute long, then it counts as stalled.
        """
        pid = self.signal_engine(signal.SIGSTOP)
        if not wait_until(lambda: state_of(pid) == "T"):
            raise RuntimeError("the engine does not stop")
        try:
            yield
        finally:
            with suppress(ProcessLookupError):  # the test has ended it
                os.kill(pid, signal.SIGCONT)

    def requests(self) -> int:
        """Those that the server has given to its engine and not yet answered, as it counts them itself."""
        with self.management() as client:
            return int(client.get("/admin/status").json()["requests"])

    def management(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self._admin_key}"}
        return httpx.Client(base_url=self._told(MANAGED), headers=headers, timeout=PATIENCE_S)

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=2 * PATIENCE_S, **options)

    def log_lines(self) -> list[dict[str, Any]]:
        """The access log."""
        return [json.loads(line) for line in list(self.said) if line.startswith("{")]

    def end(self, number: int = signal.SIGTERM, timeout: float = PATIENCE_S) -> int:
        self.process.send_signal(number)
        return self.wait(timeout)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        status = self.process.wait(timeout)
        self._close()
        return status

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(PATIENCE_S)
        self._close()

    def _close(self) -> None:
        self._reader.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def state_of(pid: int) -> str:
    """The letter that the system shows for a process: ``T`` stopped, ``Z`` a zombie; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid: int) -> bool:
    return state_of(pid) not in ("", "Z", "X")


def wait_until(condition: Any, limit_s: float = PATIENCE_S) -> bool:
    """Whether ``condition`` came true within ``limit_s``, as a machine counts that does not stall.

    Of a look that took long, little is counted: others had the machine then. So a limit that is promised can be
    given, and is met by many looks.
    """
    spent = 0.0
    while spent < limit_s:
        began = time.monotonic()
        if condition():
            return True
        time.sleep(0.02)
        spent += min(time.monotonic() - began, LONGEST_LOOK_S)
    return bool(condition())
