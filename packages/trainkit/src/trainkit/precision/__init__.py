"""The numbers that a module computes with."""

from trainkit.precision.choose import PRECISIONS, make_precision
from trainkit.precision.fp8 import FP8Precision
from trainkit.precision.plugins import Precision

__all__ = ["PRECISIONS", "FP8Precision", "Precision", "make_precision"]
