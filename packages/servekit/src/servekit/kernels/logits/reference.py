"""Penalties, masks and biases in plain steps; each changes the logits in place."""

from __future__ import annotations

import torch
from torch import Tensor


def penalise(
    logits: Tensor,
    rows: Tensor,
    slots: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """OpenAI's presence and frequency penalties on the output, CTRL's repetition penalty on prompt and output.

    Args:
        logits: ``[all rows, vocab]`` float32.
        rows: ``[n]`` int64, those that have penalties.
        slots: ``[n]`` int64, where each has its state.
        counts: ``[slots, vocab]`` int32, occurrences in the output.
        in_prompt: ``[slots, vocab]`` bool.
        presence, frequency, repetition: ``[n]`` float32.
    """
    seen_times, picked = counts[slots].float(), logits[rows]
    seen = in_prompt[slots] | (seen_times > 0)
    by = repetition[:, None]
    picked = torch.where(seen, torch.where(picked > 0, picked / by, picked * by), picked)
    logits[rows] = picked - frequency[:, None] * seen_times - presence[:, None] * (seen_times > 0)


def mask(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """Forbid tokens: row ``rows[i]`` keeps token t where bit t % 32 of ``bits[i, t // 32]`` is set.

    Args:
        rows: ``[n]`` int64.
        bits: ``[n, ceil(vocab / 32)]`` int32.
    """
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (bits.view(torch.uint8)[:, :, None] & powers).view(len(bits), -1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill(allowed == 0, float("-inf"))


def add_bias(logits: Tensor, rows: Tensor, tokens: Tensor, biases: Tensor) -> None:
    """Add ``biases[i]`` to token ``tokens[i]`` of row ``rows[i]``; no pair occurs twice. All are ``[n]``."""
    logits[rows, tokens] += biases
