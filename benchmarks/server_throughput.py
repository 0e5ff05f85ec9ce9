"""How much of ``LLM.generate``'s throughput is left behind HTTP: SmolLM2-135M, the mixed workload of cpu_serving.py.

64 requests at once, 16..256 tokens in and out, greedy. One side is the library in a process of its own, the other the
server asked over 64 connections, every token streamed; they take turns on the same cores with the same settings.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial

from common import Report, arguments, interleaved, median
from common_platform.embedded import smollm2
from cpu_serving import Workload, workloads
from server_overhead import Server
from streams import ask_all, post

FLAGS = ("--max-num-seqs", "64", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(1 << 30))
CHILD = """
import json, sys
from servekit import LLM, SamplingParams
with LLM(sys.argv[1], max_num_seqs=64, max_model_len=1024, kv_cache_memory_bytes=1 << 30) as llm:
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        llm.reset_prefix_cache()
        params = [SamplingParams(max_tokens=n, ignore_eos=True, temperature=0.0) for n in asked["outputs"]]
        outputs = llm.generate([{"prompt_token_ids": p} for p in asked["prompts"]], params)
        print(sum(len(o.outputs[0].token_ids) for o in outputs), flush=True)
"""


class Library:
    """``LLM`` in a child process."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, "-c", CHILD, model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._answer() != "ready":
            raise RuntimeError("the library did not load the model")

    def _answer(self) -> str:
        if self._process.stdout is None:
            raise RuntimeError("the library has no output")
        return self._process.stdout.readline().strip()

    def tokens_s(self, workload: Workload) -> float:
        if self._process.stdin is None:
            raise RuntimeError("the library has no input")
        start = time.perf_counter()
        self._process.stdin.write(json.dumps({"prompts": workload.prompts, "outputs": workload.outputs}) + "\n")
        self._process.stdin.flush()
        found = int(self._answer())
        if found != workload.tokens:
            raise RuntimeError(f"{found} tokens came, not {workload.tokens}")
        return found / (time.perf_counter() - start)

    def close(self) -> None:
        self._process.communicate(timeout=60)


def server_tokens_s(server: Server, workload: Workload, *, stream: bool) -> float:
    asked = {"model": "M", "ignore_eos": True, "temperature": 0, "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    pairs = zip(workload.prompts, workload.outputs, strict=True)
    requests = [post("/v1/completions", asked | {"prompt": prompt, "max_tokens": n}) for prompt, n in pairs]
    start = time.perf_counter()
    answers = ask_all(server.port, requests)
    taken = time.perf_counter() - start
    if sum(answer.num_tokens for answer in answers) != workload.tokens:
        raise RuntimeError("an answer was not whole")
    return workload.tokens / taken


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report()
    model = str(smollm2())
    library = Library(model)
    command = [sys.executable, "-m", "servekit.cli", "serve", model, "--served-model-name", "M", *FLAGS]
    server = Server([*command, "--no-enable-prefix-caching", "--log-level", "warning"])
    try:
        mixed = workloads()["mixed"]
        sides = {
            "library": partial(library.tokens_s, mixed),
            "server, streamed": partial(server_tokens_s, server, mixed, stream=True),
            "server, whole": partial(server_tokens_s, server, mixed, stream=False),
        }
        for side in sides.values():
            side()  # warm
        found = {name: median(values) for name, values in interleaved(sides, 2 if options.quick else 5).items()}
    finally:
        server.close()
        library.close()
    for name, value in found.items():
        report.figure(f"{name.replace(', ', '_')}_tokens_s", value)
    for name in ("server, streamed", "server, whole"):
        report.target(f"{name}, over LLM.generate", found[name] / found["library"], ">=", 0.9)
    report.finish(as_json=options.json)


if __name__ == "__main__":
    main()
