"""trainkit: train a model. One ``TrainModule`` and one ``Trainer``, from a laptop's CPU on."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trainkit.callbacks.base import Callback
    from trainkit.data.seed import seed_everything
    from trainkit.module import TrainModule
    from trainkit.trainer import Trainer

_PUBLIC = {
    "Callback": "trainkit.callbacks.base",
    "TrainModule": "trainkit.module",
    "Trainer": "trainkit.trainer",
    "seed_everything": "trainkit.data.seed",
}
__all__ = ["Callback", "TrainModule", "Trainer", "__version__", "seed_everything"]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trainkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
