"""``servekit bench throughput`` and ``latency``: a model loaded here, without a server."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from servekit.bench.workload import Workload, asks_of
from servekit.llm import LLM
from servekit.sampling.parameters import SamplingParams

PERCENTILES = (10, 25, 50, 75, 90, 99)


def throughput(llm: LLM, workload: Workload) -> dict[str, Any]:
    """All prompts at once through ``LLM.generate``; every answer has its full length."""
    asks = asks_of(workload, llm.tokenizer)
    params = [SamplingParams(max_tokens=ask.output_len, ignore_eos=True, temperature=1.0, seed=0) for ask in asks]
    llm.generate("warm", SamplingParams(max_tokens=2, ignore_eos=True))
    began = time.perf_counter()
    outputs = llm.generate([ask.prompt for ask in asks], params)
    taken = time.perf_counter() - began
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "elapsed_time": taken,
        "num_requests": len(asks),
        "total_num_tokens": num_input + num_output,
        "requests_per_second": len(asks) / taken,
        "tokens_per_second": (num_input + num_output) / taken,
        "output_tokens_per_second": num_output / taken,
    }


def latency(
    llm: LLM, *, input_len: int, output_len: int, batch_size: int, num_iters: int, num_warmup: int
) -> dict[str, Any]:
    """Seconds that a batch takes from its prompts to the last token of all."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=1.0, seed=0)
    taken = []
    for turn in range(num_warmup + num_iters):  # other tokens each time: nothing comes out of the prefix cache
        chance = np.random.default_rng(turn)
        prompts = chance.integers(0, llm.facts.vocab_size, (batch_size, input_len)).tolist()
        began = time.perf_counter()
        llm.generate(prompts, params)
        taken.append(time.perf_counter() - began)
    values = np.asarray(taken[num_warmup:])
    return {
        "avg_latency": float(values.mean()),
        "latencies": values.tolist(),
        "percentiles": {str(p): float(np.percentile(values, p)) for p in PERCENTILES},
    }
