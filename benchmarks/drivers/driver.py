"""What every driver of a peer shares: one JSON line in, one out.

A driver runs in its peer's environment and imports nothing of ours. Its first line says that it is ready;
then each line ``{"prompts": [[token id, ...], ...], "outputs": [count, ...], "shared": tokens}`` is answered by the
seconds that all of it took, on the clock and of the process's CPU time: every prompt's greedy continuation of exactly
that many tokens, all requests at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], list[int], int], int]  # prompts, outputs, shared tokens -> tokens generated


def serve(generate: Generate, about: dict[str, object]) -> None:
    """Answer until the input ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start, cpu = time.perf_counter(), time.process_time()
        tokens = generate(asked["prompts"], asked["outputs"], asked.get("shared", 0))
        taken, used = time.perf_counter() - start, time.process_time() - cpu
        print(json.dumps({"seconds": taken, "cpu_seconds": used, "tokens": tokens}), file=out, flush=True)
