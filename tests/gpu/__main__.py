"""Prove and time everything on the GPU at hand: `python -m tests.gpu`, or `nox -s gpu`.

Needs torch, triton, transformers, safetensors, numpy and pytest, and our packages on PYTHONPATH:

    PYTHONPATH=packages/common-platform/src:packages/servekit/src:packages/trainkit/src:. python -m tests.gpu

All is written to one JSON with the device's name, driver and versions; `--page` makes docs/benchmarks/gpu.md of
such files. Without a GPU it says so, writes that nothing ran, and exits 0; `--dry-run` tries the script itself on a
CPU, with tiny sizes and interpreted kernels. Each phase is a process of its own, so that one which breaks the device
does not take the others along; a phase that fails is in the JSON with its output, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BARE = Path(__file__).parent / "bare"
SOURCES = [ROOT, *(ROOT / "packages" / name / "src" for name in ("common-platform", "servekit", "trainkit"))]
BUDGET_S = 570
PHASES = {  # name -> most seconds that it may take; what comes first matters most
    "tests": 240,
    "parity": 100,
    "kernels": 100,
    "engine-1b": 150,
    "engine-8b": 200,
    "training": 90,
}
TEST_FOLDERS = ("tests/servekit/kernels", "tests/trainkit/kernels")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON; default: docs/benchmarks/data/gpu-DEVICE.json")
    parser.add_argument("--dry-run", action="store_true", help="try the script on a CPU")
    parser.add_argument("--only", nargs="*", choices=list(PHASES), help="these phases")
    parser.add_argument("--page", nargs="+", type=Path, metavar="JSON", help="make docs/benchmarks/gpu.md and stop")
    parser.add_argument("--phase", choices=list(PHASES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not has_msgspec():
        sys.path.append(str(BARE))
        os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(BARE)])
    if arguments.page:
        from tests.gpu.page import write_page

        write_page(ROOT / "docs" / "benchmarks" / "gpu.md", arguments.page)
        return 0
    if arguments.phase:
        print("\n" + json.dumps(run_phase(arguments.phase, is_dry=arguments.dry_run)))
        return 0
    return run_all(arguments)


def has_msgspec() -> bool:
    try:
        import msgspec  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def run_all(arguments: argparse.Namespace) -> int:
    """Each phase in turn, as long as there is time, and the JSON after each of them."""
    from tests.gpu.machine import facts

    report: dict[str, Any] = {"machine": facts(), "ran": False, "is_dry_run": arguments.dry_run, "phases": {}}
    has_gpu = report["machine"]["device"] is not None
    out = arguments.out or ROOT / "docs" / "benchmarks" / "data" / f"gpu-{_slug(report['machine']['device'])}.json"
    if not has_gpu and not arguments.dry_run:
        print("no GPU here: nothing ran")
        if arguments.out:
            _write(out, report)
        return 0
    report["ran"] = has_gpu
    begin = time.monotonic()
    for name in arguments.only or PHASES:
        left = BUDGET_S - (time.monotonic() - begin)
        if left < 20:
            report["phases"][name] = {"ok": False, "skipped": "no time left"}
            continue
        report["phases"][name] = _in_process(name, min(PHASES[name], left), is_dry=arguments.dry_run)
        report["seconds"] = time.monotonic() - begin
        _write(out, report)
        print(f"{name}: {'ok' if report['phases'][name]['ok'] else 'FAILED'} {report['seconds']:.0f} s", flush=True)
    print(out)
    return 0 if all(phase["ok"] for phase in report["phases"].values()) else 1


def _in_process(name: str, limit_s: float, *, is_dry: bool) -> dict[str, Any]:
    """The phase's figures, or how it ended."""
    command = [sys.executable, "-m", "tests.gpu", "--phase", name, *(["--dry-run"] if is_dry else [])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*map(str, SOURCES), os.environ.get("PYTHONPATH", "")])}
    if is_dry:
        env |= {"TRITON_INTERPRET": "1", "KERNEL_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    begin = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired as late:
        told = (late.stdout or b"")[-3000:]
        return {"ok": False, "error": f"longer than {limit_s:.0f} s", "output": told.decode(errors="replace")}
    seconds = time.monotonic() - begin
    if done.returncode:
        output = (done.stdout[-1500:] + done.stderr[-3000:]).strip()
        return {"ok": False, "error": f"exit code {done.returncode}", "output": output, "seconds": seconds}
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return {"ok": figures.pop("ok", True), "seconds": seconds} | figures


def run_phase(name: str, *, is_dry: bool) -> dict[str, Any]:
    """In a process of its own."""
    if name == "tests":
        return kernel_tests(is_dry=is_dry)
    import torch

    device = torch.device("cpu" if is_dry else "cuda")
    if is_dry:
        from common_platform.kernels import runs_triton

        runs_triton(device)  # makes the interpreter ready
    if name == "parity":
        from tests.gpu.engine_times import parity

        return parity(device, is_dry=is_dry)
    if name == "kernels":
        from tests.gpu.kernel_times import measure

        figures = measure(device, is_dry=is_dry)
        return figures | {"ok": not any("error" in one for one in figures["kernels"])}
    if name == "training":
        from tests.gpu.training_times import measure as train

        return train(device, is_dry=is_dry)
    from tests.gpu.engine_times import throughput

    return throughput(name.removeprefix("engine-"), device, is_dry=is_dry)


def kernel_tests(*, is_dry: bool) -> dict[str, Any]:
    """All tests of kernels in all dtypes of the device, by pytest alone; the names of those that fail."""
    files = [
        str(path)
        for folder in TEST_FOLDERS
        for path in sorted((ROOT / folder).glob("test_*.py"))
        if "tests.kernels.backends" in path.read_text() and "import hypothesis" not in path.read_text()
        if not is_dry or path.stem == "test_gates"
    ]
    with tempfile.TemporaryDirectory(prefix="gpu-") as home:
        found = Path(home) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-c", "tests/gpu/pytest.ini", "--rootdir", str(ROOT)]
        command += ["-k", "triton", "--junitxml", str(found), *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not found.is_file():
            return {"ok": False, "error": f"pytest: exit code {done.returncode}", "output": done.stdout[-3000:]}
        suite = ET.parse(found).getroot().find("testsuite")  # noqa: S314
        if suite is None:
            return {"ok": False, "error": "pytest wrote no suite"}
        failed = [
            {"test": case.get("name"), "why": (case[0].get("message") or "")[:300]}
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        counts = {name: int(suite.get(name) or 0) for name in ("tests", "failures", "errors", "skipped")}
    return {"ok": done.returncode == 0, "counts": counts, "failed": failed[:100]}


def _slug(device: str | None) -> str:
    return re.sub(r"[^a-z0-9]+", "-", (device or "none").lower()).strip("-")


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
