"""Loggers: where metrics go."""

from trainkit.loggers.base import Logger
from trainkit.loggers.console import ConsoleLogger
from trainkit.loggers.csv import CSVLogger
from trainkit.loggers.mlflow import MLFlowLogger
from trainkit.loggers.tensorboard import TensorBoardLogger
from trainkit.loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "ConsoleLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]
