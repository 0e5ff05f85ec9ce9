"""Fine-tuning SmolLM2-135M on Python's docstrings in float32, beside transformers.Trainer in the same run.

Both sides make the same optimizer steps on the same chats in the same order (8 a step), on the same threads: ours by
``trainkit.Trainer`` with packed rows, theirs with a collator that pads. They take turns, a step each. Tokens are those
of the chats, never padding. The bound is a large float32 matrix product, measured between turns: a token's training
costs 6 operations a parameter.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Report, arguments, median
from common_platform.embedded import smollm2
from make_peers import python_of

THREADS = 2
SETTINGS: dict[str, Any] = {"batch_size": 8, "lr": 1e-4, "weight_decay": 0.01, "beta2": 0.95, "threads": THREADS}
RECOMPUTED = {"none": False, "mlp": "mlp", "all": True}
HELD_OUT = 24  # chats
PARAMETERS = 134_515_008
MATRIX = 4096
GIB = 1 << 30


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of each side (default 6; quick 3); the first is not timed"
    )
    parser.add_argument(
        "--recompute", choices=("none", "mlp", "all"), default="none", help="what our side computes again in backward"
    )
    parser.add_argument("--tight", action="store_true", help="freed memory of our side goes back to the system")
    parser.add_argument("--side", nargs=2, metavar=("MODEL", "DATA"), help="be our side of it, in this process")
    args = parser.parse_args()
    if args.side:
        train(Path(args.side[0]), Path(args.side[1]))
        return
    SETTINGS["recompute"], SETTINGS["tight"] = args.recompute, args.tight
    steps = args.steps or (3 if args.quick else 6)
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.json")
        tokens = write_data(data, steps)
        sides = {"trainkit": Side([sys.executable, __file__, "--side", str(smollm2()), str(data)])}
        python = python_of("transformers")
        if python is None:
            print("transformers: left out, no environment: nox -s peers -- transformers", file=sys.stderr)
        else:
            driver = Path(__file__).parent / "drivers" / "finetune_driver.py"
            sides["transformers"] = Side([str(python), str(driver), str(smollm2()), str(data)])
        try:
            measure(sides, tokens, report)
        finally:
            for side in sides.values():
                side.end()
    report.finish(as_json=args.json)


def write_data(path: Path, steps: int) -> list[int]:
    """The chats as tokens, for both sides; how many tokens each step has."""
    from trainkit.lm import ChatDataset, docstring_examples

    size = SETTINGS["batch_size"]
    train, held_out = (
        ChatDataset([e.as_chat() for e in docstring_examples(split)[:count]], smollm2(), max_length=256)  # type: ignore[arg-type]
        for split, count in (("train", steps * int(size) + 8), ("held_out", HELD_OUT))
    )
    chosen = [train[i] for i in range(steps * int(size))]
    body = {"train": chosen, "held_out": [held_out[i] for i in range(len(held_out))], "settings": SETTINGS}
    path.write_text(json.dumps(body))
    batches = [chosen[i : i + int(size)] for i in range(0, len(chosen), int(size))]
    return [sum(len(one["input_ids"]) for one in batch) for batch in batches]


class Side:
    """A process that trains when it is told to."""

    def __init__(self, command: list[str]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True, env=environment
        )
        self.about = self._read()

    def ask(self, **what: Any) -> dict[str, Any]:
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"{self._process.args!r} ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(sides: dict[str, Side], tokens: list[int], report: Report) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    bounds: list[float] = []
    before = {name: side.ask(evaluate=True)["loss"] for name, side in sides.items()}
    for number in range(len(tokens)):
        order = list(sides) if number % 2 else list(reversed(sides))
        for name in order:
            seconds[name].append(sides[name].ask(steps=1)["seconds"])
        bounds.append(bound())
    rates, peaks, losses = {}, {}, {}
    for name, side in sides.items():
        found = side.ask(evaluate=True)
        timed = list(zip(tokens, seconds[name], strict=True))[1:]
        rates[name] = report.figure(f"{name}_tokens_per_s", median([count / taken for count, taken in timed]))
        peaks[name] = report.figure(f"{name}_peak_gib", found["peak_bytes"] / GIB)
        losses[name] = report.figure(f"{name}_held_out_loss", found["loss"])
        report.figure(f"{name}_held_out_loss_before", before[name])
        if side.about.get("version"):
            report.peers[name] = side.about["version"]
    report.figure("steps", len(tokens))
    report.figure("tokens", sum(tokens))
    limit = report.figure("float32_matmul_gflop_per_s", median(bounds))
    share = rates["trainkit"] * 6 * PARAMETERS / 1e9 / limit
    report.target("share of the float32 bound", share, ">=", 0.65)
    if "transformers" in sides:
        report.target("tokens/s over transformers.Trainer", rates["trainkit"] / rates["transformers"], ">=", 2.5)
        report.target("peak memory over transformers.Trainer", peaks["trainkit"] / peaks["transformers"], "<=", 0.45)
        apart = losses["trainkit"] - losses["transformers"]
        report.target("held-out loss less transformers.Trainer's, nats", apart, "<=", 0.005)


def bound() -> float:
    """Giga-operations a second of a large product, now."""
    import torch

    torch.set_num_threads(THREADS)
    one = torch.ones(MATRIX, MATRIX)
    torch.mm(one[:512], one)
    began = time.perf_counter()
    torch.mm(one, one)
    return 2 * MATRIX**3 / (time.perf_counter() - began) / 1e9


def train(model: Path, data_file: Path) -> None:
    """Our side: ``trainkit.Trainer`` on packed rows, a step when a line asks for it."""
    import torch

    torch.set_num_threads(THREADS)
    import trainkit
    from trainkit.lm import CausalLM, collate_packed, return_freed_memory

    out, sys.stdout = sys.stdout, sys.stderr
    data = json.loads(data_file.read_text())
    settings = data["settings"]
    if settings["tight"]:
        return_freed_memory()
    module = CausalLM.from_folder(
        model, lr=settings["lr"], weight_decay=settings["weight_decay"], betas=(0.9, settings["beta2"]),
        decay="constant", gradient_checkpointing=RECOMPUTED[settings["recompute"]],
    )  # fmt: skip

    class Steps(trainkit.Callback):
        left, began = 0, 0.0

        def on_train_start(self, trainer: trainkit.Trainer, pl_module: Any) -> None:
            self.wait(trainer)

        def on_train_batch_end(
            self, trainer: trainkit.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.left -= 1
            if not self.left:
                answer({"seconds": time.perf_counter() - self.began})
                self.wait(trainer)

        def wait(self, trainer: trainkit.Trainer) -> None:
            for line in sys.stdin:
                asked = json.loads(line)
                if "steps" in asked:
                    self.left, self.began = asked["steps"], time.perf_counter()
                    return
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                answer({"loss": evaluate(), "peak_bytes": peak})
            trainer.should_stop = True

    def answer(body: dict[str, Any]) -> None:
        print(json.dumps(body), file=out, flush=True)

    @torch.no_grad()
    def evaluate() -> float:
        module.eval()
        parts = [module.loss(collate_packed([[one]])) for one in data["held_out"]]
        module.train()
        return sum(float(total) for total, _ in parts) / sum(count for _, count in parts)

    size = settings["batch_size"]
    batches = [collate_packed([data["train"][i : i + size]]) for i in range(0, len(data["train"]), size)]
    answer({})
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainkit.Trainer(
            max_epochs=1, gradient_clip_val=1.0, accelerator="cpu", enable_checkpointing=False, callbacks=[Steps()],
            default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, batches)


if __name__ == "__main__":
    main()
