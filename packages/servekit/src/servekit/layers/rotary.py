"""Rotary angles for every position a model may see, by the scaling its config names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from common_platform.errors import ArtifactConfigError


class RotaryEmbedding:
    """Cosines and sines of all positions, made once.

    Args:
        parameters: config.json's ``rope_parameters`` (or ``rope_scaling`` and ``rope_theta`` of older files).
        rotary_dim: dimensions of a head that turn.
        max_positions: of the run.
        original_positions: ``max_position_embeddings`` of the config.

    Raises:
        ArtifactConfigError: a scaling that is not one of default, linear, dynamic, llama3, yarn.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        rotary_dim: int,
        max_positions: int,
        original_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        frequencies, factor = inverse_frequencies(parameters, rotary_dim, original_positions)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
        self._cos = (angles.cos() * factor).to(device, dtype)
        self._sin = (angles.sin() * factor).to(device, dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[tokens, 1, rotary_dim]`` of ``positions`` ``[tokens]``: once a step, for all layers."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The parameters in one form, whichever age the config has."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def inverse_frequencies(parameters: dict[str, Any], dim: int, original_positions: int) -> tuple[Tensor, float]:
    """The inverse frequencies ``[dim / 2]`` float32 and the factor on cosines and sines.

    ``dynamic`` (NTK by length) equals ``default`` up to the length that the model was made for, and longer runs are
    refused elsewhere. Sources: linear, Chen et al. 2023; yarn, Peng et al. 2023; llama3, Meta's Llama 3.1 code.
    """
    kind = parameters.get("rope_type", "default")
    theta = _number(parameters, "rope_theta")
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return plain / _number(parameters, "factor"), 1.0
    if kind == "llama3":
        return _llama3(plain, parameters), 1.0
    if kind == "yarn":
        return _yarn(plain, parameters, theta, dim, original_positions)
    raise ArtifactConfigError(
        "config.json rope_parameters.rope_type", kind, "one of default, linear, dynamic, llama3, yarn"
    )


def _number(parameters: dict[str, Any], key: str, default: float | None = None) -> float:
    value = parameters.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ArtifactConfigError(f"config.json rope_parameters.{key}", value, "a number above 0")
    return float(value)


def _llama3(plain: Tensor, parameters: dict[str, Any]) -> Tensor:
    factor, low = _number(parameters, "factor"), _number(parameters, "low_freq_factor")
    high, original = _number(parameters, "high_freq_factor"), _number(parameters, "original_max_position_embeddings")
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(wavelength > original / low, plain / factor, plain)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled)


def _yarn(plain: Tensor, parameters: dict[str, Any], theta: float, dim: int, positions: int) -> tuple[Tensor, float]:
    factor = _number(parameters, "factor")
    original = _number(parameters, "original_max_position_embeddings", float(positions))
    fast, slow = _number(parameters, "beta_fast", 32.0), _number(parameters, "beta_slow", 1.0)

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(fast), dimension(slow)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - first) / max(last - first, 0.001)).clamp(0, 1)
    frequencies = plain / factor * ramp + plain * (1 - ramp)
    return frequencies, _yarn_factor(parameters, factor)


def _yarn_factor(parameters: dict[str, Any], factor: float) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(float(one)) / scale(float(all_dims)) if one and all_dims else scale(1.0)
