"""By the path that Lightning has for it."""

from trainkit.callbacks import BackboneFinetuning, BaseFinetuning

__all__ = ["BackboneFinetuning", "BaseFinetuning"]
