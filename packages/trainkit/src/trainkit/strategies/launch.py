"""Start the other ranks of one machine, watch them, and end together."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time
from types import TracebackType

from common_platform.errors import ConfigError, DistError, exit_code

LOOK_EVERY_S = 0.2
GRACE_S = 5.0  # for the main thread to end by itself when another rank is lost
END_S = 20.0  # for the other ranks to end when this one has
HURRY_S = 0.4  # for the same, when this one ends by an error
LOST = exit_code(DistError())
FAILED = "rank_failed"  # the code of an error that another rank's own error has caused
PARENT = "TRAINKIT_PARENT"  # the process id of the rank that started this one


def is_launched() -> bool:
    """Whether torchrun, or we, have started this process as one of several ranks."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(count: int) -> None:
    """Start the running program again ``count - 1`` times, and make this process rank 0.

    When a rank ends with an error, all do. When this process ends, however it does, so do the others.

    Raises:
        ConfigError: the program cannot be started again, as in a notebook.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    if not sys.argv or sys.argv[0] in ("", "-") or hasattr(sys, "ps1"):
        raise ConfigError("devices", count, "1 in an interactive session; for more, start a script")
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    os.environ |= shared | {"RANK": "0", "LOCAL_RANK": "0"}
    atexit.register(_end)
    for rank in range(1, count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
        _children[rank] = subprocess.Popen(command, env=os.environ | own)
    threading.Thread(target=_watch_ranks, daemon=True, name="watch-ranks").start()


def watch_parent() -> None:
    """In a rank that was started by ``start_ranks``: end when the first rank is gone."""
    parent = int(os.environ.get(PARENT, "0"))
    if parent:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True, name="watch-parent").start()


_children: dict[int, subprocess.Popen[bytes]] = {}  # the ranks that this process has started
_failed = threading.Event()  # whether this process ends by an error


def end_with_status() -> None:
    """A program that is left by an error does not wait for its ranks, and one that has lost a rank ends with the status
    that says so, not with Python's 1.

    To be called when the group is there: torch puts a hook of its own around the one that it finds.
    """
    before = sys.excepthook
    if getattr(before, "ends_with_status", False):
        return

    def hook(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
        before(kind, error, at)
        _failed.set()
        if isinstance(error, DistError):
            raise SystemExit(status_of(error))

    hook.ends_with_status = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def status_of(error: DistError) -> int:
    """What this process ends with: the status of the first failure, which may be another rank's own error."""
    _failed.set()
    deadline = time.monotonic() + (END_S if error.code == FAILED and _children else 0.0)
    while time.monotonic() < deadline:
        failed = [code for child in _children.values() if (code := child.poll())]
        if failed:
            return _status(failed[0])
        time.sleep(LOOK_EVERY_S / 4)
    return exit_code(error)


def _status(code: int) -> int:
    """Of a rank that ended by itself; a signal's is that of a lost rank."""
    return code if 0 < code < 128 else LOST


def _watch_ranks() -> None:
    while True:
        time.sleep(LOOK_EVERY_S)
        codes = {rank: child.poll() for rank, child in _children.items()}
        failed = {rank: code for rank, code in codes.items() if code not in (None, 0)}
        if failed:
            rank, code = next(iter(failed.items()))
            print(f"error: rank {rank} ended with status {code}; its own error is above", file=sys.stderr, flush=True)
            time.sleep(GRACE_S)
            _end(wait_s=0.0)
            os._exit(_status(code))
        if all(code == 0 for code in codes.values()):
            return


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    print("error: rank 0, which started the others, is gone", file=sys.stderr, flush=True)
    os._exit(LOST)


def _end(wait_s: float = END_S) -> None:
    _wait(HURRY_S if _failed.is_set() else wait_s)
    for child in _children.values():
        if child.poll() is None:
            child.terminate()
    _wait(HURRY_S if _failed.is_set() else GRACE_S)
    for child in _children.values():
        if child.poll() is None:
            child.kill()  # also one that is stopped
            child.wait()


def _wait(wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while any(child.poll() is None for child in _children.values()) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S / 4)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
