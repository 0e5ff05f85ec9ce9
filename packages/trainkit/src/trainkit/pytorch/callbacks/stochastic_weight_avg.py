"""By the path that Lightning has for it."""

from trainkit.callbacks import StochasticWeightAveraging

__all__ = ["StochasticWeightAveraging"]
