"""`servekit tune`: the shapes of a model's kernels, measured on the GPU at hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from common_platform.artifact import ModelFolder, open_model_folder
from common_platform.errors import DeviceError
from common_platform.platforms import Platform
from servekit.execution.choices import float8_of, platform_of
from servekit.kernels.choice import GPU
from servekit.kernels.spaces import ModelSizes, spaces_of
from servekit.kernels.tune import WORTH, Found, Space, Timer, device_seconds, entries, tune
from servekit.kernels.tuning import device_name, write

KINDS = ("int8", "fp8", "int4")
SpacesOf = Callable[[ModelSizes, torch.dtype, torch.device, Sequence[str], torch.dtype], Iterable[Space]]


def tune_model(
    model: Path,
    out: Path,
    dtype: str,
    kinds: Sequence[str] = (),
    timer: Timer | None = None,
    spaces: SpacesOf = spaces_of,
) -> Iterator[str]:
    """Lines that tell what was found; the last one names the file, which is written anew after each.

    Args:
        kinds: of ``KINDS``, the quantizations whose products are measured as well.
        timer: seconds of a call; None times on the GPU, which must be here.
        spaces: what is tried for the sizes of the model.

    Raises:
        DeviceError: there is no GPU.
    """
    platform = platform_of("auto")
    if timer is None and platform.name not in GPU:
        raise DeviceError("tune", platform.name, f"one of {', '.join(GPU)}: launches are measured on the device itself")
    with open_model_folder(model, verify=False) as folder:
        sizes = sizes_of(folder)
    found: list[Found] = []
    path = write(out, device_name(), {})
    device = torch.device(platform.device_type)
    for space in spaces(sizes, getattr(torch, dtype), device, _computed(kinds, platform), float8_of(platform)):
        one = tune(space, timer or device_seconds)
        found.append(one)
        write(out, device_name(), entries(found), _faster_library(space, one, timer or device_seconds, platform))
        gain = one.default_s / one.best_s
        told = f"{one.config}, {gain:.2f} times as fast as the default" if one.config else "the default is best"
        yield f"{one.kernel} {one.shape}: {told} ({one.num_failed} did not launch)"
    yield str(path)


def _faster_library(space: Space, found: Found, timer: Timer, platform: Platform) -> dict[str, str | None]:
    """FlashInfer for the kernel of ``space`` where it is here and beats the best that was found; None where not."""
    if space.make_other is None or platform.name != "cuda" or importlib.util.find_spec("flashinfer") is None:
        return {}
    return {space.kernel: "flashinfer" if timer(space.make_other()) < found.best_s * WORTH else None}


def sizes_of(folder: ModelFolder) -> ModelSizes:
    """What config.json says of the layers; a mixture's experts by the names that Qwen and Mixtral have for them."""
    config, number = folder.config, folder.config_int
    heads = number("num_attention_heads", high=1 << 14)
    kv_heads = number("num_key_value_heads", high=heads, default=heads)
    hidden = number("hidden_size", high=1 << 20)
    head_dim = number("head_dim", high=1 << 12, default=hidden // heads)
    inner = number("intermediate_size", high=1 << 24)
    attention = ((heads + 2 * kv_heads) * head_dim, hidden), (hidden, heads * head_dim)
    experts = next((key for key in ("num_experts", "num_local_experts") if key in config), None)
    if experts is None:
        linears = (*attention, (2 * inner, hidden), (hidden, inner))
        return ModelSizes(heads=heads, kv_heads=kv_heads, head_dim=head_dim, linears=linears)
    inner = number("moe_intermediate_size", high=1 << 24, default=inner)
    mixture = number(experts, high=1 << 12), number("num_experts_per_tok", high=1 << 8), hidden, inner
    return ModelSizes(heads=heads, kv_heads=kv_heads, head_dim=head_dim, linears=attention, experts=mixture)


def _computed(kinds: Sequence[str], platform: Platform) -> list[str]:
    """Those of ``kinds`` that the device computes with."""
    has_float8 = platform.name not in GPU or "float8_e4m3fn" in platform.dtypes
    return [kind for kind in kinds if kind != "fp8" or has_float8]
