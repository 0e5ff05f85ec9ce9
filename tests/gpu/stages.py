"""Stages as processes of their own: one that breaks or hangs loses the case that it was at, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.progress import read

BROKEN = 75  # exit code: the device answers no longer in this process
AGAIN = 76  # exit code: all is well, and the next case is for a process with the device's memory to itself
POLL_S = 0.1
END_S = 10  # that a killed process may take to go: one in the driver's hands may never
GOING_ON = "more to come"
TAIL = 3000  # characters of output that are kept of a stage that failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """``command`` writes what it finds to the progress file that is its last argument.

    ``limit_s``: of all its processes together. ``stall_s``: without a new line in the progress file.
    """

    name: str
    command: Sequence[str]
    limit_s: float
    stall_s: float


def run_stage(stage: Stage, folder: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """The figures of ``stage``, with ``ok``, ``seconds``, and of each process that failed the case and the reason.

    A process that fails is followed by another as long as that one begins a new case.
    """
    progress, log = folder / f"{stage.name}.jsonl", folder / f"{stage.name}.log"
    begin = time.monotonic()
    failures: list[dict[str, Any]] = []
    done = 0
    while True:
        why = _run([*stage.command, str(progress)], log, progress, begin + stage.limit_s, stage.stall_s, env)
        figures, begun = read(progress)
        if why is None:
            break
        if why == GOING_ON and len(begun) > done:
            done = len(begun)
            continue
        failures.append({"case": begun[-1] if len(begun) > done else "", "why": why, "output": _tail(log)})
        if len(begun) == done or time.monotonic() > begin + stage.limit_s:
            break
        done = len(begun)
    found = {"ok": not failures, "seconds": time.monotonic() - begin} | figures
    return found if not failures else found | {"ok": False, "failures": failures}


def _run(
    command: Sequence[str], log: Path, progress: Path, deadline: float, stall_s: float, env: Mapping[str, str]
) -> str | None:
    """Why the process failed; None where it did not."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    size, heard = -1, time.monotonic()
    while not _has_ended(process):
        now, found = time.monotonic(), progress.stat().st_size if progress.is_file() else 0
        if found != size:
            size, heard = found, now
        if now > deadline or now > heard + stall_s:
            _end(process)
            return "the stage's time was over" if now > deadline else f"nothing new for {stall_s:.0f} s"
        time.sleep(POLL_S)
    _end(process)  # what it may have left behind
    if process.returncode == 0:
        return None
    if process.returncode == AGAIN:
        return GOING_ON
    return "the device broke" if process.returncode == BROKEN else f"exit code {process.returncode}"


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without taking its exit code, so that its number stays its own until ``_end``."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started, which share its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        return  # the driver holds it: the others go on without waiting


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - TAIL, 0))
        return file.read().decode(errors="replace")
