"""Embeddings that stand in place of a prompt's tokens: carried as bytes, since nothing here needs their numbers."""

from __future__ import annotations

from hashlib import sha256

import msgspec

PLACEHOLDER = 0  # the token id that stands where there is none


class PromptEmbeds(msgspec.Struct, frozen=True, array_like=True):
    """``data``: [num_tokens, hidden_size] of ``dtype``, little-endian, row after row.

    ``digest``: SHA-256 of all the rest; what is computed from equal digests may be shared.
    """

    dtype: str  # float32 | float16 | bfloat16
    num_tokens: int
    hidden_size: int
    data: bytes
    digest: bytes

    @classmethod
    def of(cls, dtype: str, num_tokens: int, hidden_size: int, data: bytes) -> PromptEmbeds:
        head = f"prompt embeddings {dtype} {num_tokens} {hidden_size}\n".encode()
        return cls(dtype, num_tokens, hidden_size, data, sha256(head + data).digest())

    def __repr__(self) -> str:
        return f"PromptEmbeds({self.dtype}[{self.num_tokens},{self.hidden_size}])"
