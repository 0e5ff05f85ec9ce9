"""The whole model on every rank; gradients are averaged while backward runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common_platform.errors import ConfigError
from common_platform.platforms import detect
from trainkit.strategies import process_group
from trainkit.strategies.base import Strategy
from trainkit.strategies.launch import end_with_status, is_launched, start_ranks, watch_parent
from trainkit.strategies.sync_batchnorm import synchronize


class DDPStrategy(Strategy):
    """One process a device, each with the whole module; torch's ``DistributedDataParallel`` averages gradients.

    Args:
        process_group_backend: default: the platform's own, with Gloo for what is on the CPU.
        timeout: of a collective; a lost rank is noticed no later.
        rendezvous_timeout: for all ranks to arrive.
        settings: of ``DistributedDataParallel``, such as ``find_unused_parameters``.
    """

    name = "ddp"

    def __init__(
        self,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(seconds=600),
        rendezvous_timeout: timedelta = timedelta(seconds=300),
        **settings: Any,
    ) -> None:
        self._backend = process_group_backend
        self._timeout, self._rendezvous_timeout = timeout, rendezvous_timeout
        self._settings = settings
        self._module: nn.Module = nn.Identity()
        self._wrapped: nn.Module | None = None
        self._undo_batchnorm: Callable[[], None] | None = None
        self._syncs = True
        self.device = torch.device("cpu")

    def use(self, device_type: str, devices: list[int]) -> None:
        """Which devices of this machine are its ranks'."""
        self._count = len(devices)
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", str(self._count)))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", str(self._count)))
        if is_launched() and here != self._count:
            raise ConfigError("devices", self._count, f"{here}, as many as this machine's ranks, or auto")
        self.num_nodes = max(self.world_size // here, 1)
        self.node_rank = int(os.environ.get("GROUP_RANK", str(self.rank // here)))
        self.device = torch.device(device_type)
        if device_type in ("cuda", "xpu"):
            self.device = torch.device(device_type, devices[self.local_rank])

    def launch(self) -> None:
        if self.world_size == 1:
            return
        if not is_launched():
            start_ranks(self._count)
        watch_parent()
        try:
            process_group.join_group(self._backend_for_device(), self._rendezvous_timeout, self._timeout)
        finally:
            end_with_status()

    def _backend_for_device(self) -> str:
        if self._backend is not None:
            return self._backend
        kind = self.device.type
        return "gloo" if kind in ("cpu", "mps") else f"cpu:gloo,{kind}:{detect(kind).collective_backend}"

    @property
    def module(self) -> nn.Module:
        return self._module

    def setup(self, module: nn.Module, *, trains: bool) -> nn.Module:
        self.teardown()
        self._module = module.to(self.device)
        if self.world_size == 1 or not trains:
            return self._module
        if self.syncs_batchnorm:
            self._undo_batchnorm = synchronize(module)
        if getattr(module, "automatic_optimization", True):
            self._wrapped = DistributedDataParallel(_Steps(module), **self._settings)
            return self._wrapped
        for tensor in [*module.parameters(), *module.buffers()]:
            torch.distributed.broadcast(tensor.detach(), 0)
        return self._module

    def teardown(self) -> None:
        self._wrapped = None
        if self._undo_batchnorm is not None:
            self._undo_batchnorm()
            self._undo_batchnorm = None

    def wrap(self, module: nn.Module) -> nn.Module:
        placed = module.to(self.device)
        return placed if self.world_size == 1 else DistributedDataParallel(placed, **self._settings)

    def training_step(self, *arguments: Any) -> Any:
        if self._wrapped is None:
            return super().training_step(*arguments)
        found = self._wrapped("training_step", *arguments)
        process_group.advance()  # to the averages of its gradients
        return found

    def gradient_sync(self, enabled: bool) -> AbstractContextManager[Any]:
        if self.world_size == 1 or enabled:
            return nullcontext()
        return self._wrapped.no_sync() if isinstance(self._wrapped, DistributedDataParallel) else self._no_sync()

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        self._syncs = False
        try:
            yield
        finally:
            self._syncs = True

    def after_manual_backward(self) -> None:
        if self.world_size > 1 and self._syncs:
            process_group.average_gradients(list(self._module.parameters()))

    # --- between ranks ---

    def reduce(self, value: Tensor, how: str = "mean") -> Tensor:
        return value if self.world_size == 1 else process_group.reduce(value, how)

    def all_gather(self, data: Any) -> Any:
        return data if self.world_size == 1 else process_group.all_gather(data)

    def gather_plain(self, value: Any) -> list[Any]:
        return [value] if self.world_size == 1 else process_group.gather_plain(value)

    def broadcast_plain(self, value: Any) -> Any:
        return value if self.world_size == 1 else process_group.broadcast_plain(value)

    def barrier(self, name: str = "") -> None:
        if self.world_size > 1:
            process_group.barrier(name)

    def report(self, error: BaseException) -> None:
        if self.world_size > 1 and isinstance(error, Exception):
            process_group.report(error)

    def explained(self, error: BaseException) -> BaseException:
        return error if self.world_size == 1 else process_group.explained(error) or error


class _Steps(nn.Module):
    """The module's steps as a forward, which is where DDP looks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, step: str, *arguments: Any) -> Any:
        return getattr(self.module, step)(*arguments)
