"""How often, and how fast, an engine that died is started again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from common_platform.errors import ConfigError

FIRST_DELAY_S, LONGEST_DELAY_S = 0.05, 5.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """At most ``max_restarts`` within ``window_s`` seconds; 0: none."""

    max_restarts: int = 3
    window_s: float = 600.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ConfigError("max_engine_restarts", self.max_restarts, "0 or more", flag="--max-engine-restarts")


class Restarts:
    """The starts of late: each soon after another waits twice as long as the one before."""

    def __init__(self, policy: RestartPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._recent: deque[float] = deque()

    def next_delay_s(self) -> float | None:
        """How long to wait before the next start, which counts from here on; None where there were too many."""
        now = self._clock()
        while self._recent and now - self._recent[0] > self._policy.window_s:
            self._recent.popleft()
        if len(self._recent) >= self._policy.max_restarts:
            return None
        soon = sum(now - at < 2 * LONGEST_DELAY_S for at in self._recent)  # of a row that does not help
        self._recent.append(now)
        return min(FIRST_DELAY_S * 2**soon, LONGEST_DELAY_S) if soon else 0.0
