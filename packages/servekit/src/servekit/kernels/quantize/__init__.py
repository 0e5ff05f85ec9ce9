"""Activations to eight bits, with a scale for each token or for each group of a token's columns."""

from servekit.kernels.quantize.reference import LARGEST, quantize

__all__ = ["LARGEST", "quantize"]
