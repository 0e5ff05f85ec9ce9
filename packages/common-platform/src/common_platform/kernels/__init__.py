"""Triton kernels as data: how each is compiled, for which devices, and what it should cost."""

from common_platform.kernels.compilations import compilations
from common_platform.kernels.discovery import specializations_of, works_of
from common_platform.kernels.specialization import NVIDIA_FP8, TARGETS, Specialization, Target, Work
from common_platform.kernels.where import is_interpreted, runs_triton

__all__ = [
    "NVIDIA_FP8",
    "TARGETS",
    "Specialization",
    "Target",
    "Work",
    "compilations",
    "is_interpreted",
    "runs_triton",
    "specializations_of",
    "works_of",
]
