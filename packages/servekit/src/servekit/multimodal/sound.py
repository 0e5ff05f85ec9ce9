"""How long a sound is, by the header of its WAV file; nothing is decoded, whatever the bytes claim."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from common_platform.errors import RequestError
from servekit.multimodal.limits import MediaLimits

FORMAT_BYTES = 16  # of the part of ``fmt`` that all kinds of WAV share


@dataclass(frozen=True, slots=True)
class Sound:
    num_channels: int
    rate: int  # samples a second
    num_samples: int  # of each channel


def examine_wav(data: bytes, path: str, limits: MediaLimits) -> Sound:
    """The sound in ``data``, a RIFF WAVE file, within the limits.

    Raises:
        RequestError: codes ``media_unknown_format``, ``media_bad_header``, ``media_truncated``, ``media_empty``,
            ``media_too_long`` and, for too many channels, ``out_of_range``.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise RequestError(path, "bytes of no known sound", "a WAV file", code="media_unknown_format")
    sound = _measured(data, path)
    if sound.num_channels > limits.max_channels:
        got, allowed = f"{sound.num_channels} channels", f"1..{limits.max_channels}"
        raise RequestError(path, got, allowed, code="out_of_range", flag="--max-audio-channels")
    if not sound.num_samples:
        raise RequestError(path, "no samples", "a sound", code="media_empty")
    if sound.num_samples > limits.max_seconds * sound.rate:
        got, allowed = f"{sound.num_samples / sound.rate:.0f} s", f"at most {limits.max_seconds:g} s"
        raise RequestError(path, got, allowed, code="media_too_long", flag="--max-audio-seconds")
    return sound


def _measured(data: bytes, path: str) -> Sound:
    """Chunk by chunk: ``fmt`` says what a sample is, ``data`` holds them."""
    at, form = 12, b""
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"fmt ":
            form = data[at + 8 : at + 8 + min(size, FORMAT_BYTES)]
        elif kind == b"data":
            if at + 8 + size > len(data):
                raise RequestError(path, "a wav that is cut off", "a whole one", code="media_truncated")
            return _sound(form, size, path)
        at += 8 + size + (size & 1)
    raise RequestError(path, "a wav without samples' chunk", "a whole one", code="media_truncated")


def _sound(form: bytes, num_bytes: int, path: str) -> Sound:
    if len(form) < FORMAT_BYTES:
        raise RequestError(path, "a wav that does not say its format first", "a whole one", code="media_bad_header")
    _, channels, rate, _, frame_bytes, _ = struct.unpack("<HHIIHH", form)
    for what, value in (("channels", channels), ("samples a second", rate), ("bytes a frame", frame_bytes)):
        if not value:
            raise RequestError(path, f"{value} {what}", "1 or more", code="media_bad_header")
    return Sound(channels, rate, num_bytes // frame_bytes)
