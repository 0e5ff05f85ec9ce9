"""What the scheduler counts: gauges of now, counters since the start."""

from __future__ import annotations

import msgspec


class SchedulerStats(msgspec.Struct, kw_only=True):
    """Gauges: requests and the share of KV blocks held. Counters: everything else, in the unit of its name."""

    num_running: int = 0
    num_waiting: int = 0
    num_held: int = 0  # for a grammar, media, remote KV, or a sibling's prompt
    kv_usage: float = 0.0  # 0..1
    steps: int = 0
    computed_tokens: int = 0  # prompt and output, those computed again after a preemption included
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    offload_hit_tokens: int = 0  # of them loaded from the offload tier
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    finished: dict[str, int] = {}  # finish reason -> requests

    def count_finished(self, reason: str) -> None:
        self.finished[reason] = self.finished.get(reason, 0) + 1

    def copy(self) -> SchedulerStats:
        return msgspec.structs.replace(self, finished=dict(self.finished))
