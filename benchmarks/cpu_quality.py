"""What lower precision costs on a CPU: perplexity of real text, and memory, beside float32 by the reference kernels.

The text is Python's own language reference, which every Python has (``pydoc_data.topics``), in pieces of 1,024
tokens. Each precision is a process of its own, so that its peak memory is its own. Keys and values are of the type that
the engine keeps them in.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

from common import Report, arguments

PIECE, STRIDE = 1024, 6  # tokens of a piece; every sixth piece of the text
SETTINGS: dict[str, dict[str, Any]] = {
    "float32 reference": {"dtype": "float32", "kernels": "reference"},
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, int8 keys and values": {"dtype": "bfloat16", "kv_cache_dtype": "int8"},
    "int8": {"quantization": "int8"},
    "int8, int8 keys and values": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int4": {"quantization": "int4"},
}
ALLOWED = {  # times the reference's
    "float32": 1.0005,
    "bfloat16": 1.002,
    "bfloat16, int8 keys and values": 1.005,
    "int8": 1.005,
    "int8, int8 keys and values": 1.01,
    "int4": 1.05,
}
CHILD = """
import json, resource, sys
import pydoc_data.topics
from common_platform.embedded import smollm2
from servekit.engine.tokenizer import Tokenizer
from servekit.execution.choices import ExecutorConfig
from servekit.execution.executor import InProcessExecutor
settings, pieces, piece, stride = json.loads(sys.argv[1])
topics = pydoc_data.topics.topics
ids = Tokenizer.from_folder(smollm2()).encode("\\n\\n".join(topics[name] for name in sorted(topics)))
executor = InProcessExecutor(smollm2(), ExecutorConfig(**settings))
loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
logprobs = []
for i in range(pieces):
    logprobs += executor.score(ids[i * stride * piece : (i * stride + 1) * piece], executor.kv_dtype)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"tokens": len(logprobs), "mean": sum(logprobs) / len(logprobs), "loaded": loaded, "peak": peak}))
"""


def measured(settings: dict[str, Any], pieces: int) -> dict[str, float]:
    asked = json.dumps([settings, pieces, PIECE, STRIDE])
    done = subprocess.run([sys.executable, "-c", CHILD, asked], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report()
    pieces = 4 if options.quick else 14
    reference = math.nan
    for name, settings in SETTINGS.items():
        found = measured(settings, pieces)
        perplexity = report.figure(f"{name}: perplexity", math.exp(-found["mean"]))
        report.figure(f"{name}: peak memory with the model loaded, MiB", found["loaded"] / 1024)
        if name in ALLOWED:
            report.target(f"{name}: perplexity over the reference's", perplexity / reference, "<=", ALLOWED[name])
        else:
            reference = perplexity
    report.figure("tokens scored", found["tokens"])
    report.finish(as_json=options.json)


if __name__ == "__main__":
    main()
