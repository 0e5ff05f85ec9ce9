"""How a module is spread over devices: few verbs, and the Trainer never asks which strategy it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from trainkit.checkpoint import load_weights


class Strategy(ABC):
    """One module on one or many devices. What is here is right for one rank."""

    name: str = "custom"
    device: torch.device
    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    num_nodes: int = 1
    world_size: int = 1
    syncs_batchnorm: bool = False  # whether batch norms count the batches of all ranks in training

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def launch(self) -> None:
        """Start the other ranks, if there are any, and find them."""

    @abstractmethod
    def setup(self, module: nn.Module, *, trains: bool) -> nn.Module:
        """Put ``module`` where it belongs; what is returned is what runs."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """``module`` where it belongs, for a loop of the user's own: what is returned is called."""
        return module.to(self.device)

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The user's module."""

    def training_step(self, *arguments: Any) -> Any:
        return self.module.training_step(*arguments)  # type: ignore[operator]

    def evaluation_step(self, name: str, *arguments: Any) -> Any:
        return getattr(self.module, name)(*arguments)

    def gradient_sync(self, enabled: bool) -> AbstractContextManager[Any]:
        """Around forward and backward: whether gradients are averaged over ranks in it."""
        return nullcontext()

    def after_manual_backward(self) -> None:
        """Average the gradients that the user's own backward made."""

    def clip_gradients(self, parameters: Iterable[Tensor], *, max_norm: float | None, max_value: float | None) -> None:
        """Clip in place by total norm or by value."""
        if max_value is not None:
            clip_grad_value_(parameters, max_value)
        elif max_norm is not None:
            clip_grad_norm_(parameters, max_norm)

    # --- between ranks ---

    def reduce(self, value: Tensor, how: str = "mean") -> Tensor:
        """``value`` of all ranks as one: "mean", "sum", "min" or "max"."""
        return value

    def all_gather(self, data: Any) -> Any:
        """Tensors of all ranks: each ``[...]`` becomes ``[ranks, ...]`` where there are several."""
        return data

    def gather_plain(self, value: Any) -> list[Any]:
        """``value``, plain data as JSON has it, of every rank."""
        return [value]

    def broadcast_plain(self, value: Any) -> Any:
        """The first rank's ``value``, plain data as JSON has it."""
        return value

    def barrier(self, name: str = "") -> None:
        """Wait for all ranks."""

    def report(self, error: BaseException) -> None:
        """This rank is going to end by ``error``: let the others know."""

    def explained(self, error: BaseException) -> BaseException:
        """``error``, or what it comes from where another rank is its cause."""
        return error

    def teardown(self) -> None:
        """A stage is over: let go of what ``setup`` made."""

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """The whole module's state."""
        return dict(self.module.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        load_weights(self.module, state, strict=strict)
