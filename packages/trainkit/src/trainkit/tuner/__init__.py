"""Finding a learning rate, a batch size and a number of loader workers before training."""

from trainkit.tuner.tuner import Tuner

__all__ = ["Tuner"]
