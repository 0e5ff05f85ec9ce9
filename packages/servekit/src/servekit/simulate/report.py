"""What a simulation says: rates, latencies, hits, balance and the use of memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from servekit.simulate.files import write_json
from servekit.simulate.record import Record, Sample
from servekit.simulate.replica import Replica
from servekit.simulate.simulation import Outcome

QUANTILES = (0.5, 0.9, 0.95, 0.99)
POINTS_OF_USE = 200  # of the curve of memory over time


class Latency(msgspec.Struct, frozen=True):
    """A distribution, in seconds: a quantile is the least value that so many of all do not exceed."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class ReplicaReport(msgspec.Struct, frozen=True):
    """One replica's share."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    steps: int
    busy_share: float  # of the whole time, 0..1
    mean_kv_usage: float  # over the whole time, 0..1
    peak_kv_usage: float
    preemptions: int
    prefix_hit_rate: float  # of prompt tokens, 0..1


class UsePoint(msgspec.Struct, frozen=True):
    """All replicas at one time."""

    at_s: float
    kv_usage: float  # mean over replicas, 0..1
    running: int
    waiting: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a simulation. Rates are over ``duration_s``, from 0 to the end of the last request."""

    requests: int
    finished: int
    refused: int
    duration_s: float
    prompt_tokens: int  # of finished requests, as all that follow
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    tokens_per_s: float  # prompt and output
    ttft_s: Latency | None  # None: nothing to measure
    itl_s: Latency | None  # between two tokens of a request
    e2e_s: Latency | None
    queue_s: Latency | None  # from arrival to the first step
    prefix_hit_rate: float
    preemptions: int
    computed_tokens: int  # by the device, those computed again included
    imbalance: float  # the most tokens that a replica had, over the mean; 1: even
    first_refusal: str
    replicas: list[ReplicaReport]
    kv_over_time: list[UsePoint]

    @classmethod
    def of(cls, outcome: Outcome) -> Report:
        done = [record for record in outcome.records if record.reason != "refused"]
        refusals = [record.error for record in outcome.records if record.reason == "refused"]
        duration = max((record.finished for record in outcome.records), default=0.0)
        prompt = sum(record.job.num_prompt for record in done)
        output = sum(record.num_output for record in done)
        replicas = _replica_reports(outcome, done, duration)
        loads = [replica.prompt_tokens + replica.output_tokens for replica in replicas]
        return cls(
            requests=len(outcome.records),
            finished=len(done),
            refused=len(refusals),
            duration_s=duration,
            prompt_tokens=prompt,
            output_tokens=output,
            requests_per_s=_ratio(len(done), duration),
            output_tokens_per_s=_ratio(output, duration),
            tokens_per_s=_ratio(prompt + output, duration),
            ttft_s=latency([record.first_token - record.arrival for record in done]),
            itl_s=_gaps(outcome.replicas),
            e2e_s=latency([record.finished - record.arrival for record in done]),
            queue_s=latency([record.scheduled - record.arrival for record in done]),
            prefix_hit_rate=_ratio(sum(record.num_cached for record in done), prompt),
            preemptions=sum(record.num_preemptions for record in done),
            computed_tokens=sum(replica.computed_tokens for replica in outcome.replicas),
            imbalance=_ratio(max(loads) * len(loads), sum(loads)),
            first_refusal=refusals[0] if refusals else "",
            replicas=replicas,
            kv_over_time=_use_over_time(outcome.replicas, duration),
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            ResourceError: the file cannot be written.
        """
        write_json(self, path, "json", flag="--json")


def latency(seconds: Sequence[float], counts: Sequence[int] | None = None) -> Latency | None:
    """The distribution of ``seconds``, each as often as ``counts`` says; None of nothing."""
    if not len(seconds):
        return None
    values = np.asarray(seconds, dtype=np.float64)
    weights = np.ones(len(values), dtype=np.int64) if counts is None else np.asarray(counts, dtype=np.int64)
    order = np.argsort(values, kind="stable")
    values, up_to = values[order], np.cumsum(weights[order])
    total = int(up_to[-1])
    places = np.searchsorted(up_to, [np.ceil(quantile * total) for quantile in QUANTILES])
    p50, p90, p95, p99 = (float(values[place]) for place in places)
    mean = float(values @ weights[order]) / total
    return Latency(mean=mean, p50=p50, p90=p90, p95=p95, p99=p99, max=float(values[-1]))


def _gaps(replicas: Sequence[Replica]) -> Latency | None:
    seconds = [np.frombuffer(r.gaps.seconds, dtype=np.float64) for r in replicas if len(r.gaps.seconds)]
    counts = [np.frombuffer(r.gaps.counts, dtype=np.int64) for r in replicas if len(r.gaps.counts)]
    return latency(np.concatenate(seconds), np.concatenate(counts)) if seconds else None  # type: ignore[arg-type]


def _replica_reports(outcome: Outcome, done: Sequence[Record], duration: float) -> list[ReplicaReport]:
    theirs: list[list[Record]] = [[] for _ in outcome.replicas]
    for record in done:
        theirs[record.replica].append(record)
    usable = outcome.config.cache.usable_blocks
    reports = []
    for replica, records in zip(outcome.replicas, theirs, strict=True):
        prompt = sum(record.job.num_prompt for record in records)
        reports.append(
            ReplicaReport(
                requests=len(records),
                prompt_tokens=prompt,
                output_tokens=sum(record.num_output for record in records),
                steps=replica.num_steps,
                busy_share=_ratio(replica.busy_s, duration),
                mean_kv_usage=_ratio(replica.held_block_s, usable * duration),
                peak_kv_usage=replica.most_held / usable,
                preemptions=sum(record.num_preemptions for record in records),
                prefix_hit_rate=_ratio(sum(record.num_cached for record in records), prompt),
            )
        )
    return reports


def _use_over_time(replicas: Sequence[Replica], duration: float) -> list[UsePoint]:
    """Samples of all replicas on one grid; between two samples the earlier one holds."""
    if not duration:
        return []
    grid = np.linspace(0.0, duration, POINTS_OF_USE)
    totals = np.zeros((3, len(grid)))  # kv usage, running, waiting
    for replica in replicas:
        samples = [Sample(0.0, 0.0, 0, 0), *replica.timeline.samples]
        at = np.searchsorted([sample.at for sample in samples], grid, side="right") - 1
        values = np.array([(s.kv_usage, s.num_running, s.num_waiting) for s in samples])
        idle = grid > replica.now  # all that it had has ended
        totals += np.where(idle, 0.0, values[at].T)
    totals[0] /= len(replicas)
    return [UsePoint(float(t), float(u), int(r), int(w)) for t, u, r, w in zip(grid, *totals, strict=True)]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
