"""Pairs of a token and an expert, put in order of the experts, each expert's to whole tiles of rows."""

from servekit.kernels.moe_align.alignment import Alignment
from servekit.kernels.moe_align.reference import align

__all__ = ["Alignment", "align"]
