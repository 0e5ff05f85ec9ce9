"""Checkpoints: written whole or not at all, verified before they are loaded, and without pickle."""

from trainkit.checkpoint.folder import find_last, load, load_any, newest_first, save
from trainkit.checkpoint.io import AsyncCheckpointIO, CheckpointIO
from trainkit.checkpoint.weights import load_weights

__all__ = [
    "AsyncCheckpointIO", "CheckpointIO", "find_last", "load", "load_any", "load_weights", "newest_first", "save",
]  # fmt: skip
