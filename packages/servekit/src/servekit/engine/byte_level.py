"""What each token adds to a text, for tokenizers that join bytes and do nothing else (byte-level BPE)."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import ByteLevel


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """By token id; ids behind the end, and those that are not shown, add nothing."""

    raw: list[bytes]
    texts: list[str | None]  # None where the bytes are no text by themselves: parts of characters

    @classmethod
    def of(cls, tokenizer: RustTokenizer, *, skip_special_tokens: bool) -> TokenBytes | None:
        """None where the tokenizer's decoder does more than join bytes."""
        if not isinstance(tokenizer.decoder, ByteLevel):
            return None
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        hidden = {token_id for token_id, token in added.items() if token.special}
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        raw = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            if token_id not in hidden:
                raw[token_id] = bytes_of(token)
        return cls(raw, [_text(piece) for piece in raw])


def bytes_of(token: str) -> bytes:
    """The bytes that byte-level BPE writes as ``token``; added tokens stand for themselves."""
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes bytes as (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
