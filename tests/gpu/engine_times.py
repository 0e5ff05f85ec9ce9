"""The engine on random weights of real shapes: greedy parity, throughput beside peers, graphs and single launches."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.gpu.folders import SHAPES, write_folder
from tests.gpu.machine import Stopwatch, bounds, forget, has_package, stop_if_broken, synchronize
from tests.gpu.progress import Progress
from tests.gpu.stages import AGAIN
from tests.gpu.work import device_of

Put = Callable[..., None]  # a figure, and the keys that lead to it
PARITY_TOKENS = 24


def scratch() -> Path:
    """The folder that the stage was given."""
    return Path(os.environ["GPU_SCRATCH"])


def parity(progress: Progress, is_dry: bool) -> int:
    """Greedy tokens beside Transformers in float32, with recorded graphs and without."""
    import transformers

    device = device_of(is_dry=is_dry)
    shape = SHAPES["tiny" if is_dry else "small"]
    prompts = [[5, 9, 200, 7], list(range(3, 60)), [77], [(i * 7919) % 250 for i in range(130)]][: 2 if is_dry else 4]
    num_tokens = 4 if is_dry else PARITY_TOKENS
    folder = scratch() / "parity"
    write_folder(folder, shape, torch.float32, device)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).to(device)
    expected = [_generate(model, prompt, num_tokens, device) for prompt in prompts]
    progress.put(len(prompts), "prompts")
    runs: dict[str, tuple[torch.device, dict[str, Any]]] = {
        "graphs": (device, {}),
        "eager": (device, {"enforce_eager": True}),
    }
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        runs["second device"] = torch.device("cuda:1"), {}
    for name, (where, settings) in runs.items():
        if not progress.begins(name):
            continue
        found = _greedy(folder, prompts, num_tokens, where, settings)
        forget()
        differing = [
            _difference(model, prompt, want, got, device)
            for prompt, want, got in zip(prompts, expected, found, strict=True)
            if want != got
        ]
        progress.put(len(prompts) - len(differing), "equal", name)
        if differing:
            progress.put(differing, "differing", name)
            progress.put(False, "ok")
    return 0


def _greedy(
    folder: Path, prompts: list[list[int]], num_tokens: int, device: torch.device, settings: dict[str, Any]
) -> list[list[int]]:
    """By a cache of its own small size: other proofs run on the device at the same time."""
    from servekit import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    sizes = {"max_num_seqs": 4, "max_model_len": 256, "kv_cache_memory_bytes": 64 << 20}
    with _llm(LLM, folder, device, dtype="float32", **sizes, **settings) as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        return [list(output.outputs[0].token_ids) for output in outputs]


def _difference(
    model: Any, prompt: list[int], expected: list[int], found: list[int], device: torch.device
) -> dict[str, Any]:
    """Where tokens first differ, and how far apart Transformers has the two: hardly at all where it is a tie."""
    at = next(i for i, (want, got) in enumerate(zip(expected, found, strict=True)) if want != got)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + expected[:at]], device=device)).logits[0, -1].float()
    gap = float(logits[expected[at]] - logits[found[at]])
    return {"prompt_tokens": len(prompt), "at": at, "expected": expected[at], "found": found[at], "logit_gap": gap}


def _llm(kind: Any, folder: Path, device: torch.device, **settings: Any) -> Any:
    return kind(folder, kernels="triton", device=str(device), **settings)


def _generate(model: Any, prompt: list[int], num_tokens: int, device: torch.device) -> list[int]:
    ids = torch.tensor([prompt], device=device)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()


class Load:
    """How much of it: prompts of so many tokens, answers of so many."""

    def __init__(self, *, is_dry: bool) -> None:
        self.prompt, self.answer = (8, 3) if is_dry else (128, 128)
        self.concurrent = (1, 2) if is_dry else (1, 64, 256)
        self.dtype = "float32" if is_dry else "bfloat16"
        self.peer_rows = 2 if is_dry else 16


def throughput(name: str, progress: Progress, *, is_dry: bool) -> int:
    """Tokens a second of the shape ``name``, by us and by the peers that are here; one after the other."""
    device = device_of(is_dry=is_dry)
    shape = SHAPES["tiny" if is_dry else name]
    load = Load(is_dry=is_dry)
    dtype = torch.float32 if is_dry else torch.bfloat16
    folder = scratch() / name
    if progress.begins("model"):
        started = time.perf_counter()
        write_folder(folder, shape, dtype, device)
        bandwidth = bounds(Stopwatch(device, is_dry=is_dry), device, is_dry=is_dry)["bandwidth_bytes_per_s"]
        bound = bandwidth / (shape.num_parameters * dtype.itemsize)
        progress.put(shape.num_parameters, "parameters")
        progress.put(bound, "single_stream_bound_tokens_per_s")
        progress.put(time.perf_counter() - started, "made_in_s")
        forget()
    runs: dict[str, Callable[[Put], None]] = {
        "graphs": lambda put: _ours(folder, load, device, {}, put),
        "transformers": lambda put: _transformers(folder, load, device, dtype, put),
    }
    if name == "1b":
        runs["eager"] = lambda put: _ours(folder, load, device, {"enforce_eager": True}, put)
    if has_package("vllm") and not is_dry:
        runs["vllm"] = lambda put: _vllm(folder, load, put)
    for run, measure in runs.items():
        if not progress.begins(run):
            continue
        is_last = run == list(runs)[-1]
        try:
            measure(lambda value, *at, run=run: progress.put(value, "runs", run, *at))
        except Exception as error:  # noqa: BLE001 - told in the report; the others go on
            progress.put({"error": repr(error)[:500], "trace": traceback.format_exc()[-1500:]}, "errors", run)
            progress.put(False, "ok")
            stop_if_broken()
        forget()
        if not (is_dry or is_last):
            return AGAIN  # whatever this run still holds of the device's memory is not the next one's
    return 0


def _prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    return [[(row * 7919 + i * 104729) % (vocab - 3) + 3 for i in range(length)] for row in range(count)]


def _ours(folder: Path, load: Load, device: torch.device, settings: dict[str, Any], put: Put) -> None:
    """
    Raises:
        RuntimeError: a request waited until a kernel was compiled; the figures are there nevertheless.
    """
    from common_platform.kernels import compilations
    from servekit import LLM, SamplingParams

    started = time.perf_counter()
    most = max(load.concurrent)
    with (
        _llm(
            LLM,
            folder,
            device,
            dtype=load.dtype,
            max_model_len=load.prompt + load.answer + 16,
            max_num_seqs=most,
            max_num_batched_tokens=max(2048, most) if device.type == "cuda" else 16,
            enable_prefix_caching=False,
            **settings,
        ) as llm,
        compilations() as late,
    ):
        put(time.perf_counter() - started, "ready_in_s")
        put(llm.collective_rpc(lambda runner: runner.graph_bytes)[0], "graph_bytes")
        vocab = llm.facts.vocab_size
        params = SamplingParams(temperature=0, max_tokens=load.answer, ignore_eos=True)
        llm.generate([{"prompt_token_ids": p} for p in _prompts(2, load.prompt, vocab)], params)
        for count in load.concurrent:
            prompts = [{"prompt_token_ids": prompt} for prompt in _prompts(count, load.prompt, vocab)]
            begin = time.perf_counter()
            outputs = llm.generate(prompts, params)
            synchronize()
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            put(tokens / (time.perf_counter() - begin), "tokens_per_s", str(count))
        if not settings and device.type == "cuda":
            _put_steps(llm, load, put)
        put(len(late), "compiled_while_serving")
        if late:
            raise RuntimeError(f"compiled while requests were served: {late[:5]}")


def _put_steps(llm: Any, load: Load, put: Put) -> None:
    """A decode step as the engine takes it, beside the same step's kernels queued one behind the other."""
    from servekit import SamplingParams

    rows = load.concurrent[1]
    prompts = [{"prompt_token_ids": prompt} for prompt in _prompts(rows, 4, llm.facts.vocab_size)]
    begin = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=load.answer, ignore_eos=True))
    put((time.perf_counter() - begin) / load.answer, "step_s", "engine")
    put(llm.collective_rpc(kernels_of_a_step, rows)[0], "step_s", "kernels")


def kernels_of_a_step(runner: Any, rows: int) -> float:
    """Seconds on the device, with the rows as they were left; Python is ahead, for it launches three things a step."""
    from servekit.kernels.sample.triton_backend import sample

    floats = torch.stack((torch.zeros(rows), torch.ones(rows))).to(runner.device)
    top_k = torch.full((rows,), runner.model.vocab_size, dtype=torch.int32, device=runner.device)
    seeds = torch.zeros(rows, dtype=torch.int64, device=runner.device)

    @torch.inference_mode()
    def step() -> None:
        logits = runner.model.logits(runner.forward.replay_decode(rows))
        sample(logits, floats[0], top_k, floats[1], floats[0], seeds)

    return Stopwatch(runner.device, is_dry=runner.device.type == "cpu").seconds(step)


def _transformers(folder: Path, load: Load, device: torch.device, dtype: torch.dtype, put: Put) -> None:
    """One stream, and a batch that is padded to nothing: prompts are of one length, which is its best case."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    for rows in (1, load.peer_rows):
        ids = torch.tensor(_prompts(rows, load.prompt, model.config.vocab_size), device=device)
        answer = min(load.answer, 32)
        for timed in (False, True):
            synchronize()
            begin = time.perf_counter()
            with torch.no_grad():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=answer,
                    min_new_tokens=answer,
                    do_sample=False,
                    eos_token_id=None,
                )
            synchronize()
            if timed:
                put(rows * answer / (time.perf_counter() - begin), "tokens_per_s", str(rows))


def _vllm(folder: Path, load: Load, put: Put) -> None:
    import vllm

    engine = vllm.LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=load.prompt + load.answer + 16,
        max_num_seqs=max(load.concurrent),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=load.answer, ignore_eos=True, detokenize=False)
    for count in load.concurrent:
        prompts = [{"prompt_token_ids": prompt} for prompt in _prompts(count, load.prompt, 1000)]
        begin = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        put(tokens / (time.perf_counter() - begin), "tokens_per_s", str(count))
