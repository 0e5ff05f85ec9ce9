"""Start the other ranks of one machine, watch them, and end together."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
import time

from common_platform.errors import ConfigError

LOOK_EVERY_S = 0.2
GRACE_S = 5.0  # for the main thread to end by itself when another rank is lost
END_S = 20.0  # for the other ranks to end when this one has
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
    children: dict[int, subprocess.Popen[bytes]] = {}
    atexit.register(_end, children)
    for rank in range(1, count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
        children[rank] = subprocess.Popen(command, env=os.environ | own)
    threading.Thread(target=_watch_ranks, args=(children,), daemon=True, name="watch-ranks").start()


def watch_parent() -> None:
    """In a rank that was started by ``start_ranks``: end when the first rank is gone."""
    parent = int(os.environ.get(PARENT, "0"))
    if parent:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True, name="watch-parent").start()


def _watch_ranks(children: dict[int, subprocess.Popen[bytes]]) -> None:
    while True:
        time.sleep(LOOK_EVERY_S)
        codes = {rank: child.poll() for rank, child in children.items()}
        failed = {rank: code for rank, code in codes.items() if code not in (None, 0)}
        if failed:
            rank, code = next(iter(failed.items()))
            print(f"error: rank {rank} ended with status {code}; its own error is above", file=sys.stderr, flush=True)
            time.sleep(GRACE_S)
            _end(children, wait_s=0.0)
            os._exit(code if 0 < code < 128 else 6)
        if all(code == 0 for code in codes.values()):
            return


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    os._exit(6)


def _end(children: dict[int, subprocess.Popen[bytes]], wait_s: float = END_S) -> None:
    deadline = time.monotonic() + wait_s
    while any(child.poll() is None for child in children.values()) and time.monotonic() < deadline:
        time.sleep(LOOK_EVERY_S / 4)
    for child in children.values():
        if child.poll() is None:
            child.terminate()
    for child in children.values():
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
