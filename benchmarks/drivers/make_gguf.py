"""llama.cpp's own quantizer: ``SOURCE TARGET FILE_TYPE``, the last as ``llama_ftype`` numbers it."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as ll


def main() -> None:
    source, target, kind = sys.argv[1:]
    params = ll.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = int(kind), True
    if ll.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise SystemExit(f"{source}: not quantized")


main()
