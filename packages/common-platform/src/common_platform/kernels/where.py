"""Whether Triton kernels can run in this process; triton is imported only to interpret."""

from __future__ import annotations

import importlib.util
import os

import torch

from common_platform.kernels.interpreter import mend_interpreter

VARIABLE = "TRITON_INTERPRET"  # read by triton when it is first imported


def is_interpreted() -> bool:
    """Whether kernels run step by step on tensors of the CPU."""
    return os.environ.get(VARIABLE, "").lower() in ("1", "true", "on", "yes")


def runs_triton(device: torch.device) -> str | None:
    """Why kernels cannot run on tensors of ``device``; None where they can, and then the interpreter is ready."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu" and not is_interpreted():
        return f"the device is cpu, and {VARIABLE}=1 was not set before the start"
    if device.type == "cpu":
        mend_interpreter()
    if device.type not in ("cpu", "cuda", "xpu"):
        return f"the device is {device.type}"
    return None
