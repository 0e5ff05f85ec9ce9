"""Triton's interpreter, mended where a newer numpy stops it."""

from __future__ import annotations

from typing import Any


def mend_interpreter() -> None:
    """Let kernels count loops by scalars that they computed: ``for step in range(tl.cdiv(width, INNER))``.

    Triton 3.6 turns its scalars, arrays of one element, into Python's by ``int(array)``, which numpy 2.4 refuses unless
    the array has no dimensions.
    """
    from triton.runtime import interpreter

    if getattr(interpreter, "counts_by_scalars", False):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_count(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_count
    interpreter.counts_by_scalars = True
