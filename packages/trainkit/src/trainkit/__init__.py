"""Train a model: one module and one Trainer, from a laptop CPU to many nodes."""

__version__ = "0.1.0"
