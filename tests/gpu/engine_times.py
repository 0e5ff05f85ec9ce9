"""The engine on random weights of real shapes: greedy parity, throughput beside peers, graphs and single launches."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tests.gpu.folders import SHAPES, write_folder
from tests.gpu.machine import Stopwatch, bounds, has_package, synchronize

PARITY_TOKENS = 24


def scratch(needed_bytes: int) -> Path:
    """A folder for a model: in memory where there is room, else on the disk."""
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free > 2 * needed_bytes:
        return Path(tempfile.mkdtemp(dir=shared, prefix="gpu-"))
    return Path(tempfile.mkdtemp(prefix="gpu-"))


def parity(device: torch.device, *, is_dry: bool) -> dict[str, Any]:
    """Greedy tokens beside Transformers in float32, and how far its logprobs are from the engine's in low precision."""
    import transformers

    from servekit import LLM, SamplingParams

    shape = SHAPES["tiny" if is_dry else "small"]
    prompts = [[5, 9, 200, 7], list(range(3, 60)), [77], [(i * 7919) % 250 for i in range(130)]][: 2 if is_dry else 4]
    num_tokens = 4 if is_dry else PARITY_TOKENS
    folder = scratch(shape.num_parameters * 4)
    try:
        write_folder(folder, shape, torch.float32, device)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).to(device)
        expected = [_generate(model, prompt, num_tokens, device) for prompt in prompts]
        del model
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        found = {}
        for name, settings in {"graphs": {}, "eager": {"enforce_eager": True}}.items():
            with _llm(LLM, folder, device, dtype="float32", max_num_seqs=4, max_model_len=256, **settings) as llm:
                outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            found[name] = sum(tokens[i] == expected[i] for i in range(len(prompts)))
        same = all(count == len(prompts) for count in found.values())
        return {"prompts": len(prompts), "tokens_each": num_tokens, "equal": found, "ok": same}
    finally:
        shutil.rmtree(folder)


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


def throughput(name: str, device: torch.device, *, is_dry: bool) -> dict[str, Any]:
    """Tokens a second of the shape ``name``, by us and by the peers that are here."""
    shape = SHAPES["tiny" if is_dry else name]
    load = Load(is_dry=is_dry)
    dtype = torch.float32 if is_dry else torch.bfloat16
    bandwidth = bounds(Stopwatch(device, is_dry=is_dry), device, is_dry=is_dry)["bandwidth_bytes_per_s"]
    folder = scratch(shape.num_parameters * dtype.itemsize)
    figures: dict[str, Any] = {"parameters": shape.num_parameters, "peers": {}}
    try:
        started = time.perf_counter()
        write_folder(folder, shape, dtype, device)
        figures["made_in_s"] = time.perf_counter() - started
        figures["graphs"] = _ours(folder, load, device, {})
        if name == "1b":
            figures["eager"] = _ours(folder, load, device, {"enforce_eager": True})
        bound = bandwidth / (shape.num_parameters * dtype.itemsize)
        single = figures["graphs"]["tokens_per_s"]["1"]
        figures |= {"single_stream_bound_tokens_per_s": bound, "single_stream_share": single / bound}
        figures["peers"]["transformers"] = _transformers(folder, load, device, dtype)
        if has_package("vllm") and not is_dry:
            figures["peers"]["vllm"] = _vllm(folder, load)
    finally:
        shutil.rmtree(folder)
    return figures


def _prompts(count: int, length: int, vocab: int) -> list[list[int]]:
    return [[(row * 7919 + i * 104729) % (vocab - 3) + 3 for i in range(length)] for row in range(count)]


def _ours(folder: Path, load: Load, device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    from servekit import LLM, SamplingParams

    started = time.perf_counter()
    most = max(load.concurrent)
    with _llm(
        LLM,
        folder,
        device,
        dtype=load.dtype,
        max_model_len=load.prompt + load.answer + 16,
        max_num_seqs=most,
        max_num_batched_tokens=max(2048, most) if device.type == "cuda" else 16,
        enable_prefix_caching=False,
        **settings,
    ) as llm:
        figures: dict[str, Any] = {"ready_in_s": time.perf_counter() - started, "tokens_per_s": {}}
        vocab = llm.facts.vocab_size
        params = SamplingParams(temperature=0, max_tokens=load.answer, ignore_eos=True)
        llm.generate([{"prompt_token_ids": p} for p in _prompts(2, load.prompt, vocab)], params)
        for count in load.concurrent:
            prompts = [{"prompt_token_ids": prompt} for prompt in _prompts(count, load.prompt, vocab)]
            begin = time.perf_counter()
            outputs = llm.generate(prompts, params)
            synchronize()
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            figures["tokens_per_s"][str(count)] = tokens / (time.perf_counter() - begin)
    _forget()
    return figures


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _transformers(folder: Path, load: Load, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One stream, and a batch that is padded to nothing: prompts are of one length, which is its best case."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    figures = {}
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
                figures[str(rows)] = rows * answer / (time.perf_counter() - begin)
    del model
    _forget()
    return {"tokens_per_s": figures}


def _vllm(folder: Path, load: Load) -> dict[str, Any]:
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
    figures = {}
    for count in load.concurrent:
        prompts = [{"prompt_token_ids": prompt} for prompt in _prompts(count, load.prompt, 1000)]
        begin = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        figures[str(count)] = tokens / (time.perf_counter() - begin)
    return {"tokens_per_s": figures}
