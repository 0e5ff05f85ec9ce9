"""Data: seeds, and loaders that can resume in the middle of an epoch."""

from trainkit.data.sampler import ResumableSampler, TrainLoader
from trainkit.data.seed import rng_state, seed_everything, set_rng_state

__all__ = ["ResumableSampler", "TrainLoader", "rng_state", "seed_everything", "set_rng_state"]
