"""OpenVINO GenAI's continuous batching: ``EXPORTED_FOLDER JSON_SETTINGS``."""

from __future__ import annotations

import itertools
import json
import sys
import time

start = time.perf_counter()

import openvino as ov  # noqa: E402
import openvino_genai as genai  # noqa: E402
from driver import serve  # noqa: E402


def main() -> None:
    settings = json.loads(sys.argv[2])
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.enable_prefix_caching = True
    properties = {"INFERENCE_NUM_THREADS": settings["threads"]}
    pipe = genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU", properties)
    calls = itertools.count()

    def generate(prompts: list[list[int]], outputs: list[int], shared: int) -> int:
        configs = []
        for count in outputs:
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = count
            config.ignore_eos, config.do_sample = True, False
            configs.append(config)
        shift = next(calls)  # the cache cannot be emptied, so that no round may ask what an earlier one did
        inputs = [ov.Tensor([[token + shift for token in prompt]]) for prompt in prompts]
        answers = pipe.generate(inputs, configs)
        return sum(len(answer.m_generation_ids[0]) for answer in answers)

    serve(generate, {"load_s": time.perf_counter() - start, "version": genai.__version__})


main()
