"""What the server counts, in Prometheus' form. Names after the prefix, and what they mean, are vLLM's."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from servekit import __version__
from servekit.core.stats import SchedulerStats
from servekit.engine.output import CompletionOutput, RequestOutput

PREFIX = "servekit:"
LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
DURATION_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
CHOICES = (1, 2, 5, 10, 20)

HISTOGRAMS = {
    "time_to_first_token_seconds": (LATENCY_S, "Seconds from a request's arrival to its first token."),
    "inter_token_latency_seconds": (
        LATENCY_S,
        "Seconds between two tokens of a sequence; tokens that came together share theirs.",
    ),
    "e2e_request_latency_seconds": (DURATION_S, "Seconds from a request's arrival to its end."),
    "request_queue_time_seconds": (DURATION_S, "Seconds a request waited for its first step."),
    "request_prefill_time_seconds": (DURATION_S, "Seconds from a request's first step to its first token."),
    "request_decode_time_seconds": (DURATION_S, "Seconds from a request's first token to its end."),
    "request_prompt_tokens": (TOKENS, "Tokens of a prompt."),
    "request_generation_tokens": (TOKENS, "Tokens of an answer."),
    "request_params_n": (CHOICES, "The parameter n."),
}
OF_THE_ENGINE: dict[str, tuple[str, Callable[[SchedulerStats], float]]] = {
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queried_tokens),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda s: s.prefix_hit_tokens),
    "offload_cache_hits": ("Of them, tokens loaded from the offload tier.", lambda s: s.offload_hit_tokens),
    "num_preemptions": ("Requests that gave their blocks back to others.", lambda s: s.preemptions),
    "engine_steps": ("Steps of the engine.", lambda s: s.steps),
    "computed_tokens": ("Tokens computed, those computed again included.", lambda s: s.computed_tokens),
    "spec_decode_num_draft_tokens": ("Tokens that were drafted.", lambda s: s.drafted_tokens),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that were right.", lambda s: s.accepted_tokens),
}
GAUGES: dict[str, tuple[str, Callable[[SchedulerStats], float]]] = {
    "num_requests_running": ("Sequences in the batch.", lambda s: s.num_running),
    "num_requests_waiting": ("Sequences that wait for a place in it.", lambda s: s.num_waiting + s.num_held),
    "kv_cache_usage_perc": ("Share of KV blocks in use, 0..1.", lambda s: s.kv_usage),
}


class Histogram:
    """Counts by upper bounds; one observation is a search and two additions."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, about: str, model: str) -> Metric:
        below, buckets = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            below += count
            buckets.append((bound, below))
        family = HistogramMetricFamily(name, about, labels=["model_name"])
        family.add_metric([model], buckets=buckets, sum_value=self._sum)
        return family


class Metrics(Collector):
    """Everything ``/metrics`` shows. ``engine`` is what the engine said last; None while it is not ready."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in HISTOGRAMS.items()}
        self.engine: SchedulerStats | None = None
        self.restarts = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.success: Counter[str] = Counter()  # by finish reason
        self.aborted: Counter[str] = Counter()  # by reason
        self.refused: Counter[str] = Counter()  # by code
        self.http: Counter[tuple[str, str, int]] = Counter()  # by method, route and status
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """The text format, version 0.0.4."""
        return generate_latest(self._registry)

    def answered(self, method: str, route: str, status: int) -> None:
        self.http[method, route, status] += 1

    def record(self) -> RequestRecord:
        return RequestRecord(self)

    def collect(self) -> Iterator[Metric]:
        model = [self._model]
        stats = self.engine or SchedulerStats()
        yield self._gauge("engine_ready", "1 while the engine answers.", float(self.engine is not None))
        for name, (about, value) in GAUGES.items():
            yield self._gauge(name, about, value(stats))
        for name, (about, value) in OF_THE_ENGINE.items() if self.engine else ():
            yield self._counter(name, about, {(): value(stats)})
        yield self._counter("prompt_tokens", "Prompt tokens of requests.", {(): self.prompt_tokens})
        yield self._counter("generation_tokens", "Tokens generated.", {(): self.generation_tokens})
        yield self._counter("engine_restarts", "Times that the engine was started again.", {(): self.restarts})
        yield self._counter("request_success", "Answers that ended.", _one(self.success), "finished_reason")
        yield self._counter("request_aborted", "Answers that were cut off.", _one(self.aborted), "reason")
        yield self._counter("request_refused", "Requests not taken.", _one(self.refused), "code")
        for name, (_, about) in HISTOGRAMS.items():
            yield self.histograms[name].family(PREFIX + name, about, self._model)
        http = CounterMetricFamily("http_requests", "Answers over HTTP.", labels=["method", "handler", "status"])
        for (method, handler, status), count in self.http.items():
            http.add_metric([method, handler, str(status)], count)
        yield http
        info = InfoMetricFamily("servekit_build", "What is running.", labels=["model_name"])
        info.add_metric(model, {"version": __version__})
        yield info

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, about: str, counts: dict[tuple[str, ...], float], *labels: str) -> Metric:
        family = CounterMetricFamily(PREFIX + name, about, labels=["model_name", *labels])
        for values, count in counts.items():
            family.add_metric([self._model, *values], count)
        return family


def _one(counts: Counter[str]) -> dict[tuple[str, ...], float]:
    return {(name,): count for name, count in counts.items()}


class RequestRecord:
    """One request of the engine as its outputs come."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._between = metrics.histograms["inter_token_latency_seconds"]
        self._arrived = time.monotonic()
        self._last: dict[int, float] = {}  # when a choice had its last token
        self._ended: set[int] = set()
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0

    def saw(self, output: RequestOutput) -> None:
        now = time.monotonic()
        metrics = self._metrics
        if not self.num_prompt_tokens:
            self.num_prompt_tokens = len(output.prompt_token_ids)
            metrics.prompt_tokens += self.num_prompt_tokens
            metrics.histograms["request_prompt_tokens"].observe(self.num_prompt_tokens)
        for choice in output.outputs:
            new = len(choice.delta_token_ids)
            if new:
                self.num_generated_tokens += new
                metrics.generation_tokens += new
                self._tokens_came(choice.index, new, now)
            if choice.finish_reason is not None and choice.index not in self._ended:
                self._ended.add(choice.index)
                self._choice_ended(choice, now)
        if output.finished:
            self._phases(output)

    def saw_tokens(self, count: int) -> None:
        """``count`` more tokens of the only choice, which has had some already."""
        now, last = time.monotonic(), self._last
        self.num_generated_tokens += count
        self._metrics.generation_tokens += count
        self._between.observe((now - last.get(0, now)) / count, count)
        last[0] = now

    def _tokens_came(self, index: int, count: int, now: float) -> None:
        last = self._last.get(index)
        if last is not None:
            self._between.observe((now - last) / count, count)
        else:
            self._between.observe(0.0, count - 1)
        if not self._last:
            self._metrics.histograms["time_to_first_token_seconds"].observe(now - self._arrived)
        self._last[index] = now

    def _choice_ended(self, choice: CompletionOutput, now: float) -> None:
        self._metrics.success[choice.finish_reason or "stop"] += 1
        self._metrics.histograms["e2e_request_latency_seconds"].observe(now - self._arrived)
        self._metrics.histograms["request_generation_tokens"].observe(choice.num_tokens)

    def _phases(self, output: RequestOutput) -> None:
        """Times of the first sequence, by the scheduler's clock."""
        at: dict[str, float] = {}
        for event in output.events:
            at.setdefault(event.name, event.at)
        self._metrics.histograms["request_params_n"].observe(len(self._ended))
        phases = (("queue", "queued", "scheduled"), ("prefill", "scheduled", "first_token"))
        for phase, begin, end in (*phases, ("decode", "first_token", "finished")):
            if begin in at and end in at:
                self._metrics.histograms[f"request_{phase}_time_seconds"].observe(max(0.0, at[end] - at[begin]))

    def cut_off(self, num_sequences: int, reason: str) -> None:
        """Nobody waits for the answers that have not ended."""
        left = num_sequences - len(self._ended)
        if left > 0:
            self._metrics.aborted[reason] += left
