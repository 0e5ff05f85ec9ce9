"""Probes: the proof that the model which arrived is the model that left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from common_platform.artifact.manifest import Probe
from common_platform.errors import ArtifactDigestMismatch


def check_probes(probes: Sequence[Probe], score: Callable[[list[int]], Sequence[float]], *, tolerance: float) -> float:
    """Compare each probe with what ``score`` computes now.

    Args:
        score: token ids -> the logprob of each token after the first, given those before it.
        tolerance: the largest difference of a logprob, in nats.

    Returns:
        The largest difference found; 0.0 without probes.

    Raises:
        ArtifactDigestMismatch: a logprob differs by more, or is not a number; the probe is named.
    """
    largest = 0.0
    for index, probe in enumerate(probes):
        computed = score(list(probe.token_ids))
        for position, (was, now) in enumerate(zip(probe.logprobs, computed, strict=True)):
            difference = abs(was - now)
            if math.isnan(difference) or difference > tolerance:
                raise ArtifactDigestMismatch(
                    f"probes[{index}].logprobs[{position}]",
                    f"{now:.6f}, a difference of {difference:.3g}",
                    f"{was:.6f} +- {tolerance:g}, as at training",
                )
            largest = max(largest, difference)
    return largest
