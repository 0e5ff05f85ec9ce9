"""The low door: devices, ranks, precision and checkpoints for people who keep their own loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common_platform.errors import CheckpointError, ConfigError
from trainkit import checkpoint
from trainkit.checkpoint import load_weights
from trainkit.data.loaders import for_rank
from trainkit.data.seed import seed_everything
from trainkit.loggers import Logger
from trainkit.loop.optimization import parameters_of
from trainkit.move import to_device
from trainkit.optimizers import ManagedOptimizer
from trainkit.precision import make_precision
from trainkit.strategies import Strategy, make_strategy
from trainkit.strategies.rank_facts import RankFacts


class Runtime(RankFacts):
    """What a training loop of one's own needs from the machine. Use it like Lightning's Fabric::

        runtime = Runtime(devices=2, precision="bf16-mixed")
        runtime.launch()
        model, optimizer = runtime.setup(model, optimizer)
        loader = runtime.setup_dataloaders(loader)
        for x, y in loader:
            optimizer.zero_grad()
            runtime.backward(loss(model(x), y))
            optimizer.step()

    Args:
        accelerator, strategy, devices, precision: as the Trainer's.
        loggers: for ``log``.

    Raises:
        ConfigError: an argument is out of its range.
        DeviceError: a device that was asked for is not there.
    """

    def __init__(
        self,
        *,
        accelerator: str = "auto",
        strategy: str | Strategy = "auto",
        devices: list[int] | str | int = "auto",
        precision: str | int | None = None,
        loggers: Logger | Iterable[Logger] | None = None,
    ) -> None:
        self.strategy = make_strategy(strategy, accelerator, devices)
        self.precision_plugin = make_precision(precision, self.strategy.device)
        self.loggers = [loggers] if isinstance(loggers, Logger) else list(loggers or [])
        self._launched = False

    # --- ranks ---

    def launch(self, function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Start the other ranks, if there are any; then call ``function(runtime, ...)``, if there is one."""
        self.strategy.launch()
        self._launched = True
        return None if function is None else function(self, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.strategy.device

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def barrier(self, name: str = "") -> None:
        self.strategy.barrier(name)

    def broadcast(self, value: Any) -> Any:
        """The first rank's ``value``, plain data as JSON has it."""
        return self.strategy.broadcast_plain(value)

    def all_gather(self, data: Any) -> Any:
        """Tensors of all ranks: each ``[...]`` becomes ``[ranks, ...]`` where there are several."""
        return self.strategy.all_gather(data)

    def all_reduce(self, value: Tensor, reduce_op: str = "mean") -> Tensor:
        """``value`` of all ranks as one: "mean", "sum", "min" or "max"."""
        return self.strategy.reduce(value, reduce_op)

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool = False) -> int:
        return seed_everything(seed, workers)

    # --- the parts of a loop ---

    def setup(self, module: nn.Module, *optimizers: Optimizer) -> Any:
        """``module`` on its device, in its precision and on all ranks; and the optimizers whose ``step`` fits to it.

        Returns:
            The module, or a tuple of the module and the optimizers.

        Raises:
            ConfigError: ``launch`` was not called where there are several ranks.
        """
        if self.world_size > 1 and not self._launched:
            raise ConfigError("Runtime", f"{self.world_size} ranks, not launched", "a call of launch() before setup()")
        module = self.precision_plugin.convert(module)
        wrapped = RuntimeModule(self, module, self.strategy.wrap(module))
        managed = [ManagedOptimizer(optimizer, self._step, None) for optimizer in optimizers]
        return (wrapped, *managed) if managed else wrapped

    def setup_module(self, module: nn.Module) -> RuntimeModule:
        return self.setup(module)

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        managed = [ManagedOptimizer(optimizer, self._step, None) for optimizer in optimizers]
        return managed[0] if len(managed) == 1 else tuple(managed)

    def setup_dataloaders(
        self, *loaders: Any, use_distributed_sampler: bool = True, move_to_device: bool = True
    ) -> Any:
        """Each loader's part for this rank, its batches on the device."""
        made = []
        for loader in loaders:
            if use_distributed_sampler:
                loader = for_rank(loader, self.strategy, training=True)
            made.append(RuntimeLoader(loader, self.device if move_to_device else None))
        return made[0] if len(made) == 1 else made

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of forward, for what is computed outside of a module."""
        return self.precision_plugin.context(self.device)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Compute gradients; scaled where the precision needs it.

        Raises:
            RankLost: another rank did not come to average them.
        """
        try:
            self.precision_plugin.scaled(loss).backward(**kwargs)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise self.strategy.explained(error)  # noqa: B904 - which is itself, or has its cause

    @contextlib.contextmanager
    def no_backward_sync(self, module: RuntimeModule, enabled: bool = True) -> Iterator[None]:
        """Gradients are not averaged over ranks in the block, while they are accumulated."""
        no_sync = getattr(module.wrapped, "no_sync", None)
        with no_sync() if enabled and no_sync is not None else contextlib.nullcontext():
            yield

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Any,
        clip_val: float | None = None,
        max_norm: float | None = None,
    ) -> None:
        """Clip the gradients of ``optimizer`` by value or by norm, before its step.

        Raises:
            ConfigError: both or none are given, or gradients are still scaled.
        """
        if (clip_val is None) == (max_norm is None):
            raise ConfigError("clip_gradients", f"clip_val={clip_val}, max_norm={max_norm}", "one of the two")
        self.precision_plugin.unscale(getattr(optimizer, "optimizer", optimizer))
        self.strategy.clip_gradients(parameters_of(optimizer), max_norm=max_norm, max_value=clip_val)

    def _step(self, optimizer: Optimizer, closure: Any, **kwargs: Any) -> None:
        self.precision_plugin.step(optimizer, closure or (lambda: None), lambda _: None, **kwargs)

    def to_device(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, nn.Module) else to_device(value, self.device)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """A row for the loggers, of the first rank."""
        if self.is_global_zero:
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in metrics.items()}, step or 0)

    # --- checkpoints ---

    def save(self, path: str | Path, state: Mapping[str, Any]) -> None:
        """Write modules, optimizers, schedulers and plain values of ``state``; every rank must call it.

        Raises:
            CheckpointWriteError: it could not be written; what stood there is whole.
            CheckpointError: ``state`` holds something that cannot be written.
        """
        weights: dict[str, Tensor] = {}
        rest: dict[str, Any] = {"precision": self.precision_plugin.state_dict(), "modules": []}
        for name, value in state.items():
            if isinstance(value, nn.Module):
                rest["modules"].append(name)
                weights |= {f"{name}.{key}": tensor for key, tensor in _inner(value).state_dict().items()}
            else:
                rest[f"state.{name}"] = value.state_dict() if hasattr(value, "state_dict") else value
        if self.is_global_zero:
            checkpoint.save(path, weights, rest)
        self.barrier("save")

    def load(self, path: str | Path, state: dict[str, Any] | None = None, strict: bool = True) -> dict[str, Any]:
        """Put what ``save`` wrote back into the objects of ``state``; plain values are replaced in it.

        Args:
            strict: whether all of ``state`` must be in the checkpoint.

        Returns:
            What is in the checkpoint and not in ``state``.
        """
        weights, rest = checkpoint.load(path)
        self.precision_plugin.load_state_dict(rest["precision"])
        saved = {name.removeprefix("state."): value for name, value in rest.items() if name.startswith("state.")}
        for name in rest["modules"]:
            saved[name] = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
        for name, value in (state or {}).items():
            if name not in saved:
                if strict:
                    raise CheckpointError("state", name, f"one of {sorted(saved)}, or strict=False")
                continue
            found = saved.pop(name)
            if isinstance(value, nn.Module):
                load_weights(_inner(value), found, strict=strict)
            elif hasattr(value, "load_state_dict"):
                value.load_state_dict(found)
            elif state is not None:
                state[name] = found
        return saved


class RuntimeModule(nn.Module):
    """A module whose forward runs in the runtime's precision and on all its ranks; its attributes are the module's."""

    def __init__(self, runtime: Runtime, module: nn.Module, wrapped: nn.Module) -> None:
        super().__init__()
        self._runtime = runtime
        self.module = module
        self.__dict__["wrapped"] = wrapped  # not a second child

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plugin = self._runtime.precision_plugin
        args, kwargs = plugin.convert_input(args), plugin.convert_input(kwargs)
        with self._runtime.autocast():
            return self.wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)


class RuntimeLoader:
    """A loader whose batches come on the device, and whose order changes from epoch to epoch on all ranks alike."""

    def __init__(self, loader: Any, device: torch.device | None) -> None:
        self.loader, self._device = loader, device
        self._epoch = 0

    def __iter__(self) -> Iterator[Any]:
        sampler = getattr(self.loader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self._epoch)
        self._epoch += 1
        for batch in self.loader:
            yield batch if self._device is None else to_device(batch, self._device)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


def _inner(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, RuntimeModule) else module
