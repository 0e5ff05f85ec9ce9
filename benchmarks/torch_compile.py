"""Would `torch.compile` of what lies between the attentions make a step faster, where torch's own operations run?

SmolLM2-135M by `--kernels reference`: as it is; with each norm, gate and rotation compiled; and with the two halves of
a layer compiled whole. A step of one row, of 16 rows, and a prompt of 128 tokens. docs/design/0009 has the answer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import Report, arguments, interleaved, median, seconds
from common_platform.embedded import smollm2
from servekit.execution.choices import ExecutorConfig
from servekit.execution.executor import InProcessExecutor
from servekit.kernels.paged_attention.metadata import StepRows
from servekit.kernels.rms_norm import reference as norm
from servekit.kernels.rotary import apply_rotary
from servekit.layers import attention
from servekit.layers.attention import StepInputs
from servekit.models.llama import Llama, LlamaLayer

STEPS = {"1_row": (1, 32, 1), "16_rows": (16, 32, 1), "128_tokens": (1, 128, 128)}  # rows, context, new tokens of each
BLOCK = 16


def step_of(model: Llama, rows: int, context: int, count: int) -> StepInputs:
    """Every row in blocks of its own."""
    per_row = -(-context // BLOCK)
    tables = (np.arange(rows * per_row, dtype=np.int32) + 1).reshape(rows, per_row)
    starts, counts = np.full(rows, context - count), np.full(rows, count)
    positions = torch.from_numpy((starts[:, None] + np.arange(count)).reshape(-1))
    given = [StepRows(tables, starts, counts, group.window) for group in model.kv_groups]
    return StepInputs(positions % model.vocab_size, positions, given, BLOCK)


def before(layer: LlamaLayer, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    normed, total = layer.input_norm.add(x, residual)
    qkv, turned = layer.qkv(normed), (layer.heads + layer.kv_heads) * layer.width
    qk = apply_rotary(qkv[:, :turned].view(len(x), -1, layer.width), cos, sin)
    return qk, qkv[:, turned:].view(len(x), layer.kv_heads, layer.width), total


def after(layer: LlamaLayer, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    normed, total = layer.post_norm.add(layer.out(attended.reshape(len(attended), -1)), residual)
    return layer.down(layer._silu_and_mul(layer.gate_up(normed))), total


class Halves:
    """The model's forward pass with both halves of each layer compiled."""

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._before: Callable[..., Any] = torch.compile(before, dynamic=True)
        self._after: Callable[..., Any] = torch.compile(after, dynamic=True)

    def __call__(self, step: StepInputs) -> Tensor:
        model = self._model
        angles, x, residual = model.rotary.at(step.positions), model.embed(step.token_ids), None
        for layer in model.layers:
            qk, value, residual = self._before(layer, x, residual, *angles)
            attended = layer.attention(qk[:, : layer.heads], qk[:, layer.heads :], value, step)
            x, residual = self._after(layer, attended, residual)
        return model.norm.add(x, residual)[0]


class Operations:
    """The model's forward pass with each operation compiled; ``on`` and ``off`` put them in their places."""

    def __init__(self, model: Llama) -> None:
        self._model, self._own = model, model.layers[0].input_norm._kernels
        compiled = {
            "rms_norm": torch.compile(norm.rms_norm, dynamic=True),
            "add_rms_norm": torch.compile(norm.add_rms_norm, dynamic=True),
            "silu_and_mul": torch.compile(self._own.silu_and_mul, dynamic=True),
        }
        self._compiled = replace(self._own, **compiled)
        self._rotate = torch.compile(apply_rotary, dynamic=True)

    def put(self, *, compiled: bool) -> None:
        kernels = self._compiled if compiled else self._own
        for layer in self._model.layers:
            layer.input_norm._kernels = layer.post_norm._kernels = kernels
            layer._silu_and_mul = kernels.silu_and_mul
        attention.apply_rotary = self._rotate if compiled else apply_rotary

    def __call__(self, step: StepInputs) -> Tensor:
        self.put(compiled=True)
        try:
            return self._model.forward(step)
        finally:
            self.put(compiled=False)


@torch.inference_mode()
def compare(report: Report, dtype: str, rounds: int) -> None:
    config = ExecutorConfig(kernels="reference", device="cpu", dtype=dtype, max_model_len=512)
    executor = InProcessExecutor(smollm2(), config)
    model: Any = executor.model
    for one in model.attentions:
        one.bind(16 * 16 + 1, BLOCK, executor.dtype, executor.device)
    sides = {"plain": model.forward, "operations": Operations(model), "halves": Halves(model)}
    for name, sizes in STEPS.items():
        step = step_of(model, *sizes)
        for call in sides.values():
            call(step)  # compiles
        calls = {side: lambda call=call, s=step: seconds(lambda: call(s)) for side, call in sides.items()}
        middle = {side: median(values) for side, values in interleaved(calls, rounds).items()}
        for side, value in middle.items():
            report.figure(f"{dtype}_{name}_{side}_ms", value * 1e3)
        best = min(middle["operations"], middle["halves"])
        report.target(f"{dtype}, {name}: times as fast, compiled", middle["plain"] / best, ">=", 1.05)
    executor.stop()


def main() -> None:
    options = arguments(__doc__).parse_args()
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise SystemExit("there is no C++ compiler here: torch.compile has nothing to compile with")
    report = Report()
    torch._dynamo.config.recompile_limit = 64
    for dtype in ("float32", "bfloat16"):
        compare(report, dtype, 5 if options.quick else 25)
    report.finish(as_json=options.json)


if __name__ == "__main__":
    main()
