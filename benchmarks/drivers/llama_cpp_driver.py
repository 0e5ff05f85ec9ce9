"""llama.cpp by its batch interface: ``GGUF_FILE JSON_SETTINGS``.

All sequences are decoded together in one ``llama_decode``; prompts go in by batches of up to ``n_batch`` tokens, and a
prefix that all share is computed once and copied, which is what its own server does for a slot.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

start = time.perf_counter()

import llama_cpp as ll  # noqa: E402
from driver import serve  # noqa: E402

BATCH = 512


class Context:
    """A model, and room for ``n_ctx`` tokens of up to ``n_seq_max`` sequences."""

    def __init__(self, path: str, threads: int, n_ctx: int, n_seq_max: int) -> None:
        settings = ll.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = ll.llama_model_load_from_file(path.encode(), settings)
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = n_ctx, n_seq_max, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        params.no_perf = True
        self.context = ll.llama_init_from_model(self.model, params)
        self.memory = ll.llama_get_memory(self.context)
        self.greedy = ll.llama_sampler_init_greedy()
        self.batch = ll.llama_batch_init(BATCH, 0, 1)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, wants an answer); the next token of each that wants one."""
        answers = []
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            batch = self.batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, wanted
            if ll.llama_decode(self.context, batch):
                raise RuntimeError("llama_decode failed")
            answers += [ll.llama_sampler_sample(self.greedy, self.context, i) for i, t in enumerate(part) if t[3]]
        return answers

    def generate(self, prompts: list[list[int]], outputs: list[int], shared: int) -> int:
        ll.llama_memory_clear(self.memory, True)
        if shared:
            self.decode([(token, i, 0, False) for i, token in enumerate(prompts[0][:shared])])
            for sequence in range(1, len(prompts)):
                ll.llama_memory_seq_cp(self.memory, 0, sequence, 0, shared)
        fresh = [
            (token, i, sequence, i == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
            if i >= shared
        ]
        said = {sequence: [token] for sequence, token in enumerate(self.decode(fresh))}
        running = [s for s in said if outputs[s] > 1]
        while running:
            step = [(said[s][-1], len(prompts[s]) + len(said[s]) - 1, s, True) for s in running]
            for s, token in zip(running, self.decode(step), strict=True):
                said[s].append(token)
            running = [s for s in running if len(said[s]) < outputs[s]]
        return sum(map(len, said.values()))


def main() -> None:
    settings = json.loads(sys.argv[2])
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    ll.llama_backend_init()
    context = Context(sys.argv[1], settings["threads"], settings["n_ctx"], settings["n_seq_max"])
    serve(context.generate, {"load_s": time.perf_counter() - start, "version": ll.__version__})


main()
