"""Data: seeds, data modules, and loaders that can resume in the middle of an epoch."""

from trainkit.data.combined import CombinedLoader, resumable
from trainkit.data.module import DataModule
from trainkit.data.resumable import Resumable, TrainLoader
from trainkit.data.seed import rng_state, seed_everything, set_rng_state
from trainkit.data.sharded import ShardedIterable
from trainkit.data.workers import measured_num_workers, suggested_num_workers

__all__ = [
    "CombinedLoader",
    "DataModule",
    "Resumable",
    "ShardedIterable",
    "TrainLoader",
    "measured_num_workers",
    "resumable",
    "rng_state",
    "seed_everything",
    "set_rng_state",
    "suggested_num_workers",
]
