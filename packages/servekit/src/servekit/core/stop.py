"""When a sequence ends by its tokens. Stop strings are found where the text is made, at the edge."""

from __future__ import annotations

from servekit.core.request import FinishReason, Request


def check_stop(request: Request) -> tuple[FinishReason, int | None] | None:
    """Whether the last token ends ``request``, and the stop token where it was not the model's own.

    In this order: fewer than ``min_tokens`` never end it; an end-of-text or stop token; the token limits.
    """
    if request.num_output >= request.sampling.min_tokens:
        last = request.token_ids[-1]
        if last in request.stop_ids:
            return FinishReason.STOP, None if last in request.eos_token_ids else last
    if request.num_tokens >= request.max_total:
        return FinishReason.LENGTH, None
    return None
