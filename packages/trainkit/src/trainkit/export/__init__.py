"""Exports: models that leave trainkit."""

from trainkit.export.handoff import handoff

__all__ = ["handoff"]
