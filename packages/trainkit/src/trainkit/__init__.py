"""trainkit: train a model. One ``TrainModule`` and one ``Trainer``, from a laptop's CPU on.

The names of Lightning are here too, so that ``import trainkit as L`` is what a script needs to change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trainkit import callbacks, loggers, plugins, pytorch, tuner
    from trainkit.callbacks.base import Callback
    from trainkit.data.module import DataModule
    from trainkit.data.seed import seed_everything
    from trainkit.module import TrainModule
    from trainkit.runtime import Runtime
    from trainkit.trainer import Trainer

    LightningDataModule = DataModule
    LightningModule = TrainModule

_PUBLIC = {
    "Callback": "trainkit.callbacks.base:Callback",
    "DataModule": "trainkit.data.module:DataModule",
    "LightningDataModule": "trainkit.data.module:DataModule",
    "LightningModule": "trainkit.module:TrainModule",
    "Runtime": "trainkit.runtime:Runtime",
    "TrainModule": "trainkit.module:TrainModule",
    "Trainer": "trainkit.trainer:Trainer",
    "callbacks": "trainkit.callbacks:",
    "loggers": "trainkit.loggers:",
    "plugins": "trainkit.plugins:",
    "pytorch": "trainkit.pytorch:",
    "seed_everything": "trainkit.data.seed:seed_everything",
    "tuner": "trainkit.tuner:",
}
__all__ = [
    "Callback",
    "DataModule",
    "LightningDataModule",
    "LightningModule",
    "Runtime",
    "TrainModule",
    "Trainer",
    "__version__",
    "callbacks",
    "loggers",
    "plugins",
    "pytorch",
    "seed_everything",
    "tuner",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trainkit' has no attribute {name!r}; there are {', '.join(sorted(_PUBLIC))}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found
