"""Cross entropy of a linear head whose logits never exist as a whole."""

from trainkit.kernels.linear_cross_entropy.function import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
