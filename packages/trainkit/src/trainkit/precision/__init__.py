"""The numbers that a module computes with."""

from trainkit.precision.plugins import PRECISIONS, Precision, make_precision

__all__ = ["PRECISIONS", "Precision", "make_precision"]
