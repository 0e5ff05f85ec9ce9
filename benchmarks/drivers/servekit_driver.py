"""servekit by its Python interface: ``MODEL_FOLDER JSON_SETTINGS``."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

start = time.perf_counter()

from driver import serve  # noqa: E402

from servekit import LLM, SamplingParams  # noqa: E402


def write_cache(runner: Any) -> None:
    """Take the memory of keys and values, as a server has after a while: each page is cleared at its first use."""
    for attention in runner.model.attentions:
        for part in attention.caches:
            part.zero_()


def main() -> None:
    llm = LLM(sys.argv[1], **json.loads(sys.argv[2]))
    llm.collective_rpc(write_cache)

    def generate(prompts: list[list[int]], outputs: list[int], shared: int) -> int:
        params = [
            SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False) for count in outputs
        ]
        answers = llm.generate(prompts, params)
        llm.reset_prefix_cache()
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    serve(generate, {"load_s": time.perf_counter() - start})


main()
