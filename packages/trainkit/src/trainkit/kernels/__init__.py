"""Operations of a training step with more than one implementation: one folder an operation, torch's beside Triton's."""

from trainkit.kernels.adamw import FusedAdamW
from trainkit.kernels.linear_cross_entropy import linear_cross_entropy
from trainkit.kernels.rms_norm import rms_norm
from trainkit.kernels.rope import rope
from trainkit.kernels.swiglu import swiglu

__all__ = ["FusedAdamW", "linear_cross_entropy", "rms_norm", "rope", "swiglu"]
