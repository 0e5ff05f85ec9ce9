"""transformers.Trainer with a collator that pads, a step at a time: ``MODEL_FOLDER DATA_FILE``.

Runs in its peer's environment and imports nothing of ours. Each line ``{"steps": n}`` is answered by the seconds they
took, ``{"evaluate": true}`` by the held-out loss and the peak memory; the first line says that the model is there.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import SequentialSampler

IGNORED = -100


def pad(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(one["input_ids"]) for one in examples)
    about = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    rows = [one | {"attention_mask": [1] * len(one["input_ids"])} for one in examples]
    return {
        name: torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])
        for name, filler in about.items()
    }


class Ordered(transformers.Trainer):  # type: ignore[misc]
    """The examples in their order, so that both sides learn from the same batches."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


class Steps(transformers.TrainerCallback):  # type: ignore[misc]
    """Makes steps when it is told to."""

    def __init__(self, model: Any, data: dict[str, Any], out: Any) -> None:
        self.model, self.data, self.out = model, data, out
        self.left = 0
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.wait(control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.left -= 1
        if not self.left:
            self.answer({"seconds": time.perf_counter() - self.began})
            self.wait(control)

    def answer(self, body: dict[str, Any]) -> None:
        print(json.dumps(body), file=self.out, flush=True)

    def wait(self, control: Any) -> None:
        for line in sys.stdin:
            asked = json.loads(line)
            if "steps" in asked:
                self.left, self.began = asked["steps"], time.perf_counter()
                return
            self.answer({"loss": self.evaluate(), "peak_bytes": peak_bytes()})
        control.should_training_stop = True

    @torch.no_grad()
    def evaluate(self) -> float:
        self.model.eval()
        total, count = 0.0, 0
        held_out = self.data["held_out"]
        for start in range(0, len(held_out), 4):
            batch = pad(held_out[start : start + 4])
            learnt = int((batch["labels"][:, 1:] != IGNORED).sum())
            total, count = total + float(self.model(**batch).loss) * learnt, count + learnt
        self.model.train()
        return total / count


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    data = json.loads(Path(sys.argv[2]).read_text())
    settings = data["settings"]
    torch.set_num_threads(settings["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings["batch_size"],
            learning_rate=settings["lr"],
            weight_decay=settings["weight_decay"],
            adam_beta2=settings["beta2"],
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            num_train_epochs=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_steps=1000,
        )
        steps = Steps(model, data, out)
        steps.answer({"version": transformers.__version__})
        trainer = Ordered(
            model=model, args=arguments, train_dataset=data["train"], data_collator=pad, callbacks=[steps]
        )
        trainer.train()


main()
