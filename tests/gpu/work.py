"""What the stages of `python -m tests.gpu` do, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.gpu.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
TEST_FOLDERS = ("tests/servekit/kernels", "tests/trainkit/kernels")
PROOFS = ("parity", "compile-0", "compile-1")  # beside the tests
TIMED = {"kernels": 130, "engine-1b": 130, "engine-8b": 170, "training": 90, "tuning": 120}  # most seconds, in order


def has_msgspec() -> bool:
    try:
        import msgspec  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def run_work(name: str, progress: Path, *, is_dry: bool) -> int:
    """The exit code of the stage ``name``, whose figures go to the file ``progress``."""
    threading.Thread(target=_end_with, args=(int(os.environ.get("GPU_SCRIPT", os.getppid())),), daemon=True).start()
    if name.startswith("tests-"):
        number, count = name.removeprefix("tests-").split("-of-")
        os.environ |= {"GPU_SHARD": f"{number}/{count}", "GPU_PROGRESS": str(progress)}
        return kernel_tests(is_dry=is_dry)
    return _work_of(name)(Progress(progress), is_dry)


def _end_with(parent: int) -> None:
    """Nothing holds the device once the script is gone, also where it was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def _work_of(name: str) -> Callable[[Progress, bool], int]:
    """The modules of a stage are imported by its own process alone."""
    if name == "machine":
        return _machine
    if name == "parity":
        from tests.gpu.engine_times import parity

        return parity
    if name == "training":
        from tests.gpu.training_times import measure

        return measure
    if name == "tuning":
        from tests.gpu.tuning_times import measure as tune

        return tune
    from tests.gpu import engine_times, kernel_times

    if name.startswith("compile-"):
        number = int(name.removeprefix("compile-"))
        return lambda progress, is_dry: kernel_times.compile_ahead(progress, number, len(PROOFS) - 1, is_dry=is_dry)
    if name == "kernels":
        return kernel_times.measure
    return lambda progress, is_dry: engine_times.throughput(name.removeprefix("engine-"), progress, is_dry=is_dry)


def _machine(progress: Progress, is_dry: bool) -> int:
    from tests.gpu.machine import facts

    for key, value in facts().items():
        progress.put(value, key)
    return 0


def kernel_test_files(*, is_dry: bool) -> list[str]:
    """Those of backends, without hypothesis where that is not here; a dry run has one of them."""
    has_hypothesis = importlib.util.find_spec("hypothesis") is not None
    files = [path for folder in TEST_FOLDERS for path in sorted((ROOT / folder).glob("test_*.py"))]
    texts = {path: path.read_text() for path in files if not is_dry or path.stem == "test_gates"}
    return [
        str(path)
        for path, text in texts.items()
        if "tests.kernels.backends" in text and (has_hypothesis or "from hypothesis" not in text)
    ]


def kernel_tests(*, is_dry: bool) -> int:
    """This process' shard of all tests of kernels, in all dtypes of the device; failures are in the progress file."""
    import pytest

    command = ["-q", "-c", str(ROOT / "tests/gpu/pytest.ini"), "--rootdir", str(ROOT), "-k", "triton"]
    command += ["-p", "tests.gpu.pytest_shard", *kernel_test_files(is_dry=is_dry)]
    os.chdir(ROOT)
    code = pytest.main(command)
    none_or_failed = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    return 0 if code in none_or_failed else int(code)


def device_of(*, is_dry: bool) -> Any:
    """The device, with the interpreter made ready in a dry run."""
    import torch

    from common_platform.kernels import runs_triton

    device = torch.device("cpu" if is_dry else "cuda")
    reason = runs_triton(device)
    if reason is not None:
        sys.exit(reason)
    return device
