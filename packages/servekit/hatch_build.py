"""Builds native/ into one shared library beside the Python that loads it; without a compiler the wheel has none.

`python hatch_build.py` builds it in place, for work on the kernels; `--sanitize` with the sanitizers of addresses and
undefined behaviour.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
NATIVE = HERE / "native"
LIBRARY = HERE / "src" / "servekit" / "kernels" / "native" / "libservekit_cpu.so"
STAMP = LIBRARY.with_suffix(".so.built-from")

COMMON = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-pthread",
    "-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes",
]  # fmt: skip
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISAS = {
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}


def build(*, sanitize: bool = False) -> bool:
    """Make the library unless it is up to date; False where this machine cannot."""
    compiler = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None or sys.platform == "win32" or os.environ.get("SERVEKIT_NO_NATIVE") == "1":
        return False
    stamp = _stamp(compiler, sanitize)
    if LIBRARY.exists() and STAMP.exists() and STAMP.read_text() == stamp:
        return True
    flags = [*COMMON, *(SANITIZE if sanitize else [])]
    with TemporaryDirectory(prefix="servekit-native-") as folder:
        try:
            objects = compile_objects(compiler, Path(folder), flags)
            made = Path(folder, LIBRARY.name)
            link = ["-static-libstdc++", "-static-libgcc"] if sys.platform == "linux" and not sanitize else []
            _run([compiler, *flags, "-shared", "-o", str(made), *objects, *link])
        except subprocess.CalledProcessError as error:
            print(f"servekit: the CPU kernels could not be built, and the slower ones will run:\n{error.stderr}")
            return False
        shutil.copy(made, LIBRARY.with_suffix(".new"))
        LIBRARY.with_suffix(".new").replace(LIBRARY)  # a process that has the old one mapped keeps it
    STAMP.write_text(stamp)
    return True


def compile_objects(compiler: str, folder: Path, flags: list[str]) -> list[str]:
    """One object for each instruction set of the processor that ``compiler`` compiles for, and the rest."""
    machine = subprocess.run([compiler, "-dumpmachine"], check=True, capture_output=True, text=True).stdout
    is_x86, is_arm = machine.startswith(("x86_64", "amd64")), machine.startswith(("aarch64", "arm64"))
    isas: dict[str, list[str]] = {"neon" if is_arm else "scalar": []} | (ISAS if is_x86 else {})
    jobs = [(name, [*extra, f"-DSK_NAME={name}"], NATIVE / "isa.cpp") for name, extra in isas.items()]
    jobs += [(name, [], NATIVE / f"{name}.cpp") for name in ("pool", "pack", "program")]

    def compile_one(job: tuple[str, list[str], Path]) -> str:
        name, extra, source = job
        made = str(folder / f"{name}.o")
        _run([compiler, *flags, *extra, "-c", str(source), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        return list(workers.map(compile_one, jobs))


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _stamp(compiler: str, sanitize: bool) -> str:
    sources = b"".join(path.read_bytes() for path in [*sorted(NATIVE.iterdir()), Path(__file__)])
    return f"{compiler} {platform.machine()} {sanitize} {hashlib.sha256(sources).hexdigest()}"


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script
    pass
else:

    class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
        """One wheel for all Pythons of a platform: the library knows nothing of Python."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if self.target_name != "wheel" or not build():
                return
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["artifacts"] += [str(LIBRARY.relative_to(HERE))]


if __name__ == "__main__":
    sys.exit(0 if build(sanitize="--sanitize" in sys.argv) else 1)
