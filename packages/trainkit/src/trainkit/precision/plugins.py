"""Precisions: true ones change the dtype of the weights, mixed ones that of operations (Micikevicius et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common_platform.errors import NonFiniteLoss

Closure = Callable[[], Any]
BeforeStep = Callable[[Optimizer], None]


class Precision:
    """Full precision: the module's weights as they are."""

    name = "32-true"
    allows_inference_mode = True  # or evaluations need torch.no_grad

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the operations that take the time."""
        return torch.float32

    def convert(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, batch: Any) -> Any:
        """A batch in the dtype that forward wants."""
        return batch

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around forward."""
        return nullcontext()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss as it goes into backward."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Make gradients true ones before ``step``, to look at or to clip."""

    def step(self, optimizer: Optimizer, closure: Closure, before_step: BeforeStep, **kwargs: Any) -> bool:
        """Run ``closure`` (forward and backward), then ``before_step`` with true gradients, then the optimizer's step.

        Returns:
            False where the step was skipped because gradients had overflowed.
        """

        def closure_and_hooks() -> Any:
            loss = closure()
            before_step(optimizer)
            return loss

        optimizer.step(closure=closure_and_hooks, **kwargs)
        return True

    def refuse_overflow(self, steps: int, at: int) -> None:
        """Raises:
        NonFiniteLoss: ``steps`` steps in a row were skipped, up to step ``at``.
        """
        raise NonFiniteLoss("gradients", "not finite", f"fewer than {steps} skipped steps in a row (step {at})",
                            flag="max_skipped")  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class TruePrecision(Precision):
    """Weights, gradients and operations in one dtype."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self._dtype = dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._dtype

    def convert(self, module: nn.Module) -> nn.Module:
        return module.to(self._dtype)

    def convert_input(self, batch: Any) -> Any:
        return _cast(batch, self._dtype)

    @contextmanager
    def context(self, device: torch.device) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


class MixedPrecision(Precision):
    """float32 weights, operations in ``dtype`` where that is safe."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self._dtype = dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._dtype

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.autocast(device.type, self._dtype)


class ScaledMixedPrecision(MixedPrecision):
    """float16 with its small range: the loss is scaled up, and steps whose gradients overflow are skipped.

    Args:
        scaler: torch's ``GradScaler``; default: one with its defaults.
    """

    def __init__(self, device: torch.device, scaler: torch.amp.GradScaler | None = None) -> None:
        super().__init__("16-mixed", torch.float16)
        self.scaler = scaler or torch.amp.GradScaler(device.type)
        self._unscaled: Optimizer | None = None

    def scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        if optimizer is not self._unscaled:
            self.scaler.unscale_(optimizer)
            self._unscaled = optimizer

    def step(self, optimizer: Optimizer, closure: Closure, before_step: BeforeStep, **kwargs: Any) -> bool:
        closure()
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return True  # the batch was skipped
        before = self.scaler.get_scale()
        if optimizer is not self._unscaled:
            self.scaler.unscale_(optimizer)
        self._unscaled = None
        before_step(optimizer)
        self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return bool(self.scaler.get_scale() >= before)

    def refuse_overflow(self, steps: int, at: int) -> None:
        raise NonFiniteLoss("loss scale", self.scaler.get_scale(), f"fewer than {steps} overflows in a row (step {at})",
                            flag="max_skipped, or use bf16-mixed")  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scaler.load_state_dict(dict(state))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(inner, dtype) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(inner, dtype) for inner in value))
    if isinstance(value, list | tuple):
        return type(value)(_cast(inner, dtype) for inner in value)
    return value
