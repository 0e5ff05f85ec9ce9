"""``servekit top``: a running server at a glance, from its ``/metrics``, refreshed in the terminal."""

from __future__ import annotations

import http.client
import ssl
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from common_platform.errors import ConfigError, ResourceError
from servekit.server.metrics import PREFIX

TIMEOUT_S = 5.0
MAX_BYTES = 8 << 20
PERCENTILES = (0.5, 0.95, 0.99)
LATENCIES = {
    "first token": "time_to_first_token_seconds",
    "between tokens": "inter_token_latency_seconds",
    "end to end": "e2e_request_latency_seconds",
    "in the queue": "request_queue_time_seconds",
}


@dataclass(slots=True)
class Sample:
    """What ``/metrics`` said at one moment; names are without their prefix."""

    at: float
    model: str = ""
    values: dict[str, float] = field(default_factory=dict)  # summed over labels
    by_label: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(dict))  # upper bound -> count


def parse(text: str, at: float) -> Sample:
    sample = Sample(at)
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if not one.name.startswith(PREFIX):
                continue
            name = one.name.removeprefix(PREFIX)
            labels = dict(one.labels)
            sample.model = labels.pop("model_name", sample.model)
            if "le" in labels:
                sample.buckets[name.removesuffix("_bucket")][float(labels["le"])] = one.value
                continue
            sample.values[name] = sample.values.get(name, 0.0) + one.value
            if labels:
                sample.by_label[name][", ".join(labels.values())] = one.value
    return sample


def rate(before: Sample | None, now: Sample, name: str) -> float:
    """How fast a counter grows, per second; a counter that began anew counts from zero."""
    if before is None or now.at <= before.at:
        return 0.0
    grown = now.values.get(name, 0.0) - before.values.get(name, 0.0)
    return (grown if grown >= 0 else now.values.get(name, 0.0)) / (now.at - before.at)


def percentile(before: Sample | None, now: Sample, name: str, share: float) -> float | None:
    """Of the observations between two samples, as Prometheus would say; None where there were none."""
    counts = dict(sorted(now.buckets.get(name, {}).items()))
    if before is not None:
        counts = {bound: count - before.buckets[name].get(bound, 0.0) for bound, count in counts.items()}
    total = max(counts.values(), default=0.0)
    if total <= 0:
        return None
    below, low = 0.0, 0.0
    for bound, count in counts.items():
        if count >= share * total:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (share * total - below) / (count - below)
        below, low = count, bound
    return low


def view(before: Sample | None, now: Sample) -> Group:
    """The picture of ``now``; rates and percentiles are of the time since ``before``."""
    ready = now.values.get("engine_ready", 0.0) == 1
    state = Text("ready", "bold green") if ready else Text("not ready", "bold red")
    restarts = int(now.values.get("engine_restarts_total", 0))
    head = Text.assemble(now.model, "  ", state, f"  {restarts} restarts" if restarts else "")
    return Group(Panel(head, title="servekit"), _load(before, now), _latencies(before, now), _ends(now))


def _load(before: Sample | None, now: Sample) -> Table:
    table = Table.grid(padding=(0, 2))
    running, waiting = now.values.get("num_requests_running", 0), now.values.get("num_requests_waiting", 0)
    table.add_row("sequences", f"{running:.0f} running", f"{waiting:.0f} waiting")
    generated, read = rate(before, now, "generation_tokens_total"), rate(before, now, "prompt_tokens_total")
    table.add_row("tokens/s", f"{generated:.1f} generated", f"{read:.1f} prompt")
    usage = now.values.get("kv_cache_usage_perc", 0.0)
    table.add_row("KV blocks", f"{usage:.1%} in use", ProgressBar(100, 100 * usage, width=30))
    asked = rate(before, now, "prefix_cache_queries_total")
    share = rate(before, now, "prefix_cache_hits_total") / asked if asked else 0.0
    table.add_row("prefix cache", f"{share:.1%} of tokens found", ProgressBar(100, 100 * share, width=30))
    preempted = rate(before, now, "num_preemptions_total")
    if preempted:
        table.add_row("preemptions/s", f"{preempted:.1f}", "")
    return table


def _latencies(before: Sample | None, now: Sample) -> Table:
    table = Table("latency", *(f"p{share * 100:.0f}" for share in PERCENTILES), box=None, padding=(0, 2))
    for label, name in LATENCIES.items():
        found = [percentile(before, now, name, share) for share in PERCENTILES]
        table.add_row(label, *("-" if value is None else _seconds(value) for value in found))
    return table


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def _ends(now: Sample) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, name in (("ended", "request_success"), ("cut off", "request_aborted"), ("refused", "request_refused")):
        counts = now.by_label.get(f"{name}_total", {})
        shown = ", ".join(f"{reason} {count:.0f}" for reason, count in sorted(counts.items())) or "none"
        table.add_row(label, shown)
    return table


def fetch(url: str, key: str | None) -> str:
    """The text of ``/metrics``.

    Raises:
        ConfigError: ``url`` is none, or the key is not the server's; ResourceError: nobody answers there.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("url", url, "http://HOST:PORT or https://HOST:PORT")
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=TIMEOUT_S, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics", headers={} if key is None else {"Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        if answer.status in (401, 403):
            raise ConfigError("api_key", "a key that is not the server's", "one of its keys", flag="--api-key-file")
        if answer.status != 200:
            raise ResourceError("url", f"{url}, status {answer.status}", "a servekit server")
        return answer.read(MAX_BYTES).decode()
    except (OSError, http.client.HTTPException) as error:
        raise ResourceError("url", url, "the address of a running server") from error
    finally:
        connection.close()


def watch(fetch_text: Callable[[], str], console: Console, *, interval_s: float, times: int | None) -> None:
    """Show the server until interrupted, or ``times`` times."""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        for before, now in _samples(fetch_text, interval_s, times):
            live.update(view(before, now), refresh=True)


def _samples(
    fetch_text: Callable[[], str], interval_s: float, times: int | None
) -> Iterator[tuple[Sample | None, Sample]]:
    before: Sample | None = None
    shown = 0
    while times is None or shown < times:
        if shown:
            time.sleep(interval_s)
        now = parse(fetch_text(), time.monotonic())
        yield before, now
        before, shown = now, shown + 1
