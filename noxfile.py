"""Everything that is run on this repository, by name: `nox -l` lists it.

Each session installs what it needs, at the versions in constraints/, into an environment of its own.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = ("common-platform", "trainkit", "servekit")
CONSTRAINTS = ROOT / "constraints" / "ci.txt"
OF_CLIENTS = ROOT / "constraints" / "clients.txt"  # what only they need
REAL_MODEL = ["transformers", "gguf", "accelerate"]
TEST_NEEDS = ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "httpx", "psutil", "matplotlib"]
CLIENTS = ["openai", "anthropic", "schemathesis"]
SANITIZERS = ["libasan.so", "libubsan.so"]
TEST_EXTRAS = ["llguidance", "opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"]
TRAIN_EXTRAS = [
    "torchao",
    "torchdata",
    "torchmetrics",
    "tensorboard",
    "jsonargparse",
    "peft",
    "onnx",
    "onnxruntime",
    "onnxscript",
]
KERNEL_NEEDS = ["triton"]  # beside a CPU build of torch: it interprets and compiles kernels without a GPU

nox.options.sessions = ["tests", "lint", "types", "build"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_external_run = True


def install(session: nox.Session, *needs: str, packages: tuple[str, ...] = PACKAGES) -> None:
    """Our packages, editable, and ``needs``, all at the pinned versions."""
    ours = [part for name in packages for part in ("-e", f"packages/{name}")]
    session.install("--quiet", "-c", str(CONSTRAINTS), *ours, *needs)


@nox.session
def demo(session: nox.Session) -> None:
    """Fine-tune a real model, hand it off, serve it, and ask it: `nox -s demo -- --keep` leaves the server up."""
    install(session, *REAL_MODEL, "openai", "matplotlib", "rich")
    session.run("python", "examples/finetune_and_serve.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but those marked slow or gpu."""
    install(session, *REAL_MODEL, *TEST_NEEDS, *CLIENTS, *TEST_EXTRAS, *TRAIN_EXTRAS, *KERNEL_NEEDS)
    session.run("python", "-m", "common_platform.embedded", silent=True)  # made once, before the workers start
    chosen = session.posargs or [
        "-m",
        "not slow and not gpu",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--ignore",
        "tests/kernels",
    ]
    session.run("python", "-m", "pytest", *chosen, env={"OMP_NUM_THREADS": "1"})


@nox.session
def core(session: nox.Session) -> None:
    """The scheduler, the blocks and the cache alone: seconds, and no torch is imported."""
    install(session, "pytest", "pytest-timeout", "hypothesis")
    session.run("python", "-m", "pytest", "tests/servekit/core", "-m", "not slow", *session.posargs)


@nox.session
def kernels(session: nox.Session) -> None:
    """The Triton kernels without a GPU: compiled for real devices, interpreted, and compiled as they were launched."""
    install(session, *REAL_MODEL, *TEST_NEEDS, *KERNEL_NEEDS)
    session.run("python", "-m", "pytest", "tests/kernels", "-n", "2", *session.posargs)
    interpreted = ["-k", "triton", "-m", "not slow", "-n", "2", "-p", "tests.kernels.launches", *session.posargs]
    folders = [f"tests/{package}/kernels" for package in ("servekit", "trainkit")]
    with tempfile.TemporaryDirectory() as launches:
        env = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "KERNEL_LAUNCHES": launches}
        session.run("python", "-m", "pytest", *folders, *interpreted, env=env)
        if not session.posargs:  # what some of the tests launch says little
            env = {"KERNEL_LAUNCHES": launches}
            session.run("python", "-m", "pytest", "tests/kernels/test_launched.py", "-n", "2", env=env)


@nox.session
def gpu(session: nox.Session) -> None:
    """Prove and time everything on the GPU at hand: `nox -s gpu -- --page FILE` makes the page of what it wrote."""
    install(session, "transformers", "pytest", *KERNEL_NEEDS)
    session.run("python", "-m", "tests.gpu", *session.posargs)


@nox.session
def loggers(session: nox.Session) -> None:
    """The loggers of services whose libraries are heavy: MLflow in a local store, W&B offline."""
    install(session, "pytest", "pytest-timeout", "mlflow-skinny", "wandb", packages=("common-platform", "trainkit"))
    session.run("python", "-m", "pytest", "tests/trainkit/test_service_loggers.py", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that take minutes each."""
    install(session, *REAL_MODEL, *TEST_NEEDS, *CLIENTS, *TEST_EXTRAS, *TRAIN_EXTRAS, *KERNEL_NEEDS)
    session.run("python", "-m", "pytest", "-m", "slow", "--timeout", "3600", *session.posargs)


OTHER_CLIENTS = {
    "litellm": ["litellm"],
    "langchain": ["langchain-openai"],
    "lm-eval": ["lm_eval[api]", "transformers"],
}


@nox.session
def clients(session: nox.Session) -> None:
    """LiteLLM, LangChain, lm-eval and vLLM's benchmark client, each in an environment of its own, against a server."""
    install(session, *REAL_MODEL, *TEST_NEEDS, "virtualenv")
    folder = Path(session.create_tmp())
    for name, needs in OTHER_CLIENTS.items():
        session.run("virtualenv", "--quiet", str(folder / name))
        pip = (str(folder / name / "bin" / "python"), "-m", "pip", "install", "--quiet")
        session.run(*pip, "-c", str(CONSTRAINTS), "-c", str(OF_CLIENTS), *needs, external=True)
    session.run("python", "-m", "pytest", "tests/clients", *session.posargs, env={"CLIENTS": str(folder.resolve())})


@nox.session
def soak(session: nox.Session) -> None:
    """A server under 100,000 requests: it must not grow."""
    install(session, *REAL_MODEL, *TEST_NEEDS, *TEST_EXTRAS)
    env = {"SOAK_REQUESTS": os.environ.get("SOAK_REQUESTS", "100000"), "OMP_NUM_THREADS": "1"}
    session.run("python", "-m", "pytest", "-s", "tests/servekit/server/test_soak.py", "--timeout", "7200", env=env)


@nox.session
def sanitize(session: nox.Session) -> None:
    """The C++ kernels under the sanitizers of addresses and undefined behaviour."""
    install(session, *TEST_NEEDS)
    session.run("python", "packages/servekit/hatch_build.py", "--sanitize")
    try:
        runtime = [
            session.run("g++", f"-print-file-name={name}", silent=True, external=True).strip() for name in SANITIZERS
        ]
        env = {"LD_PRELOAD": ":".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"}
        session.run("python", "-m", "pytest", "tests/servekit/kernels/test_native.py", "--timeout", "1800", env=env)
    finally:
        session.run("python", "packages/servekit/hatch_build.py")


@nox.session
def neon(session: nox.Session) -> None:
    """The C++ kernels for 64-bit Arm, on an emulated one: wants g++-aarch64-linux-gnu and qemu-user."""
    install(session, *TEST_NEEDS)
    env = {"SERVEKIT_NEEDS_CROSS_TOOLS": "1"}  # a session whose tools are missing fails; a test run goes without
    session.run("python", "-m", "pytest", "tests/servekit/kernels/test_native_interface.py", "-m", "", env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Format, lint, and the layering of the packages."""
    session.install("--quiet", "-c", str(CONSTRAINTS), "ruff", "import-linter")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    sources = os.pathsep.join(str(ROOT / "packages" / name / "src") for name in PACKAGES)
    session.run("lint-imports", env={"PYTHONPATH": sources})


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict, on the three packages."""
    install(session, "mypy", "types-PyYAML", "jsonargparse", *TEST_EXTRAS)
    session.run("mypy")


@nox.session
def build(session: nox.Session) -> None:
    """Build every wheel and sdist, install each alone in a clean environment, and use it there."""
    session.install("--quiet", "-c", str(CONSTRAINTS), "build", "hatchling", "virtualenv")
    dist = Path(tempfile.mkdtemp(prefix="dist-"))
    try:
        for name in PACKAGES:
            session.run("python", "-m", "build", "--quiet", "--outdir", str(dist), f"packages/{name}")
        for name in PACKAGES:
            _use_alone(session, name, dist)
    finally:
        shutil.rmtree(dist)


def _use_alone(session: nox.Session, name: str, dist: Path) -> None:
    """The wheel in a fresh environment, then the sdist in its place; each must do its package's job."""
    stem = name.replace("-", "_")
    with tempfile.TemporaryDirectory(prefix=f"{stem}-") as home:
        session.run("virtualenv", "--quiet", home)
        python = str(Path(home, "bin", "python"))
        wheel, sdist = next(dist.glob(f"{stem}-*.whl")), next(dist.glob(f"{stem}-*.tar.gz"))
        for built, how in ((wheel, ("--find-links", str(dist))), (sdist, ("--force-reinstall", "--no-deps"))):
            pinned = ("--quiet", "-c", str(CONSTRAINTS))
            session.run(python, "-m", "pip", "install", *pinned, *how, str(built), external=True)
            session.run(python, str(ROOT / "tests" / "alone" / f"use_{stem}.py"), external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Every benchmark, quick unless told otherwise: `nox -s bench -- --json benchmarks/NAME.py`."""
    install(session, *REAL_MODEL, *TEST_NEEDS, *CLIENTS, *KERNEL_NEEDS)
    chosen = [arg for arg in session.posargs if arg.endswith(".py")]
    flags = [arg for arg in session.posargs if not arg.endswith(".py")] or ["--quick"]
    scripts = chosen or sorted(
        str(p) for p in Path("benchmarks").glob("*.py") if p.stem not in ("common", "make_peers", "streams")
    )
    for script in scripts:
        session.run("python", script, *flags)


@nox.session(venv_backend="none")
def peers(session: nox.Session) -> None:
    """The environments of the peers that benchmarks compare us with: `nox -s peers -- vllm`."""
    session.run("python3", "benchmarks/make_peers.py", *session.posargs)
