"""By the path that Lightning has for it."""

from trainkit.callbacks.grad_norm import grad_norm

__all__ = ["grad_norm"]
