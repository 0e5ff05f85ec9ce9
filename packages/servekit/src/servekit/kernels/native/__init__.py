"""The C++ kernels of ``native/``: loaded where they were built, recorded as programs, run by one call a step."""

from servekit.kernels.native.library import Format, Library, Pool, native_library
from servekit.kernels.native.packing import PackedWeight, pack
from servekit.kernels.native.program import Cache, Epilogue, Program, Rows

__all__ = [
    "Cache",
    "Epilogue",
    "Format",
    "Library",
    "PackedWeight",
    "Pool",
    "Program",
    "Rows",
    "native_library",
    "pack",
]
