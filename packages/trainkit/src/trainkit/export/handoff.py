"""Hand a model off: an ordinary Hugging Face folder with a manifest that proves what is in it."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trainkit
from common_platform.artifact import ArtifactWriter, Probe
from common_platform.errors import ConfigError, ExportError
from trainkit.lm.lora import has_adapter, merged
from trainkit.lm.tokenizer import load_tokenizer
from trainkit.module import TrainModule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5 << 30
QUESTIONS = ("What does `len(obj)` do in Python?", "Name three colours.", "1 2 3 4 5", "The capital of France is")


def handoff(
    module: TrainModule | nn.Module,
    tokenizer: Any,
    path: str | Path,
    *,
    dtype: str = "bfloat16",
    provenance: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    num_probes: int = 4,
    overwrite: bool = False,
) -> Path:
    """Write ``module`` where a server, or transformers, can take it up.

    Args:
        module: a ``TrainModule`` with a ``model`` of transformers, or such a model itself. An adapter of peft is
            merged into a copy first.
        tokenizer: a tokenizer of transformers, or a folder with one.
        path: the folder to write; it appears whole or not at all.
        dtype: of the weights in the file.
        provenance: added to what is known of the training: versions, git commit, step, time.
        metrics: how good it is, for the record.
        num_probes: texts whose logprobs are written down, as the model computes them in float32 from the weights as
            they stand in the file. Whoever loads it can compute them again.
        overwrite: replace what stands at ``path``.

    Raises:
        ConfigError: something stands at ``path``, or ``dtype`` is unknown.
        ExportError: there is no model of transformers in ``module``, or its weights are not finite.
        ArtifactError: it could not be written.
    """
    if dtype not in DTYPES:
        raise ConfigError("dtype", dtype, f"one of {tuple(DTYPES)}")
    if num_probes < 1:
        raise ConfigError("num_probes", num_probes, "1 or more: a server refuses what it cannot prove")
    model = _model_of(module)
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    tensors = _tensors(model, DTYPES[dtype])
    with ArtifactWriter(path, overwrite=overwrite) as writer:
        _write_weights(writer, tensors)
        _write_configs(writer, model, dtype)
        tokenizer.save_pretrained(writer.folder)
        writer.commit(
            model={
                "architectures": list(model.config.architectures or [type(model).__name__]),
                "model_type": model.config.model_type,
                "dtype": dtype,
                "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
            },
            tokenizer={"class": type(tokenizer).__name__, "vocab_size": len(tokenizer)},
            provenance=_provenance(module) | {"metrics": dict(metrics or {})} | dict(provenance or {}),
            probes=_probes(model, tensors, tokenizer, num_probes),
        )
    return Path(path)


def _model_of(module: nn.Module) -> Any:
    model = getattr(module, "model", module) if isinstance(module, TrainModule) else module
    if not hasattr(model, "config") or not hasattr(model, "get_output_embeddings"):
        raise ExportError("module", type(module).__name__, "a causal LM of transformers, or a TrainModule around one")
    return merged(model) if has_adapter(model) else model


def _tensors(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as they will stand in the file; an output embedding that is tied to the input stands there once."""
    state = model.state_dict()
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    tensors = {}
    for name, tensor in state.items():
        if name in tied:
            continue
        cast = tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        if cast.is_floating_point() and not torch.isfinite(cast).all():
            raise ExportError(name, "NaN or infinite weights", "finite ones")
        tensors[name] = cast
    return tensors


def _write_weights(writer: ArtifactWriter, tensors: dict[str, Tensor]) -> None:
    shards = _shards(tensors)
    if len(shards) == 1:
        writer.write_tensors("model.safetensors", tensors)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        writer.write_tensors(file, {name: tensors[name] for name in names})
        places |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    writer.write_json("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _shards(tensors: dict[str, Tensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _write_configs(writer: ArtifactWriter, model: Any, dtype: str) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = DTYPES[dtype]
    config.architectures = list(config.architectures or [type(model).__name__])
    config.save_pretrained(writer.folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(writer.folder)


def _probes(model: Any, tensors: dict[str, Tensor], tokenizer: Any, count: int) -> list[Probe]:
    """Logprobs of a few texts by the weights as written, in float32, without leaving a trace in ``model``."""
    device = next(model.parameters()).device
    written = copy.deepcopy(model).to("cpu", torch.float32).eval()
    written.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    written.to(device)
    return [_probe(written, ids) for ids in _probe_ids(tokenizer, count, model.config.vocab_size)]


def _probe_ids(tokenizer: Any, count: int, vocab_size: int) -> list[list[int]]:
    found = []
    for text in QUESTIONS[:count]:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i < vocab_size]
        if len(ids) > 1:
            found.append(ids)
    return found


@torch.inference_mode()
def _probe(model: Any, token_ids: Sequence[int]) -> Probe:
    ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)
    logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return Probe(list(token_ids), logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())


def _provenance(module: nn.Module) -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    about: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"trainkit": trainkit.__version__, **packages},
        "git_commit": _git_commit(),
    }
    if isinstance(module, TrainModule):
        about |= {"global_step": module.global_step, "hparams": dict(module.hparams)}
    return about


def _git_commit() -> str | None:
    """The commit of the working directory, if it is in a repository."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
