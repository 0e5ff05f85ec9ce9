"""``servekit top`` shows what the server says, and the dashboard asks for what it exports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.servekit.server.canary import held_by
from tests.servekit.server.processes import ServerProcess, wait_until
from tests.servekit.server.rows import COMPLETIONS, completion

from servekit.core.stats import SchedulerStats
from servekit.server.metrics import Metrics
from servekit.server.top import Sample, parse, percentile, rate

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana" / "servekit.json"


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "servekit.cli", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})


def test_a_look_at_a_live_server(server: ServerProcess, http: httpx.Client) -> None:
    http.post(COMPLETIONS, json=completion(max_tokens=20, ignore_eos=True))
    assert wait_until(lambda: not any(held_by(http)))
    shown = run(server.url, "--times", "2", "--interval-s", "0.2", COLUMNS="100")
    assert shown.returncode == 0, shown.stderr
    for words in ("M  ready", "0 running", "0 waiting", "KV blocks", "first token", "ended"):
        assert words in shown.stdout
    assert re.search(r"length \d+", shown.stdout)


@pytest.mark.parametrize(("url", "status"), [("ftp://x", 3), ("http://127.0.0.1:1", 5)])
def test_where_nobody_answers_is_said_in_one_line(url: str, status: int) -> None:
    ended = run(url, "--times", "1")
    assert ended.returncode == status
    assert ended.stderr.startswith("error: url")
    assert "Traceback" not in ended.stderr


def metrics_text(values: list[float], tokens: int) -> str:
    metrics = Metrics("M")
    metrics.generation_tokens = tokens
    metrics.engine = SchedulerStats(num_running=2, finished={})
    for value in values:
        metrics.histograms["time_to_first_token_seconds"].observe(value)
    return metrics.render().decode()


def test_rates_and_percentiles_are_of_the_time_between_two_looks() -> None:
    before = parse(metrics_text([100.0] * 50, 10), 0.0)
    now = parse(metrics_text([100.0] * 50 + [0.015] * 100, 110), 4.0)
    assert rate(before, now, "generation_tokens_total") == 25
    found = percentile(before, now, "time_to_first_token_seconds", 0.5)
    assert found == pytest.approx(0.015, abs=0.006)
    assert percentile(now, now, "time_to_first_token_seconds", 0.5) is None
    assert rate(now, parse(metrics_text([], 8), 6.0), "generation_tokens_total") == 4, "a server that began anew"
    assert rate(None, now, "generation_tokens_total") == 0
    assert (now.model, now.values["num_requests_running"]) == ("M", 2)
    assert percentile(None, Sample(0.0), "time_to_first_token_seconds", 0.5) is None


def test_the_dashboard_asks_for_what_is_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    metrics = Metrics("M")
    metrics.engine = SchedulerStats()
    exported = {sample.name for family in metrics.collect() for sample in family.samples}
    exported |= {family.name + "_total" for family in metrics.collect() if family.type == "counter"}
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked |= set(re.findall(r"servekit:[a-z0-9_]+|http_requests_total", target["expr"]))
    assert len(asked) > 15
    assert asked <= exported
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places)
