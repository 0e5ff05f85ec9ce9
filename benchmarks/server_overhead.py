"""What the server costs beside the model: many streams of a tiny one, ours and vLLM's in turn.

The model is a Llama of one layer, 64 wide, with SmolLM2's tokenizer and vocabulary, in SmolLM2's own bfloat16 unless
told otherwise. Each stream is a completion of 128 tokens over a connection of its own. Server CPU is that of all its
processes. vLLM's CPU build stands beside where ``make_peers.py vllm`` has made its environment; while one server is
measured the other stands still.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common import Report, arguments, interleaved
from common_platform.embedded import smollm2
from make_peers import PEERS, python_of
from streams import ask_all, post

STREAMS = (1, 16, 64, 128)
TOKENS = 128
DTYPES = ("bfloat16", "float32")
START_LIMIT_S = 300.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
FIGURES = ("tokens_s", "cpu_us_a_token", "first_token_ms", "client_cpu_us_a_token", "arrivals_a_token")


def make_tiny(folder: Path) -> Path:
    """Random weights in SmolLM2's vocabulary, with its tokenizer."""
    import transformers

    source = Path(smollm2())
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        eos_token_id=0,
        bos_token_id=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            (folder / name).write_bytes((source / name).read_bytes())
    return folder


class Server:
    """A server in a process group of its own."""

    def __init__(self, command: list[str], variables: dict[str, str] | None = None) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that an ended benchmark closes its servers
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = int(found.getsockname()[1])
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | (variables or {}),
            start_new_session=True,
        )
        self._wait()
        self._turn = 0

    def _wait(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self._process.returncode}")
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError("the server did not start")

    def run(self, streams: int) -> dict[str, float]:
        """All figures of one round."""
        self._turn += 1
        requests = _requests(streams, self._turn)
        before, client, start = self._cpu_s(), time.process_time(), time.perf_counter()
        answers = ask_all(self.port, requests)
        taken, client = time.perf_counter() - start, time.process_time() - client
        cpu, tokens = self._cpu_s() - before, streams * TOKENS
        for answer in answers:
            if not answer.is_whole or answer.num_tokens != TOKENS:
                raise RuntimeError(f"a stream was not whole: {answer.tail[-200:]!r}")
        return {
            "tokens_s": tokens / taken,
            "cpu_us_a_token": cpu / tokens * 1e6,
            "first_token_ms": median(answer.first_s for answer in answers) * 1e3,
            "client_cpu_us_a_token": client / tokens * 1e6,
            "arrivals_a_token": sum(answer.num_arrivals for answer in answers) / tokens,
        }

    def _cpu_s(self) -> float:
        """Of every process in the server's session, those that have ended too."""
        total = 0.0
        for pid in self._processes():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += sum(map(int, fields[11:15])) * TICK_S
        return total

    def _processes(self) -> list[int]:
        found = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
        return [pid for pid in found if self._is_ours(pid)]

    @contextmanager
    def still(self) -> Iterator[None]:
        """The server stands still: while another is measured, it takes nothing from it."""
        stopped = self._processes()
        _signal(stopped, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(stopped, signal.SIGCONT)

    def _is_ours(self, pid: int) -> bool:
        while pid > 1:
            if pid == self._process.pid:
                return True
            try:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                return False
        return False

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _requests(streams: int, turn: int) -> list[bytes]:
    asked = {"model": "tiny", "max_tokens": TOKENS, "ignore_eos": True, "stream": True, "temperature": 0}
    asked |= {"stream_options": {"include_usage": True}}
    return [post("/v1/completions", asked | {"prompt": f"{turn} words of number {i}"}) for i in range(streams)]


def start_ours(folder: Path, *flags: str) -> Server:
    command = [sys.executable, "-m", "servekit.cli", "serve", str(folder), "--served-model-name", "tiny"]
    return Server([*command, *flags])


def start_vllm(python: Path, folder: Path, dtype: str) -> Server:
    module = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "tiny"]
    more = ["--dtype", dtype, "--max-num-seqs", "128", "--max-model-len", "512", "--enforce-eager"]
    quiet = ["--disable-log-stats", "--uvicorn-log-level", "warning"]
    return Server([str(python), *module, *more, *quiet], {"VLLM_CPU_KVCACHE_SPACE": "1"})


def _options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, help="how many at once, each in its turn")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of both servers")
    parser.add_argument("--rounds", type=int, default=0, help="of each; default: 7, or 3 with --quick")
    return parser.parse_args()


def main() -> None:
    options = _options()
    report = Report()
    rounds = options.rounds or (3 if options.quick else 7)
    python = python_of("vllm")
    with tempfile.TemporaryDirectory() as work:
        folder = make_tiny(Path(work))
        flags = ("--dtype", options.dtype, "--max-num-seqs", "128", "--log-level", "warning")
        sides: dict[str, Server] = {"servekit": start_ours(folder, *flags)}
        try:
            if python is not None:
                sides["vllm"] = start_vllm(python, folder, options.dtype)
                report.peers["vllm"] = PEERS["vllm"]
            for streams in options.streams:
                _compare(report, sides, streams, rounds)
        finally:
            for side in sides.values():
                side.close()
    report.finish(as_json=options.json)


def _compare(report: Report, sides: dict[str, Server], streams: int, rounds: int) -> None:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}

    def once(name: str) -> float:
        with ExitStack() as others:
            for other in sides.values():
                if other is not sides[name]:
                    others.enter_context(other.still())
            figures = sides[name].run(streams)
        found[name].append(figures)
        return figures["tokens_s"]

    for side in sides.values():
        side.run(streams)  # warm
    interleaved({name: partial(once, name) for name in sides}, rounds)
    middle = {name: {f: median(row[f] for row in rows) for f in FIGURES} for name, rows in found.items()}
    for name, figures in middle.items():
        for figure, value in figures.items():
            report.figure(f"{name}_{streams}_streams_{figure}", value)
    if "vllm" in middle:
        ours, theirs = middle["servekit"], middle["vllm"]
        at = f"at {streams} streams"
        report.target(f"tokens/s over vLLM's {at}", ours["tokens_s"] / theirs["tokens_s"], ">=", 3.0)
        report.target(f"CPU a token over vLLM's {at}", ours["cpu_us_a_token"] / theirs["cpu_us_a_token"], "<=", 1 / 3)
        report.target(f"first token over vLLM's {at}", ours["first_token_ms"] / theirs["first_token_ms"], "<=", 1.0)


if __name__ == "__main__":
    main()
