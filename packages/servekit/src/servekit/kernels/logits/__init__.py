"""What requests ask of their logits before a token is drawn: penalties, masks and biases."""

from servekit.kernels.logits.reference import add_bias, mask, penalise

__all__ = ["add_bias", "mask", "penalise"]
