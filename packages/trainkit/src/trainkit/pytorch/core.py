"""By the path that Lightning has for it."""

from trainkit.data.module import DataModule as LightningDataModule
from trainkit.module import TrainModule as LightningModule

__all__ = ["LightningDataModule", "LightningModule"]
