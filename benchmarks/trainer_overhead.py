"""What a Trainer adds to a step of a plain PyTorch loop, beside Lightning and Accelerate in the same run.

A 2-layer MLP, batch 8, on one thread. Each side runs in a process of its own that interleaves itself with the plain
loop and gives the difference, so that drift of the machine hits both. "bare": without loggers, checkpoints and
progress; "full": ``log`` in each step, a row every 50, checkpoints and progress as they come.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from common import Report, arguments, median
from make_peers import python_of

SIDES = {  # name -> library, module, whether everything is on
    "trainkit bare": ("trainkit", "trainkit", False),
    "trainkit full": ("trainkit", "trainkit", True),
    "lightning bare": ("lightning", "lightning", False),
    "lightning full": ("lightning", "lightning", True),
    "accelerate": ("accelerate", "accelerate", False),
}
BATCH, WIDTH = 8, 32


class Batches:
    """The same batch, ``count`` times."""

    def __init__(self, count: int) -> None:
        import torch

        self.count = count
        self.batch = (torch.randn(BATCH, WIDTH), torch.randn(BATCH, 1))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        return iter([self.batch] * self.count)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--stall", action="store_true", help="measure what a save costs a step, in this process")
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process, and print microseconds")
    args = parser.parse_args()
    steps, rounds = (400, 3) if args.quick else (2000, 7)
    if args.side:
        print(json.dumps(measure(args.side, steps, rounds)))
        return
    if args.stall:
        print(json.dumps(stall_of_a_save()))
        return
    report = Report()
    added = {}
    for side in SIDES:
        found = _in_its_own_process(side, args.quick, report)
        if found is not None:
            added[side] = report.figure(f"{side}_added_us_per_step", found["added_us"])
            report.figure(f"{side}_first_step_ms", found["first_step_ms"])
    for ours, theirs, share in (
        ("trainkit bare", "lightning bare", 0.1),
        ("trainkit full", "lightning full", 0.1),
        ("trainkit full", "accelerate", 0.25),
    ):
        if theirs in added:
            report.target(f"{ours} over {theirs}", added[ours] / added[theirs], "<=", share)
    imports = [(_import_s("torch"), _import_s("trainkit")) for _ in range(5)]  # in turns: the disk's cache is the same
    report.figure("import_torch_s", median([torch for torch, _ in imports]))
    report.figure("import_trainkit_s", median([ours for _, ours in imports]))
    report.target("import trainkit over import torch", median([ours / torch for torch, ours in imports]), "<=", 1.2)
    stall = json.loads(_run_here("--stall"))
    for name, value in stall.items():
        report.figure(name, value)
    report.target("stall of a step by a save that is written later", stall["async_save_stall_share"], "<=", 0.05)
    report.target("Trainer to first step, ms", report.figures["trainkit full_first_step_ms"], "<=", 50.0)
    report.finish(as_json=args.json)


def _in_its_own_process(side: str, quick: bool, report: Report) -> dict[str, float] | None:
    """The figures of one side; None where its peer's environment has not been made."""
    library = SIDES[side][0]
    python = sys.executable if library == "trainkit" else python_of(library)
    if python is None:
        print(f"{side}: left out, no environment: nox -s peers -- {library}", file=sys.stderr)
        return None
    command = [str(python), __file__, "--side", side, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if library != "trainkit":
        asked = f"import importlib.metadata as m; print(m.version({library!r}))"
        report.peers[library] = subprocess.run(
            [str(python), "-c", asked], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()
    return found


def _run_here(*flags: str) -> str:
    """The last line of this script with ``flags``, in a process of its own."""
    command = [sys.executable, __file__, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return done.stdout.splitlines()[-1]


def stall_of_a_save(steps: int = 12, every: int = 3) -> dict[str, float]:
    """What a save costs the loop, as a share of a step: how long ``save_checkpoint`` holds it up, median over saves.

    A transformer of 4 layers, 256 dims and 8 sequences of 256 tokens, AdamW, on one thread: 12 bytes of state a
    parameter. Beside it the same with a save that is written at once, and steps while a checkpoint is being written.
    """
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    work = import_module("trainkit")
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name, plugins in (("save_now", None), ("async_save", [work.plugins.AsyncCheckpointIO()])):
            held, plain, beside = _saves(work, plugins, steps, every)
            found[f"{name}_holds_up_ms"] = held * 1e3
            found[f"{name}_stall_share"] = held / plain
            found[f"{name}_step_beside_writing_over_plain_step"] = beside / plain
            found[f"{name}_plain_step_ms"] = plain * 1e3
        os.chdir(Path(__file__).parent)
    return found


def _saves(library: Any, plugins: Any, steps: int, every: int) -> tuple[float, float, float]:
    """Seconds: that a save holds up the loop, of a step long after a save, of the step right after one."""
    import torch
    from torch import nn

    width, length, rows = 256, 256, 8

    class Model(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            self.net = nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(width, 1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)

    class Times(library.Callback):  # type: ignore[misc, name-defined]
        keeps_checkpoints = True

        def __init__(self) -> None:
            self.held: list[float] = []
            self.after: list[float] = []
            self.later: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            ended = time.perf_counter()
            place = trainer.global_step % every
            if trainer.global_step > every:
                (self.after if place == 1 else self.later if place in (0, every - 1) else []).append(ended - self.began)
            if place == 0:
                trainer.save_checkpoint(Path(f"step{trainer.global_step}"))
                self.held.append(time.perf_counter() - ended)

    times = Times()
    batches = [torch.randn(rows, length, width)] * steps
    trainer = library.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=True, callbacks=[times], plugins=plugins,
        enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Model(), batches)
    return median(times.held), median(times.later), median(times.after)


def _import_s(name: str) -> float:
    what = "from trainkit import Trainer, TrainModule" if name == "trainkit" else f"import {name}"
    code = f"import time; t = time.perf_counter(); {what}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout)


def measure(side: str, steps: int, rounds: int) -> dict[str, float]:
    """Microseconds that ``side`` adds to a step: the median over rounds of its time less the plain loop's."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    library, module, full = SIDES[side]
    work = import_module(module)
    run = _accelerate if library == "accelerate" else _trainer
    plain, theirs, first = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for _ in range(rounds + 1):
            plain.append(_plain(steps))
            took, before = run(work, steps, full)
            theirs.append(took)
            first.append(before)
        os.chdir(Path(__file__).parent)
    added = [(b - a) / steps * 1e6 for a, b in zip(plain[1:], theirs[1:], strict=True)]  # the first warms up
    return {"added_us": median(added), "first_step_ms": median(first[1:]) * 1e3}


def _net() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


def _plain(steps: int) -> float:
    import torch

    net = _net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    began = time.perf_counter()
    for x, y in Batches(steps):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - began


def _accelerate(library: Any, steps: int, full: bool) -> tuple[float, float]:
    import torch

    made = time.perf_counter()
    accelerator = library.Accelerator(cpu=True)
    net = _net()
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=1e-3))
    began = time.perf_counter()
    for x, y in Batches(steps):
        with accelerator.accumulate(net):
            loss = (net(x) - y).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
    return time.perf_counter() - began, began - made


def _trainer(library: Any, steps: int, full: bool) -> tuple[float, float]:
    import torch

    times: dict[str, float] = {}

    class Model(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            if full:
                self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

        def on_train_start(self) -> None:
            times["began"] = time.perf_counter()

        def on_train_end(self) -> None:
            times["ended"] = time.perf_counter()

    made = time.perf_counter()
    settings = {"log_every_n_steps": 50} if full else {"barebones": True}
    trainer = library.Trainer(max_epochs=1, accelerator="cpu", devices=1, **settings)
    trainer.fit(Model(), Batches(steps))
    return times["ended"] - times["began"], times["began"] - made


if __name__ == "__main__":
    main()
