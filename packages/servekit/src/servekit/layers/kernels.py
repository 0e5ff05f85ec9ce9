"""Which implementation of each operation the layers of a model call: chosen once, when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from servekit.kernels import linear as linears
from servekit.kernels import logits as logit_edits
from servekit.kernels import paged_attention as attention
from servekit.kernels import rms_norm as norm
from servekit.kernels import silu_and_mul as gate
from servekit.kernels.choice import TRITON, backend_of, function_of, libraries_of
from servekit.kernels.linear import deterministic as deterministic_linears
from servekit.kernels.paged_attention import deterministic as deterministic_attention
from servekit.kernels.paged_attention.flashinfer_adapter import FlashInferAttention
from servekit.kernels.paged_attention.metadata import build_metadata, paged_metadata
from servekit.kernels.rms_norm import deterministic as deterministic_norm
from servekit.kernels.silu_and_mul import deterministic as deterministic_gate
from servekit.layers.attention import MetadataBuilder, PagedAttention, RopeKVWrite
from servekit.layers.few_bits import EightBits, FewBitKernels, FourBits, Rounded

Sample = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitKernels:
    """``servekit.kernels.logits``: what changes logits before a token is drawn."""

    penalise: Callable[..., None] = logit_edits.penalise
    mask: Callable[[Tensor, Tensor, Tensor], None] = logit_edits.mask
    add_bias: Callable[[Tensor, Tensor, Tensor, Tensor], None] = logit_edits.add_bias


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The operations that have more than one implementation; by default the fastest here.

    ``linear_of`` makes a product from a weight and its bias; the others are called as they stand. ``rope_kv_write`` and
    ``sample`` are None where the steps are taken one by one; ``build_metadata`` makes what ``paged_attention`` reads.
    ``few_bits``: what becomes of the linear layers between embedding and head; None leaves them as they are.
    """

    linear_of: Callable[[Tensor, Tensor | None], linears.Linear] = linears.linear_of
    paged_attention: PagedAttention = attention.paged_attention
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = norm.rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = norm.add_rms_norm
    silu_and_mul: Callable[[Tensor], Tensor] = gate.silu_and_mul
    gelu_and_mul: Callable[..., Tensor] = gate.gelu_and_mul
    rope_kv_write: RopeKVWrite | None = None
    build_metadata: MetadataBuilder = build_metadata
    sample: Sample | None = None
    logits: LogitKernels = LogitKernels()
    few_bits: EightBits | FourBits | None = None

    @property
    def layer_linear_of(self) -> Callable[[Tensor, Tensor | None], linears.Linear]:
        """``linear_of`` for the layers between embedding and head."""
        return self.linear_of if self.few_bits is None else self.few_bits.linear_of

    @property
    def silu_and_mul_to_linear(self) -> Callable[[Tensor], Tensor | Rounded]:
        """``silu_and_mul`` whose result only a linear layer reads."""
        return self.few_bits.silu_and_mul if isinstance(self.few_bits, EightBits) else self.silu_and_mul


def deterministic_kernels() -> Kernels:
    """Those that give a token the same bits whatever else is computed with it."""
    return Kernels(
        linear_of=deterministic_linears.TiledLinears(),
        paged_attention=deterministic_attention.paged_attention,
        rms_norm=deterministic_norm.rms_norm,
        add_rms_norm=deterministic_norm.add_rms_norm,
        silu_and_mul=deterministic_gate.silu_and_mul,
    )


def kernels_of(platform: str) -> Kernels:
    """Those that ``servekit.kernels.choice`` has for a platform (``Platform.name``)."""
    if backend_of("paged_attention", platform) != TRITON:
        return Kernels()
    attention = function_of("paged_attention", "paged_attention", platform)
    faster = libraries_of("paged_attention", platform)
    if faster:
        attention = FlashInferAttention(attention, faster)
    return Kernels(
        paged_attention=attention,
        rms_norm=function_of("rms_norm", "rms_norm", platform),
        add_rms_norm=function_of("rms_norm", "add_rms_norm", platform),
        silu_and_mul=function_of("silu_and_mul", "silu_and_mul", platform),
        gelu_and_mul=function_of("silu_and_mul", "gelu_and_mul", platform),
        rope_kv_write=function_of("rope_kv_write", "rope_kv_write", platform),
        build_metadata=paged_metadata,
        sample=function_of("sample", "sample", platform),
        logits=LogitKernels(
            penalise=function_of("logits", "penalise", platform),
            mask=function_of("logits", "mask", platform),
            add_bias=function_of("logits", "add_bias", platform),
        ),
    )


def few_bit_kernels_of(platform: str) -> FewBitKernels:
    """Those that ``servekit.kernels.choice`` has for a platform."""
    return FewBitKernels(
        w8a8_linear=function_of("quantized_linear", "w8a8_linear", platform),
        w8a8_product=function_of("quantized_linear", "w8a8_product", platform),
        w4a16_linear=function_of("quantized_linear", "w4a16_linear", platform),
        rms_norm_quantized=function_of("rms_norm", "rms_norm_quantized", platform),
        silu_and_mul_quantized=function_of("silu_and_mul", "silu_and_mul_quantized", platform),
    )


def rounded_kernels(kernels: Kernels, quantization: str, platform: str, float8: torch.dtype) -> Kernels:
    """``kernels`` with linear layers of few bits.

    Args:
        quantization: int8, fp8 or int4.
        float8: the form that the device multiplies.
    """
    operations = few_bit_kernels_of(platform)
    if quantization == "int4":
        return replace(kernels, few_bits=FourBits(operations))
    return replace(kernels, few_bits=EightBits(operations, torch.int8 if quantization == "int8" else float8))
