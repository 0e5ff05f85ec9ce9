"""Transformers' ``generate``, one request after the other: ``MODEL_FOLDER JSON_SETTINGS``."""

from __future__ import annotations

import json
import sys
import time

start = time.perf_counter()

import torch  # noqa: E402
import transformers  # noqa: E402
from driver import serve  # noqa: E402


def main() -> None:
    settings = json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    dtype = getattr(torch, settings["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=dtype).eval()

    @torch.inference_mode()
    def generate(prompts: list[list[int]], outputs: list[int], shared: int) -> int:
        total = 0
        for prompt, count in zip(prompts, outputs, strict=True):
            ids = torch.tensor([prompt])
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
            )
            total += answer.shape[1] - len(prompt)
        return total

    serve(generate, {"load_s": time.perf_counter() - start, "version": transformers.__version__})


main()
