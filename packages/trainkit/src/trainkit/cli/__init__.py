"""The command line, from type hints: ``trainkit fit``, and ``LightningCLI`` for scripts of one's own."""

from trainkit.cli.save_config import SaveConfigCallback
from trainkit.cli.train_cli import LightningCLI, TrainCLI

__all__ = ["LightningCLI", "SaveConfigCallback", "TrainCLI"]
