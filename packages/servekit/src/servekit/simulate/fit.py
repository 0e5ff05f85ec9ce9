"""From measured steps to a cost model: least squares of relative errors, no coefficient below zero."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from statistics import median

import msgspec
import numpy as np
from numpy.typing import NDArray

from common_platform.errors import ConfigError
from servekit.simulate.cost import CostModel
from servekit.simulate.profile import MeasuredStep

Matrix = NDArray[np.float64]


class Fit(msgspec.Struct, frozen=True):
    """A cost model, and how far it is from what was measured: |predicted - measured| / measured, a shape each."""

    cost: CostModel
    shapes: int
    median_error: float
    p95_error: float


def fit(steps: Sequence[MeasuredStep]) -> Fit:
    """The cost model nearest to ``steps``, of which those of one shape count once, with their median.

    Cost: one small least-squares problem for each set of coefficients, 31 in all, so the best one is found for certain.

    Raises:
        ConfigError: no steps.
    """
    if not steps:
        raise ConfigError("profile", "no steps", "at least one measured step")
    times = defaultdict(list)
    for step in steps:
        times[step.shape].append(step.seconds)
    shapes = np.array([(1, *shape) for shape in times], dtype=np.float64)  # [shapes, coefficients]
    seconds = np.array([median(measured) for measured in times.values()])
    relative = shapes / seconds[:, None]
    coefficients = _non_negative(relative)
    errors = np.abs(relative @ coefficients - 1.0)
    cost = CostModel(**dict(zip(CostModel.__struct_fields__, coefficients.tolist(), strict=True)))
    return Fit(cost, len(times), float(np.median(errors)), float(np.quantile(errors, 0.95)))


def _non_negative(columns: Matrix) -> Matrix:
    """``x`` of 0 or more that minimizes |columns @ x - 1|; one of the first three is above 0.

    The optimum is the plain least-squares answer on the columns where it is not 0, so trying every set finds it.
    """
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0
    best, least = np.zeros(columns.shape[1]), np.inf
    for size in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), size)):
            part = columns[:, chosen] / scale[chosen]
            found, _, rank, _ = np.linalg.lstsq(part, np.ones(len(columns)), rcond=None)
            if rank < size or (found < 0).any() or not (found[[i for i, c in enumerate(chosen) if c < 3]] > 0).any():
                continue
            error = float(np.square(part @ found - 1.0).sum())
            if error < least * (1 - 1e-9):
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = found / scale[chosen]
    return best
