"""Checkpoints: written whole or not at all, verified before they are loaded, and without pickle."""

from trainkit.checkpoint.folder import find_last, load, save

__all__ = ["find_last", "load", "save"]
