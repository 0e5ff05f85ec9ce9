"""Checkpoints: written whole or not at all, verified before they are loaded, and without pickle."""

from trainkit.checkpoint.folder import find_last, load, load_any, save
from trainkit.checkpoint.weights import load_weights

__all__ = ["find_last", "load", "load_any", "load_weights", "save"]
