"""Prove and time everything on the GPU at hand: `python -m tests.gpu`, or `nox -s gpu`.

Needs torch, triton (and the C compiler that it calls), transformers, safetensors, numpy and pytest, and our packages:

    PYTHONPATH=packages/common-platform/src:packages/servekit/src:packages/trainkit/src:. python -m tests.gpu

All is written to one JSON with the device's name, driver and versions; `--page` makes docs/benchmarks/gpu.md of
such files. Without a GPU it says so, writes that nothing ran, and exits 0; `--dry-run` tries the script itself on a
CPU, with tiny sizes and interpreted kernels. First everything is proved, in several processes side by side, which also
compile what is timed afterwards, one stage at a time. A stage that breaks the device or hangs is ended and goes on with
its next case in a new process; the JSON is written anew after each stage, and the exit code is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.gpu.stages import Stage, run_stage
from tests.gpu.targets import targets
from tests.gpu.work import PROOFS, TIMED, has_msgspec, run_work

ROOT = Path(__file__).resolve().parents[2]
BARE = Path(__file__).parent / "bare"
SOURCES = [ROOT, *(ROOT / "packages" / name / "src" for name in ("common-platform", "servekit", "trainkit"))]
BUDGET_S = 540
PROOFS_S = 220
STALL_S = 90  # a case compiles its kernels, loads its model
LEAST_S = 15  # that a stage must have left to begin
SPARE_CORES = 3
DRY_PATIENCE = 4  # times as long: interpreted kernels, on a machine that may be busy with other things


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON; default: docs/benchmarks/data/gpu-DEVICE.json")
    parser.add_argument("--dry-run", action="store_true", help="try the script on a CPU")
    parser.add_argument("--only", nargs="*", choices=["tests", *PROOFS, *TIMED], help="these stages")
    parser.add_argument("--tune", action="store_true", help="also measure how attention is best launched")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for all of it; default: %(default)s")
    parser.add_argument("--page", nargs="+", type=Path, metavar="JSON", help="make docs/benchmarks/gpu.md and stop")
    parser.add_argument("--work", nargs=2, metavar=("NAME", "PROGRESS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not has_msgspec():
        sys.path.append(str(BARE))
    if arguments.page:
        from tests.gpu.page import write_page

        write_page(ROOT / "docs" / "benchmarks" / "gpu.md", arguments.page)
        return 0
    if arguments.work:
        return run_work(arguments.work[0], Path(arguments.work[1]), is_dry=arguments.dry_run)
    return run_all(arguments)


def run_all(arguments: argparse.Namespace) -> int:
    """The proofs side by side, then each timed stage as long as there is time; the JSON after each of them."""
    from tests.gpu.page import section

    folder = Path(tempfile.mkdtemp(prefix="gpu-"))
    try:
        run = Run(folder, arguments)
        if run.report["machine"]["device"] is None and not arguments.dry_run:
            print("no GPU here: nothing ran")
            if arguments.out:
                run.write()
            return 0 if run.report["machine"]["ok"] else 1
        run.prove()
        run.time()
        print(run.out)
        print(section(run.report))
        return 0 if all(stage["ok"] for stage in run.report["phases"].values()) else 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Run:
    """One run: its report, and the time that it has left."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self._begin = time.monotonic()
        self._folder = folder
        self._is_dry = arguments.dry_run
        self._budget_s = arguments.budget_s
        self._wanted = set(arguments.only or ["tests", *PROOFS, *TIMED]) - (set() if arguments.tune else {"tuning"})
        if arguments.tune:
            self._wanted.add("tuning")
        self._env = _environment(folder, is_dry=self._is_dry)
        machine = run_stage(self._stage("machine", 90), folder, self._env)
        machine = {"device": None, "versions": {}} | machine
        self.report: dict[str, Any] = {"machine": machine, "ran": machine["device"] is not None}
        self.report |= {"is_dry_run": self._is_dry, "phases": {}}
        name = f"gpu-{_slug(machine['device'])}.json"
        self.out: Path = arguments.out or ROOT / "docs" / "benchmarks" / "data" / name

    def prove(self) -> None:
        """Shards of the kernel tests, parity, and what compiles kernels ahead, on all cores at once."""
        cores = 2 if self._is_dry else max(len(os.sched_getaffinity(0)) - SPARE_CORES, 2)
        count = 1 if self._is_dry else max(cores - 2, 1)
        limit_s = min(PROOFS_S, self._left_s())
        jobs = {name: self._stage(name, limit_s) for name in PROOFS if name in self._wanted}
        if "tests" in self._wanted:
            jobs |= {f"tests-{i}": self._stage(f"tests-{i}-of-{count}", limit_s) for i in range(count)}
        with ThreadPoolExecutor(cores) as pool:
            names = {pool.submit(self._run, stage): name for name, stage in jobs.items()}
            phases, shards = self.report["phases"], []
            for end in as_completed(names):
                name = names[end]
                if name.startswith("tests-"):
                    shards.append(end.result())
                    phases["tests"] = _all_shards(shards)
                else:
                    phases[name] = end.result()
                self._told(name, end.result()["ok"])

    def time(self) -> None:
        for name, limit_s in TIMED.items():
            if name not in self._wanted:
                continue
            if self._left_s() < LEAST_S:
                self.report["phases"][name] = {"ok": False, "skipped": "no time left"}
            else:
                self.report["phases"][name] = self._run(self._stage(name, min(limit_s, self._left_s())))
            self._told(name, self.report["phases"][name]["ok"])

    def write(self) -> None:
        """All of the file or nothing, so that what ends this process leaves the last whole one."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(self.report, indent=1) + "\n")
        part.replace(self.out)

    def _run(self, stage: Stage) -> dict[str, Any]:
        """A folder for the models of the stage lives as long as it does, however it ends."""
        scratch = _scratch()
        try:
            return run_stage(stage, self._folder, self._env | {"GPU_SCRATCH": str(scratch)})
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _stage(self, name: str, limit_s: float) -> Stage:
        command = [sys.executable, "-m", "tests.gpu", *(["--dry-run"] if self._is_dry else []), "--work", name]
        patience = DRY_PATIENCE if self._is_dry else 1
        return Stage(name=name, command=command, limit_s=limit_s * patience, stall_s=STALL_S * patience)

    def _left_s(self) -> float:
        return self._budget_s - (time.monotonic() - self._begin)

    def _told(self, name: str, ok: bool) -> None:
        self.report["seconds"] = time.monotonic() - self._begin
        self.report["targets"] = targets(self.report["phases"])
        self.write()
        print(f"{name}: {'ok' if ok else 'FAILED'} {self.report['seconds']:.0f} s", flush=True)


def _environment(folder: Path, *, is_dry: bool) -> dict[str, str]:
    """Kernels are compiled into one cache for all stages; nothing is looked for on a network."""
    paths = [*map(str, SOURCES), os.environ.get("PYTHONPATH", ""), *([] if has_msgspec() else [str(BARE)])]
    env = {"TRITON_CACHE_DIR": str(folder / "triton")} | os.environ
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    env |= {
        "GPU_SCRIPT": str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if is_dry:
        env |= {"TRITON_INTERPRET": "1", "KERNEL_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return env


def _scratch() -> Path:
    """In memory where there is some: models are written there and read once."""
    shared = Path("/dev/shm")
    has_room = shared.is_dir() and shutil.disk_usage(shared).free > 40e9
    return Path(tempfile.mkdtemp(dir=shared if has_room else None, prefix="gpu-"))


def _all_shards(shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all shards, the tests that failed and why, and where a process ended."""
    outcomes = {test: outcome for shard in shards for test, outcome in shard.get("outcomes", {}).items()}
    failed = {test: why for shard in shards for test, why in shard.get("failed", {}).items()}
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    ends = [failure for shard in shards for failure in shard.get("failures", [])]
    told = [{"test": test, "why": why} for test, why in failed.items()]
    return {
        "ok": not told and not ends and counts["passed"] > 0,
        "seconds": max(shard["seconds"] for shard in shards),
        "counts": counts,
        "failed": told[:100],
        "failures": ends[:20],
    }


def _slug(device: str | None) -> str:
    return re.sub(r"[^a-z0-9]+", "-", (device or "none").lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
