"""What a step costs beside the model: scheduler, batch, sampler and outputs; and a whole engine beside vLLM's.

``core`` figures drive the real scheduler, input batch, greedy sampler and output processor around a model that does
nothing. ``end to end`` figures run ``LLM`` on a tiny real model (Llama, one layer, hidden 64, vocabulary 512), and
vLLM's CPU build on the same folder where ``make_peers.py vllm`` has made its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import Report, arguments, interleaved, median
from make_peers import PEERS, python_of
from servekit import LLM, SamplingParams
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.facts import KVGroup
from servekit.core.plan import StepPlan, StepResult
from servekit.core.request import Request
from servekit.core.scheduler import Scheduler
from servekit.engine.collector import fewer_collections
from servekit.engine.output import OutputProcessor
from servekit.engine.validate import EngineRequest
from servekit.execution.model_runner import ModelRunner

VOCABULARY, HIDDEN = 512, 8
PROMPT, OUTPUT = 16, 64
BLOCK = 16  # tokens
ROWS_OF_TARGETS = {64: 150.0, 1024: 1500.0}  # rows -> microseconds
SEQUENCES = (1, 64, 256, 1024)
GREEDY = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True, detokenize=False)


class NullModel:
    """The model's part of a step, for nothing."""

    vocab_size = VOCABULARY

    def __init__(self, most_tokens: int) -> None:
        self.kv_groups = [KVGroup()]
        self.attentions: list[Any] = []
        self._hidden = torch.zeros(most_tokens, HIDDEN)
        self._logits = torch.zeros(most_tokens, VOCABULARY)

    def forward(self, step: Any) -> torch.Tensor:
        return self._hidden[: len(step.token_ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[: len(hidden)]


class Core:
    """A scheduler, a runner around the null model, and outputs.

    Args:
        rows: sequences that run together.
        model_len: tokens of one of them.
        final_only: as ``LLM.generate`` asks: nothing is told before the end; else an output is made of every token, as
            the reader of a stream takes it.
    """

    def __init__(self, rows: int, model_len: int, *, final_only: bool) -> None:
        self._final_only = final_only
        budget = max(rows * 2, 2048)
        cache = CacheConfig(num_blocks=rows * -(-model_len // 16) + 1)
        config = SchedulerConfig(max_num_seqs=rows, max_num_batched_tokens=budget, max_model_len=model_len)
        self.scheduler = Scheduler(config, cache, [KVGroup()])
        self.runner = ModelRunner(NullModel(budget), cache, config, torch.float32, torch.device("cpu"))
        self.outputs = OutputProcessor(None)  # type: ignore[arg-type]  # nothing is detokenized
        self._count = 0

    def add(self, num_prompt: int, max_tokens: int) -> None:
        self._count += 1
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        prompt = [(self._count * 7 + i) % VOCABULARY for i in range(num_prompt)]
        request = EngineRequest(request_id=f"r{self._count}", prompt_token_ids=prompt, sampling=params)
        request = request.told_at_the_end() if self._final_only else request
        self.outputs.add(request, None)
        self.scheduler.add(Request(request.child_id(0), prompt, params, final_only=request.final_only))

    def step(self) -> None:
        plan = self.scheduler.plan_step()
        self.scheduler.finish_step(plan, self.runner.execute(plan))
        for tracker in self.outputs.process(self.scheduler.take_updates())[0]:
            if not self._final_only:
                tracker.take()


def microseconds_of_a_step(rows: int, steps: int, *, final_only: bool) -> float:
    """The median over runs of ``BLOCK`` steps, in each of which every one of ``rows`` sequences fills a block once."""
    steps = steps // BLOCK * BLOCK
    core = Core(rows, PROMPT + steps + 16, final_only=final_only)
    for _ in range(rows):
        core.add(PROMPT, steps + 15)
    while len(core.scheduler.running) < rows or any(r.num_output < 2 for r in core.scheduler.running):
        core.step()
    taken = []
    with fewer_collections():
        for _ in range(steps // BLOCK - 1):
            start = time.perf_counter()
            for _ in range(BLOCK):
                core.step()
            taken.append((time.perf_counter() - start) / BLOCK * 1e6)
    return median(taken)


def tokens_per_second_of_a_trace(num_requests: int) -> float:
    """Requests of 16..128 tokens in and out through the scheduler alone, 256 at a time; generated and prompt tokens."""
    cache = CacheConfig(num_blocks=256 * 20)
    scheduler = Scheduler(SchedulerConfig(max_num_seqs=256, max_num_batched_tokens=8192), cache, [KVGroup()])
    tokens = 0
    for i in range(num_requests):
        count, wanted = 16 + i * 37 % 113, 16 + i * 53 % 113
        params = SamplingParams(max_tokens=wanted, ignore_eos=True)
        scheduler.add(Request(f"r{i}", [(i * 31 + k) % 997 for k in range(count)], params))
        tokens += count + wanted
    start = time.perf_counter()
    while scheduler.has_work:
        plan = scheduler.plan_step()
        scheduler.finish_step(plan, _null_result(plan))
        scheduler.take_updates()
    return tokens / (time.perf_counter() - start)


def _null_result(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, [], sampled=[1] * sum(plan.samples))


def make_tiny(folder: Path) -> Path:
    """Random weights; the tokenizer is a byte's, for nothing is read or written as text."""
    import transformers
    from tokenizers import Tokenizer, models

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,  # of 32: the smallest heads that vLLM has kernels for
        num_key_value_heads=1,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(folder)
    return folder


def prompts_of(count: int, turn: int) -> list[list[int]]:
    return [[(turn * 131 + i * 17 + k * 3) % (VOCABULARY - 3) + 3 for k in range(PROMPT)] for i in range(count)]


class Ours:
    """``LLM`` in this process."""

    def __init__(self, folder: Path) -> None:
        self._llm = LLM(
            folder, max_num_seqs=max(SEQUENCES), max_num_batched_tokens=8192 * 2, kv_cache_memory_bytes=256 << 20
        )
        self._turn = 0

    def milliseconds_a_step(self, count: int) -> float:
        self._turn += 1
        prompts = prompts_of(count, self._turn)
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, GREEDY)
        taken = time.perf_counter() - start
        if any(len(output.outputs[0].token_ids) != OUTPUT for output in outputs):
            raise RuntimeError("an answer is not of the length asked for")
        return taken / OUTPUT * 1e3

    def close(self) -> None:
        self._llm.close()


PEER = r"""
import json, sys, time
import vllm
from vllm import LLM, SamplingParams, TokensPrompt
folder, output = sys.argv[1], int(sys.argv[2])
llm = LLM(folder, dtype="float32", max_num_seqs=1024, max_num_batched_tokens=16384, max_model_len=256,
          enforce_eager=True, disable_log_stats=True)
params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True, detokenize=False)
print("READY " + vllm.__version__, flush=True)
for line in sys.stdin:
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.loads(line)]
    start = time.perf_counter()
    answers = llm.generate(prompts, params, use_tqdm=False)
    taken = time.perf_counter() - start
    print("TOOK", taken if all(len(a.outputs[0].token_ids) == output for a in answers) else "nan", flush=True)
"""


class Vllm:
    """vLLM in a process of its own, asked line by line."""

    def __init__(self, python: Path, folder: Path) -> None:
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        self._process = subprocess.Popen(
            [str(python), "-c", PEER, str(folder), str(OUTPUT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | variables,
        )
        self.version = self._line("READY")
        self._turn = 0

    def _line(self, word: str) -> str:
        if self._process.stdout is None:
            raise RuntimeError("no pipe")
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        raise RuntimeError(f"vllm ended with status {self._process.wait(60)}")

    def milliseconds_a_step(self, count: int) -> float:
        self._turn += 1
        if self._process.stdin is None:
            raise RuntimeError("no pipe")
        self._process.stdin.write(json.dumps(prompts_of(count, self._turn)) + "\n")
        self._process.stdin.flush()
        return float(self._line("TOOK")) / OUTPUT * 1e3

    def close(self) -> None:
        self._process.kill()
        self._process.wait(60)


def end_to_end(report: Report, rounds: int) -> None:
    python = python_of("vllm")
    with tempfile.TemporaryDirectory() as work:
        folder = make_tiny(Path(work) / "tiny")
        sides: dict[str, Any] = {"servekit": Ours(folder)}
        if python is not None:
            sides["vllm"] = Vllm(python, folder)
            report.peers["vllm"] = sides["vllm"].version or PEERS["vllm"]
        try:
            for count in SEQUENCES:
                for side in sides.values():
                    side.milliseconds_a_step(count)
                calls = {name: partial(side.milliseconds_a_step, count) for name, side in sides.items()}
                found = {name: median(values) for name, values in interleaved(calls, rounds).items()}
                for name, value in found.items():
                    report.figure(f"{name}_{count}_sequences_ms_a_step", value)
                if "vllm" in found:
                    ratio = report.figure(f"ratio_{count}_sequences", found["vllm"] / found["servekit"])
                    report.target(f"speed of a step over vLLM's at {count} sequences", ratio, ">=", 5.0)
        finally:
            for side in sides.values():
                side.close()


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report()
    for rows, target in ROWS_OF_TARGETS.items():
        steps = 128 if options.quick else 400
        for name, final_only in (("streamed", False), ("told_at_the_end", True)):
            taken = microseconds_of_a_step(rows, steps, final_only=final_only)
            report.figure(f"core_{rows}_running_{name}_us_a_step", taken)
            report.target(f"microseconds a step at {rows} running, {name}, model excluded", taken, "<=", target)
    requests = 2_000 if options.quick else 10_000
    speed = report.figure(f"core_trace_of_{requests}_requests_tokens_s", tokens_per_second_of_a_trace(requests))
    report.target("tokens a second of a trace through the core", speed, ">=", 200_000)
    end_to_end(report, 3 if options.quick else 7)
    report.finish(as_json=options.json)


if __name__ == "__main__":
    main()
