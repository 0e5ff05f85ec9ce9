"""Loggers: where metrics go."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from trainkit.loggers.base import Logger
from trainkit.loggers.csv import CSVLogger

if TYPE_CHECKING:
    from trainkit.loggers.console import ConsoleLogger
    from trainkit.loggers.mlflow import MLFlowLogger
    from trainkit.loggers.tensorboard import TensorBoardLogger
    from trainkit.loggers.wandb import WandbLogger

BUILT_IN = {  # name -> where the class is; imported on first use
    "ConsoleLogger": "trainkit.loggers.console:ConsoleLogger",
    "MLFlowLogger": "trainkit.loggers.mlflow:MLFlowLogger",
    "TensorBoardLogger": "trainkit.loggers.tensorboard:TensorBoardLogger",
    "WandbLogger": "trainkit.loggers.wandb:WandbLogger",
}
__all__ = ["CSVLogger", "ConsoleLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]


def __getattr__(name: str) -> Any:
    """Loggers for services are imported when they are first used."""
    if name not in BUILT_IN:
        raise AttributeError(f"module 'trainkit.loggers' has no attribute {name!r}; there are {', '.join(__all__)}")
    return resolve_name(BUILT_IN[name])
