"""Data: seeds, data modules, and loaders that can resume in the middle of an epoch."""

from trainkit.data.loaders import TrainLoader
from trainkit.data.module import DataModule
from trainkit.data.seed import rng_state, seed_everything, set_rng_state

__all__ = ["DataModule", "TrainLoader", "rng_state", "seed_everything", "set_rng_state"]
