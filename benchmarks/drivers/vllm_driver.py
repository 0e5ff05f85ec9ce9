"""vLLM's CPU build: ``MODEL_FOLDER JSON_SETTINGS``, the settings being those of ``vllm.LLM``."""

from __future__ import annotations

import json
import os
import sys
import time

start = time.perf_counter()
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main() -> None:
    import vllm
    from driver import serve
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], disable_log_stats=True, **json.loads(sys.argv[2]))

    def generate(prompts: list[list[int]], outputs: list[int], shared: int) -> int:
        params = [
            SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, detokenize=False) for count in outputs
        ]
        answers = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        llm.reset_prefix_cache()
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    serve(generate, {"load_s": time.perf_counter() - start, "version": vllm.__version__})


if __name__ == "__main__":
    main()
