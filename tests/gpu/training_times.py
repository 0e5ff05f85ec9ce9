"""A training step of a Llama-shaped model by trainkit's Trainer: bfloat16 beside float32, time and memory."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from tests.gpu.folders import SHAPES, config_of
from tests.gpu.machine import forget, synchronize
from tests.gpu.progress import Progress
from tests.gpu.work import device_of


def measure(progress: Progress, is_dry: bool) -> int:
    """Seconds a step after warm-up and the most memory, of each precision."""
    device = device_of(is_dry=is_dry)
    for name in ("32-true", "bf16-mixed", "bf16-true"):
        if progress.begins(name):
            progress.put(_steps(name, device, is_dry=is_dry), "precisions", name)
    return 0


def _steps(precision: str, device: torch.device, *, is_dry: bool) -> dict[str, float]:
    import transformers

    import trainkit

    shape = SHAPES["tiny" if is_dry else "1b"]
    rows, length, num_steps = (1, 16, 3) if is_dry else (4, 1024, 8)
    settings = config_of(shape, torch.float32) | {"num_hidden_layers": 2 if is_dry else 8}
    times: list[float] = []

    class Model(trainkit.TrainModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            with device:  # where drawing the weights takes no time
                self.net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            synchronize()
            times.append(time.perf_counter())
            return self.net(input_ids=batch, labels=batch, use_cache=False).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-5)

    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, shape.vocab_size, (rows, length), generator=generator) for _ in range(num_steps)]
    forget()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = trainkit.Trainer(
        max_steps=num_steps,
        precision=precision,
        accelerator="cpu" if device.type == "cpu" else "auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(batches, batch_size=None))
    later = [b - a for a, b in pairwise(times[1:])]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"step_s": sorted(later)[len(later) // 2], "peak_bytes": peak}
