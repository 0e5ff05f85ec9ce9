"""``servekit bench``: what it reports is what happened."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tests.servekit.server.processes import ServerProcess

from common_platform.errors import ConfigError
from servekit.bench.load import Pace, send_all
from servekit.bench.workload import Workload, asks_of
from servekit.cli import cli
from servekit.engine.tokenizer import Tokenizer

VLLM_KEYS = {
    *("date", "backend", "model_id", "num_prompts", "request_rate", "burstiness", "max_concurrency", "duration"),
    *("completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput", "output_throughput"),
    *("total_token_throughput", "mean_ttft_ms", "median_tpot_ms", "std_itl_ms", "p99_e2el_ms", "p50_ttft_ms"),
}


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["bench", *arguments], catch_exceptions=False, standalone_mode=False)
    assert result.return_value == 0, result.output
    return result.output


def serve(base_url: str, folder: Path, *more: str) -> dict[str, Any]:
    flags = ["--base-url", base_url, "--model", "M", "--save-detailed", "--result-dir", str(folder)]
    run("serve", *flags, "--result-filename", "r.json", "--metric-percentiles", "50,99", *more)
    return json.loads((folder / "r.json").read_text())


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_a_live_server_is_measured(server: ServerProcess, tmp_path: Path, tiny_model: Path, backend: str) -> None:
    wanted = ["--num-prompts", "12", "--random-input-len", "20", "--random-output-len", "9", "--ignore-eos"]
    more = ["--max-concurrency", "4", "--backend", backend, "--tokenizer", str(tiny_model)]
    found = serve(server.url, tmp_path, *wanted, *more, "--percentile-metrics", "ttft,tpot,itl,e2el")
    assert set(found) >= VLLM_KEYS
    assert (found["completed"], found["failed"]) == (12, 0)
    assert found["total_output_tokens"] == 12 * 9 == sum(found["output_lens"])
    if backend == "openai":
        assert found["input_lens"] == [20] * 12
    assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"] <= found["p99_e2el_ms"]
    for first, gaps, errors in zip(found["ttfts"], found["itls"], found["errors"], strict=True):
        assert first > 0
        assert len(gaps) <= 8
        assert not errors


def test_requests_that_fail_are_counted_and_told(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "asks.jsonl"
    path.write_text('{"prompt": "a", "output_tokens": 4}\n' + '{"prompt": "b", "output_tokens": 100000}\n' * 2)
    flags = ["serve", "--base-url", server.url, "--model", "M", "--dataset-name", "custom", "--dataset-path", str(path)]
    seeds = [seed for seed in range(9) if _first(path, seed) == "a"]  # the first is not to fail
    result = CliRunner().invoke(
        cli, ["bench", *flags, "--num-prompts", "3", "--seed", str(seeds[0])], standalone_mode=False
    )
    assert result.return_value == 1
    assert "max_tokens" in result.output


def _first(path: Path, seed: int) -> str:
    return asks_of(Workload(dataset_name="custom", dataset_path=path, num_prompts=3, seed=seed), None)[0].prompt


class _Other(BaseHTTPRequestHandler):
    """A server that sends no usage, and ends its answer by closing the connection."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self.wfile.write(b'data: {"choices": [{"text": "a", "logprobs": {}}]}\r\n\r\n')
        self.wfile.write(b"data: [DONE]\r\n\r\n")

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def other() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Other) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join(10)


def test_a_server_without_usage_is_measured_by_its_events(other: str, tmp_path: Path) -> None:
    found = serve(other, tmp_path, "--num-prompts", "5", "--random-input-len", "3", "--random-output-len", "7")
    assert (found["completed"], found["total_output_tokens"]) == (5, 35)


def test_a_model_is_measured_without_a_server(tiny_model: Path, tmp_path: Path) -> None:
    lengths = ["--input-len", "8", "--output-len", "4"]
    out = ["--output-json", str(tmp_path / "out.json")]
    assert "output tokens/s" in run("throughput", str(tiny_model), "--num-prompts", "6", *lengths, *out)
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (6, 6 * 12)
    iterations = ["--batch-size", "2", "--num-iters-warmup", "1", "--num-iters", "3"]
    run("latency", str(tiny_model), *lengths, *iterations, *out)
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["latencies"]) == 3
    assert min(found["latencies"]) <= found["percentiles"]["50"] <= max(found["latencies"])


@given(rate=st.floats(0.1, 1e4), burstiness=st.floats(0.2, 50), seed=st.integers(0, 99))
def test_times_go_forward_from_the_start_and_keep_the_rate(rate: float, burstiness: float, seed: int) -> None:
    times = Pace(request_rate=rate, burstiness=burstiness, seed=seed).times(400)
    assert times[0] == 0
    assert times == sorted(times)
    assert 0.5 < times[-1] * rate / 399 < 2
    assert times == Pace(request_rate=rate, burstiness=burstiness, seed=seed).times(400)


@given(most=st.integers(1, 9), count=st.integers(1, 30))
def test_no_more_than_allowed_are_under_way(most: int, count: int) -> None:
    under_way, highest = 0, 0

    async def send(ask: int) -> int:
        nonlocal under_way, highest
        under_way += 1
        highest = max(highest, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return ask

    found = asyncio.run(send_all(range(count), send, Pace(max_concurrency=most)))
    assert found == list(range(count))
    assert highest == min(most, count)


def test_lengths_of_random_prompts_are_kept(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny_model)
    workload = Workload(num_prompts=50, input_len=40, output_len=20, range_ratio=0.5)
    asks = asks_of(workload, tokenizer)
    lengths = [len(tokenizer.encode(ask.prompt)) for ask in asks]
    assert 20 <= min(lengths) < max(lengths) <= 60
    assert all(10 <= ask.output_len <= 30 for ask in asks)
    assert asks == asks_of(workload, tokenizer)


def test_files_as_others_have_them(tmp_path: Path) -> None:
    path = tmp_path / "data"
    chats = [{"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": "a b c"}]} for i in "123"]
    path.write_text(json.dumps([*chats, {"conversations": []}]))
    asks = asks_of(Workload(dataset_name="sharegpt", dataset_path=path, num_prompts=7, output_len=5), None)
    assert sorted({ask.prompt for ask in asks}) == ["q1", "q2", "q3"]
    assert {ask.output_len for ask in asks} == {5}
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    (ask,) = asks_of(Workload(dataset_name="custom", dataset_path=path, num_prompts=1), None)
    assert ask.messages == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"num_prompts": 0}, "--num-prompts"),
        ({"range_ratio": 1.0}, "--random-range-ratio"),
        ({"dataset_name": "other"}, "--dataset-name"),
        ({"dataset_name": "custom"}, "--dataset-path"),
        ({"dataset_name": "custom", "dataset_path": Path("no-such")}, "--dataset-path"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        asks_of(Workload(**settings), None)


@pytest.mark.parametrize("settings", [{"request_rate": 0.0}, {"burstiness": float("inf")}, {"max_concurrency": 0}])
def test_paces_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Pace(**settings)
