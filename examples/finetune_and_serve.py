"""The whole journey: fine-tune a real model, hand it off, serve it, and ask it as an OpenAI client.

python examples/finetune_and_serve.py                    # SmolLM2-135M on Python's docstrings, about 5 minutes
python examples/finetune_and_serve.py --keep             # leaves the server running and prints a curl line
python examples/finetune_and_serve.py --train-seconds 30 --out /tmp/demo
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

import trainkit
from common_platform.embedded import smollm2
from common_platform.errors import PlatformError, exit_code
from trainkit.callbacks import EarlyStopping, LearningRateMonitor, ProgressBar
from trainkit.export import handoff
from trainkit.lm import CausalLM, ChatDataset, docstring_examples
from trainkit.loggers import CSVLogger

console = Console()
BATCH_SIZE = 8  # chats a step
READY = "servekit: ready on "
START_LIMIT_S = 120


@dataclass
class Answer:
    text: str = ""
    num_tokens: int = 0
    first_token_s: float = 0.0
    seconds: float = 0.0


@dataclass
class Summary:
    model: str = ""
    threads: int = 0
    held_out_loss_before: float = 0.0
    held_out_loss_after: float = 0.0
    train_steps: int = 0
    train_seconds: float = 0.0
    train_tokens_per_s: float = 0.0
    time_to_first_token_ms: float = 0.0
    serving_tokens_per_s: float = 0.0
    answers: list[dict[str, str]] = field(default_factory=list)

    @property
    def improvement(self) -> float:
        return 1 - self.held_out_loss_after / self.held_out_loss_before


class TokenCount(trainkit.Callback):
    """How many tokens went through training, and in how many seconds of it."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: trainkit.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: trainkit.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter() - self._started
        self.tokens += int(batch["attention_mask"].sum())


def fine_tune(args: argparse.Namespace, base: Path, summary: Summary) -> Path:
    """Train on docstrings until the time is over or the held-out loss stops falling; the handed-off folder."""
    module = CausalLM.from_folder(base, lr=1e-4, warmup_steps=min(5, args.steps), total_steps=args.steps)
    train = ChatDataset([e.as_chat() for e in docstring_examples("train")], base, max_length=256)
    held_out = ChatDataset([e.as_chat() for e in docstring_examples("held_out")[: args.held_out]], base, max_length=256)
    train_loader = DataLoader(train, BATCH_SIZE, shuffle=True, collate_fn=train.collate, drop_last=True)
    held_out_loader = DataLoader(held_out, 2 * BATCH_SIZE, collate_fn=held_out.collate)
    counter = TokenCount()
    logger = CSVLogger(args.out, name="training", version="")
    trainer = trainkit.Trainer(
        max_steps=args.steps,
        max_time=timedelta(seconds=args.train_seconds),
        gradient_clip_val=1.0,
        val_check_interval=max(args.steps // 4, 1),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=[
            EarlyStopping("val_loss", patience=2, restore_best=True),
            LearningRateMonitor(),
            counter,
            ProgressBar(),
        ],
        logger=logger,
        default_root_dir=args.out,
    )
    summary.held_out_loss_before = trainer.validate(module, held_out_loader)[0]["val_loss"]
    trainer.fit(module, train_loader, held_out_loader)
    summary.held_out_loss_after = trainer.validate(module, held_out_loader)[0]["val_loss"]
    summary.train_steps, summary.train_seconds = trainer.global_step, counter.seconds
    summary.train_tokens_per_s = counter.tokens / counter.seconds
    plot_loss(Path(logger.log_dir) / "metrics.csv", args.out / "loss.png", summary)
    metrics = {"val_loss": summary.held_out_loss_after}
    return handoff(module, base, args.out / "tuned", metrics=metrics, overwrite=True)


def plot_loss(metrics: Path, picture: Path, summary: Summary) -> None:
    """Training and held-out loss over the steps."""
    import csv

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    train = [(int(row["step"]), float(row["train_loss"])) for row in rows if row.get("train_loss")]
    held_out = [(0, summary.held_out_loss_before)]
    held_out += [(int(row["step"]), float(row["val_loss"])) for row in rows if row.get("val_loss")]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(*zip(*train, strict=True), label="training", alpha=0.6)
    axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Python's docstrings")
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def start_server(folder: Path, name: str, out: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`servekit serve` on a free port; its process and address once it is ready."""
    command = [sys.executable, "-m", "servekit.cli", "serve", str(folder), "--port", "0", "--served-model-name", name]
    log = out / f"server-{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, stdout=file, start_new_session=True)
    try:
        return process, wait_until_ready(process, log)
    except BaseException:
        stop_server(process)
        raise


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if line.startswith(READY):
                return line.removeprefix(READY).strip()
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")


def stop_server(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def served(folder: Path, name: str, out: Path) -> Iterator[str]:
    process, address = start_server(folder, name, out)
    try:
        yield address
    finally:
        stop_server(process)


def ask(address: str, name: str, question: str) -> Answer:
    """One streamed chat completion."""
    answer, started = Answer(), time.perf_counter()
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": question}],
            max_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                answer.first_token_s = answer.first_token_s or time.perf_counter() - started
                answer.text += chunk.choices[0].delta.content
            if chunk.usage:
                answer.num_tokens = chunk.usage.completion_tokens
    answer.seconds = time.perf_counter() - started
    return answer


def compare(base: Path, tuned: Path, summary: Summary, out: Path) -> None:
    """Ask both models the same held-out questions and show the answers side by side."""
    examples = docstring_examples("held_out")[-3:]
    table = Table(
        "question", "base model", "tuned model", title="The same questions, before and after", show_lines=True
    )
    with served(base, "base", out) as before, served(tuned, "tuned", out) as after:
        ask(after, "tuned", "Hello")  # warm-up
        for example in examples:
            old, new = ask(before, "base", example.question), ask(after, "tuned", example.question)
            table.add_row(example.question, old.text, new.text)
            summary.answers.append({"question": example.question, "base": old.text, "tuned": new.text})
            summary.time_to_first_token_ms += new.first_token_s * 1000 / len(examples)
            rate = max(new.num_tokens - 1, 1) / max(new.seconds - new.first_token_s, 1e-9)
            summary.serving_tokens_per_s += rate / len(examples)
    console.print(table)


def show(summary: Summary, out: Path) -> None:
    table = Table(title="Summary", show_header=False)
    before, after = summary.held_out_loss_before, summary.held_out_loss_after
    table.add_row("held-out loss", f"{before:.3f} -> {after:.3f} ({-summary.improvement:+.1%})")
    table.add_row("training", f"{summary.train_steps} steps, {summary.train_tokens_per_s:.0f} tokens/s")
    table.add_row("time to first token", f"{summary.time_to_first_token_ms:.0f} ms")
    table.add_row("serving, one stream", f"{summary.serving_tokens_per_s:.1f} tokens/s")
    table.add_row("written", f"{out}/tuned, {out}/loss.png, {out}/summary.json")
    console.print(table)
    (out / "summary.json").write_text(json.dumps(vars(summary), indent=2) + "\n")


def keep(tuned: Path, out: Path) -> None:
    """Leave a server running and say how to ask it, and how to end it."""
    process, address = start_server(tuned, "tuned", out)
    body = json.dumps(
        {"model": "tuned", "messages": [{"role": "user", "content": "What does `len(obj)` do in Python?"}]}
    )
    console.print("The server is running. Ask it:", style="bold")
    print(f"curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    print(f"kill {process.pid}  # ends it")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder (default: SmolLM2-135M-Instruct, embedded)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="where everything is written")
    parser.add_argument("--train-seconds", type=float, default=110, help="the training budget")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps, if the time suffices")
    parser.add_argument("--held-out", type=int, default=48, help="examples in the held-out loss")
    parser.add_argument("--keep", action="store_true", help="leave the server running at the end")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    summary = Summary(threads=torch.get_num_threads())
    base = args.model or smollm2()
    summary.model = base.name
    trainkit.seed_everything(0)
    tuned = fine_tune(args, base, summary)
    compare(base, tuned, summary, args.out)
    show(summary, args.out)
    if args.keep:
        keep(tuned, args.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("stopped", style="bold red")
        sys.exit(130)
    except PlatformError as error:
        console.print(f"error: {error}", style="bold red", markup=False)
        sys.exit(exit_code(error))
