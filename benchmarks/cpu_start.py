"""From nothing to the first token on a CPU: ``servekit serve`` as a process of its own, asked as soon as it listens.

SmolLM2-135M in each precision. Files have been read before, as on a machine that has run anything; nothing else is
kept from one start to the next. Beside it what cannot be had for less: a Python that imports torch and ends.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from common import Report, arguments, median
from common_platform.embedded import smollm2

LIMIT_S = 60
SETTINGS: dict[str, list[str]] = {
    "bf16": ["--dtype", "bfloat16"],
    "8-bit": ["--quantization", "int8"],
    "4-bit": ["--quantization", "int4"],
}


def main() -> None:
    options = arguments(__doc__).parse_args()
    report, rounds = Report(), 2 if options.quick else 5
    imports = median([seconds_of([sys.executable, "-c", "import torch"]) for _ in range(rounds)])
    report.figure("python -c 'import torch', s", imports)
    for name, flags in SETTINGS.items():
        taken = median([first_token_s(flags) for _ in range(rounds)])
        report.figure(f"{name}: process start to first token, s", taken)
        report.figure(f"{name}: beside the import of torch, s", taken - imports)
        report.target(f"{name}: process start to first token, s", taken, "<=", 2.5)
    report.finish(as_json=options.json)


def seconds_of(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, timeout=LIMIT_S)
    return time.perf_counter() - start


def first_token_s(flags: list[str]) -> float:
    """Seconds from the start of the process to the first token of an answer that is streamed."""
    port = free_port()
    command = [sys.executable, "-m", "servekit.cli", "serve", str(smollm2()), "--port", str(port), *flags]
    command += ["--num-threads", "2", "--kv-cache-memory-bytes", str(1 << 28), "--log-level", "error"]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    try:
        wait_for_token(server, port, start + LIMIT_S)
        return time.perf_counter() - start
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(LIMIT_S)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for_token(server: subprocess.Popen[bytes], port: int, deadline: float) -> None:
    body: dict[str, Any] = {
        "model": smollm2().name,
        "prompt": "The capital of France is",
        "max_tokens": 1,
        "stream": True,
    }
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        try:  # it listens before the model is loaded, and answers once it is
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            line = answer.readline()
            if answer.status != 200 or not line.startswith(b"data: {"):
                raise RuntimeError(f"status {answer.status}: {line!r}")
            return
        except ConnectionError:
            if time.perf_counter() > deadline or server.poll() is not None:
                raise
            time.sleep(0.005)
        finally:
            connection.close()


if __name__ == "__main__":
    main()
