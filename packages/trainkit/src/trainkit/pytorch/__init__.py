"""The module paths of Lightning: ``L.pytorch.callbacks`` and the like are ours by another name."""

from trainkit.callbacks.base import Callback
from trainkit.data.module import DataModule as LightningDataModule
from trainkit.data.seed import seed_everything
from trainkit.module import TrainModule as LightningModule
from trainkit.pytorch import callbacks, core, loggers, plugins, profilers, strategies, trainer, tuner, utilities
from trainkit.trainer import Trainer

__all__ = [
    "Callback",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "callbacks",
    "core",
    "loggers",
    "plugins",
    "profilers",
    "seed_everything",
    "strategies",
    "trainer",
    "tuner",
    "utilities",
]
