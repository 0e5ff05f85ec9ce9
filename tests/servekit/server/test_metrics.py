"""What ``/metrics`` and the access log say is what happened."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.servekit.server.canary import held_by
from tests.servekit.server.processes import ServerProcess, wait_until
from tests.servekit.server.rows import CHAT, COMPLETIONS, chat, completion

from servekit.server.metrics import HISTOGRAMS, Histogram

BY = dict[tuple[str, str], float]


def figures(http: httpx.Client) -> BY:
    """(name, the label that is not the model) -> value."""
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: BY = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            others = [value for name, value in sample.labels.items() if name not in ("model_name", "method")]
            found[sample.name, ",".join(others)] = sample.value
    return found


def test_counters_move_by_what_was_asked(http: httpx.Client) -> None:
    assert wait_until(lambda: not any(held_by(http))), "what others have left"
    before = figures(http)
    usage = http.post(COMPLETIONS, json=completion(prompt="twelve bytes", max_tokens=5, n=2, ignore_eos=True)).json()
    after = figures(http)

    def moved(name: str, label: str = "") -> float:
        return after[f"servekit:{name}", label] - before.get((f"servekit:{name}", label), 0)

    assert moved("prompt_tokens_total") == 12 == usage["usage"]["prompt_tokens"]
    assert moved("generation_tokens_total") == 10
    assert moved("request_success_total", "length") == 2
    assert moved("time_to_first_token_seconds_count") == 1
    assert moved("inter_token_latency_seconds_count") == 8
    assert moved("e2e_request_latency_seconds_count") == 2
    assert moved("request_generation_tokens_sum") == 10
    assert moved("request_queue_time_seconds_count") == 1
    assert moved("request_decode_time_seconds_count") == 1
    assert after["http_requests_total", f"{COMPLETIONS},200"] > 0


def test_gauges_show_the_engine(http: httpx.Client) -> None:
    body = completion(max_tokens=900, ignore_eos=True, stream=True)
    assert wait_until(lambda: not any(held_by(http))), "what others have left"

    def are_seen() -> bool:
        """Once more where the answer had ended before the look, or before its reader left."""
        with http.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()  # held: a dropped iterator closes the connection
            next(lines)
            now = figures(http)
        assert now["servekit:engine_ready", ""] == 1
        assert wait_until(lambda: figures(http)["servekit:num_requests_running", ""] == 0)
        running, usage = now["servekit:num_requests_running", ""], now["servekit:kv_cache_usage_perc", ""]
        assert (0 < usage < 1) == (running == 1)
        return running == 1 and figures(http).get(("servekit:request_aborted_total", "client_gone"), 0) >= 1

    assert wait_until(are_seen)


def test_refusals_count_by_code_and_strangers_make_no_series(http: httpx.Client) -> None:
    http.post(COMPLETIONS, json=completion(prompt="x" * 2000))
    http.get("/no/such/place")
    http.request("BREW", "/no/such/place")
    now = figures(http)
    assert now["servekit:request_refused_total", "context_length_exceeded"] >= 1
    assert wait_until(lambda: figures(http).get(("http_requests_total", "none,404"), 0) >= 1)
    assert not any("such" in label for _, label in now)


def test_the_access_log_tells_tokens(server: ServerProcess, http: httpx.Client) -> None:
    answer = http.post(CHAT, json=chat(max_tokens=3, ignore_eos=True), headers={"X-Request-Id": "my-label"})
    assert wait_until(lambda: any(line.get("label") == "my-label" for line in server.log_lines()))
    line = next(line for line in server.log_lines() if line.get("label") == "my-label")
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["completion_tokens"] == 3
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert (line["method"], line["path"], line["status"]) == ("POST", CHAT, 200)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_ping_answers(http: httpx.Client, method: str) -> None:
    assert http.request(method, "/ping").status_code == 200


def test_a_histogram_counts_each_value_once_at_its_bound() -> None:
    histogram = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 5, 9):
        histogram.observe(value)
    family = histogram.family("h", "about", "M")
    buckets = {s.labels["le"]: s.value for s in family.samples if s.name == "h_bucket"}
    assert buckets == {"1": 2, "2": 3, "5": 4, "+Inf": 5}
    assert next(s.value for s in family.samples if s.name == "h_sum") == 17
    assert all(list(bounds) == sorted(set(bounds)) for bounds, _ in HISTOGRAMS.values())
