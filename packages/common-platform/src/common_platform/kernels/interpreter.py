"""Triton's interpreter beside a newer numpy."""

from __future__ import annotations

from typing import Any


def mend_interpreter() -> None:
    """Let loops count to numbers that a kernel was given or has loaded.

    The interpreter (up to triton 3.6) turns arrays of one element to int, which numpy 2.4 and later refuse.
    """
    from triton.runtime import interpreter

    given = interpreter._patch_lang_tensor
    if getattr(given, "is_mended", False):
        return

    def patched(tensor: Any, scope: Any) -> None:
        given(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.is_mended = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
