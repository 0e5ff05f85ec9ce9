"""A token for each row: drawn from what temperature, top-k, top-p and min-p leave."""

from servekit.kernels.sample.reference import sample

__all__ = ["sample"]
