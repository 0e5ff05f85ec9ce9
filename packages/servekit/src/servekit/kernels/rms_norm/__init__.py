"""Root mean square normalisation, with the residual added first where there is one."""

from servekit.kernels.rms_norm.fused import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
