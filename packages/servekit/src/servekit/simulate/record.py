"""What is kept of a simulation: when each request did what, and how full its replica was."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from servekit.core.request import RequestUpdate
from servekit.simulate.job import Job

MOST_SAMPLES = 512  # of one replica; then every other is dropped and the interval doubles


@dataclass(slots=True)
class Record:
    """The life of one request; times in seconds from the start, -1 for what never happened."""

    job: Job
    replica: int
    arrival: float
    scheduled: float = -1.0
    first_token: float = -1.0
    finished: float = -1.0
    num_output: int = 0
    num_cached: int = 0  # prompt tokens found in the prefix cache
    num_preemptions: int = 0
    reason: str = ""  # how it ended: length, or refused
    error: str = ""  # why it was refused
    last_token: float = -1.0

    def take(self, update: RequestUpdate) -> None:
        """The news of the scheduler, but for the time of the last token."""
        self.num_output += len(update.token_ids)
        if not update.events:
            return
        self.num_cached = update.num_cached_tokens
        for event in update.events:
            if event.name == "scheduled":
                self.scheduled = event.at
            elif event.name == "first_token":
                self.first_token = event.at
            elif event.name == "preempted":
                self.num_preemptions += 1
        if update.finish_reason is not None:
            self.reason = update.finish_reason
            self.finished = update.events[-1].at


@dataclass(slots=True)
class Sample:
    """A replica at the end of a step."""

    at: float
    kv_usage: float  # share of its blocks held, 0..1
    num_running: int
    num_waiting: int


class Timeline:
    """Samples of one replica, evenly apart in time, never too many."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.next_at = 0.0
        self._interval_s = 0.0

    def add(self, sample: Sample) -> None:
        """To be called with the first step that ends at ``next_at`` or later."""
        self.samples.append(sample)
        if len(self.samples) >= MOST_SAMPLES:
            self.samples = self.samples[::2]
            self._interval_s = max(2 * self._interval_s, 2 * sample.at / MOST_SAMPLES)
        self.next_at = sample.at + self._interval_s


@dataclass(slots=True)
class Gaps:
    """Times between two tokens of one request, each with how often it came."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    counts: array[int] = field(default_factory=lambda: array("q"))

    def add(self, seconds: float, count: int = 1) -> None:
        self.seconds.append(seconds)
        self.counts.append(count)
