"""Keys and values into the paged cache."""

from servekit.kernels.kv_write.reference import copy_blocks, kv_write, kv_write_quantized

__all__ = ["copy_blocks", "kv_write", "kv_write_quantized"]
