"""Products with weights of few bits: int8, float8 in rows or blocks, int4 in groups."""

from servekit.kernels.quantized_linear.reference import fp8_block_linear, w4a16_linear, w8a8_linear, w8a16_linear
from servekit.kernels.quantized_linear.weights import BlockWeight, ChannelWeight, Int4Weight

__all__ = [
    "BlockWeight",
    "ChannelWeight",
    "Int4Weight",
    "fp8_block_linear",
    "w4a16_linear",
    "w8a8_linear",
    "w8a16_linear",
]
