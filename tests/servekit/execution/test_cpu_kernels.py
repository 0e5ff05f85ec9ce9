"""Which kernels a CPU run has: chosen, named, refused where they cannot be, and right in lower precision."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.tiny import make_folder

from common_platform.embedded import smollm2
from common_platform.errors import ConfigError
from servekit import LLM, SamplingParams
from servekit.execution.choices import ExecutorConfig
from servekit.execution.executor import InProcessExecutor
from servekit.kernels.native import native_library
from servekit.models.llama import Llama
from servekit.models.native_llama import NativeLlama

TEXT = (
    "The shared library holds one table of functions for each instruction set, and the best that the machine can run "
    "is chosen when it is loaded. A program is a list of operations which is recorded once and then replayed by one "
    "call for each step; threads take its tasks one by one, so that none of them waits for another that is late."
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("cpu") / "llama", vocab_size=300)


def executor_of(folder, **settings) -> InProcessExecutor:
    return InProcessExecutor(folder, ExecutorConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, NativeLlama),
        ({"dtype": "bfloat16"}, NativeLlama),
        ({"kernels": "native"}, NativeLlama),
        ({"kernels": "reference"}, Llama),
        ({"dtype": "float16"}, Llama),
        ({"deterministic": True, "dtype": "float32"}, Llama),
    ],
)
def test_the_kernels_are_those_asked_for(tiny, settings, kind):
    executor = executor_of(tiny, **settings)
    assert type(executor.model) is kind
    executor.stop()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kernels": "fast"}, "kernels: got fast.*auto, native, reference"),
        ({"quantization": "int3"}, "quantization: got int3.*int8, int4"),
        ({"quantization": "int4", "kernels": "reference"}, "quantization: got int4.*kernels is reference"),
        ({"quantization": "int8", "deterministic": True}, "quantization: got int8.*deterministic"),
        ({"quantization": "fp8"}, "quantization: got fp8.*int8 or int4 on a CPU"),
        ({"kernels": "native", "dtype": "float16"}, "kernels: got native.*float16"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: got fp8.*int8 here"),
        ({"kv_cache_dtype": "int8", "kernels": "reference"}, "kv_cache_dtype: got int8.*kernels is reference"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tiny, settings, says):
    with pytest.raises(ConfigError, match=says):
        executor_of(tiny, **settings)


def test_the_dtype_is_the_one_stored_where_our_kernels_run():
    executor = executor_of(smollm2())
    assert executor.dtype == torch.bfloat16
    executor.stop()
    executor = executor_of(smollm2(), kernels="reference")
    assert executor.dtype == torch.float32
    executor.stop()


@pytest.fixture(scope="module")
def exact() -> tuple[list[int], np.ndarray]:
    """The text's ids, and their logprobs in float32 by the reference kernels."""
    from servekit.engine.tokenizer import Tokenizer

    ids = Tokenizer.from_folder(smollm2()).encode(TEXT)
    executor = executor_of(smollm2(), kernels="reference")
    found = np.array(executor.score(ids))
    executor.stop()
    return ids, found


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"dtype": "float32"}, 1e-5),
        ({"dtype": "bfloat16"}, 0.02),
        ({"dtype": "float32", "kv_cache_dtype": "int8"}, 0.02),
        ({"dtype": "bfloat16", "kv_cache_dtype": "int8"}, 0.03),
        ({"quantization": "int8"}, 0.05),
        ({"quantization": "int4"}, 0.1),
    ],
)
def test_lower_precision_costs_little_of_the_likelihood(exact, settings, allowed):
    ids, expected = exact
    executor = executor_of(smollm2(), **settings)
    found = np.array(executor.score(ids, executor.kv_dtype))
    executor.stop()
    assert abs(found.mean() - expected.mean()) < allowed


def test_keys_and_values_of_8_bits_take_half_the_memory(tiny):
    sizes = {}
    for kv_cache_dtype in ("auto", "int8"):
        executor = executor_of(tiny, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
        sizes[kv_cache_dtype] = executor.bytes_per_block(16)
        width = executor.model.attentions[0].head_dim
        executor.stop()
    assert sizes["int8"] / sizes["auto"] == (width + 4) / (2 * width)  # 4 bytes: the scale


@pytest.mark.parametrize(
    ("quantization", "kv_cache_dtype"), [(None, "auto"), ("int8", "auto"), ("int4", "auto"), (None, "int8")]
)
def test_the_model_still_knows_what_it_knew(quantization, kv_cache_dtype):
    known = {"The capital of France is": " Paris", "1, 2, 3, 4, 5, 6, 7,": " 8, 9, 1"}
    settings = {"quantization": quantization, "kv_cache_dtype": kv_cache_dtype}
    with LLM(smollm2(), **settings, kv_cache_memory_bytes=64 << 20) as llm:
        outputs = llm.generate(list(known), SamplingParams(max_tokens=8, temperature=0))
    for output, start in zip(outputs, known.values(), strict=True):
        assert output.outputs[0].text.startswith(start)


@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_tokens_are_the_same_where_logits_are_not_written(settings):
    """Whoever wants logprobs has logits written; the others' tokens come out of the product."""
    prompts = [[3 + row, 50, 7 * row + 1] for row in range(5)]
    plain = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    told = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    with LLM(smollm2(), **settings, kv_cache_memory_bytes=16 << 20) as llm:
        found = [[o.outputs[0].token_ids for o in llm.generate(prompts, params)] for params in (plain, told)]
    assert found[0] == found[1]


def test_an_unknown_instruction_set_is_refused_and_a_lower_one_is_used():
    program = "from servekit.kernels.native import native_library as n; print(n().isa)"
    lowest = native_library().supported[-1]
    for wanted, status in ((lowest, 0), ("avx1024", 1)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"SERVEKIT_CPU_ISA": wanted},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == status
        assert (done.stdout.strip() == lowest) if status == 0 else ("SERVEKIT_CPU_ISA: got avx1024" in done.stderr)


def test_without_the_library_the_reference_kernels_run(tiny, tmp_path):
    program = f"""
from pathlib import Path
from servekit.kernels.native import library
library.PATH = Path({str(tmp_path / "nothing.so")!r})
from servekit.execution.choices import ExecutorConfig
from servekit.execution.executor import InProcessExecutor
print(type(InProcessExecutor({str(tiny)!r}, ExecutorConfig()).model).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "Llama", done.stderr
    assert done.stderr.count("no CPU kernels here") == 1
