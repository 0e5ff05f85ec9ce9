"""The kernels by their C interface alone, without Python: built and checked for this processor, and for 64-bit Arm."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CHECK = Path(__file__).parent / "native_check.cpp"
TARGETS = {  # compiler, and what runs its programs here
    "this processor": ("c++", []),
    "64-bit Arm": ("aarch64-linux-gnu-g++", ["qemu-aarch64"]),
}


def builder():
    """``hatch_build.py``, which is no module of the package."""
    spec = importlib.util.spec_from_file_location("servekit_hatch_build", ROOT / "packages/servekit/hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_agree_with_plain_loops(target, tmp_path):
    compiler, runner = TARGETS[target]
    missing = [tool for tool in (compiler, *runner) if shutil.which(tool) is None]
    if missing and os.environ.get("SERVEKIT_NEEDS_CROSS_TOOLS"):
        pytest.fail(f"not installed: {', '.join(missing)}")
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    build = builder()
    flags = [*build.COMMON, f"-I{build.NATIVE}"]
    objects = build.compile_objects(compiler, tmp_path, flags)
    program = str(tmp_path / "check")
    subprocess.run([compiler, *flags, "-static", str(CHECK), *objects, "-o", program], check=True, timeout=300)
    done = subprocess.run([*runner, program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all agree" in done.stdout
    assert (target == "64-bit Arm") == done.stdout.startswith("neon")
