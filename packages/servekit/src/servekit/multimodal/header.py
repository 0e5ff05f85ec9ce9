"""What a picture is by its first bytes, and how large by its header; nothing is decoded, whatever the bytes claim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from common_platform.errors import RequestError
from servekit.multimodal.limits import MediaLimits

PNG, JPEG, GIF, WEBP = "png", "jpeg", "gif", "webp"
ALLOWED = (PNG, JPEG, GIF, WEBP)
MARKS: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"\xff\xd8\xff", JPEG),
    (b"GIF87a", GIF),
    (b"GIF89a", GIF),
    (b"\x00\x00\x00\x0cjP  ", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"II*\x00", "tiff"),
    (b"MM\x00*", "tiff"),
    (b"%!PS", "eps"),
    (b"\xc5\xd0\xd3\xc6", "eps"),
    (b"%PDF", "pdf"),
    (b"BM", "bmp"),
    (b"8BPS", "psd"),
    (b"\x00\x00\x01\x00", "ico"),
    (b"<svg", "svg"),
    (b"<?xml", "svg"),
)
BARE_JPEG = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
FRAMES_OF_JPEG = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Truncated(Exception):
    """The bytes end before the picture does."""


@dataclass(frozen=True, slots=True)
class Picture:
    kind: str  # png | jpeg | gif | webp
    width: int
    height: int
    num_frames: int = 1


def examine(data: bytes, path: str, limits: MediaLimits) -> Picture:
    """The picture in ``data``, within the limits.

    Raises:
        RequestError: codes ``media_unknown_format``, ``media_format_refused``, ``media_truncated``,
            ``media_animated``, ``media_bad_shape`` and ``media_too_many_pixels``.
    """
    kind = _identified(data)
    if kind is None:
        raise RequestError(path, "bytes of no known picture", _listed(), code="media_unknown_format")
    if kind not in ALLOWED:
        raise RequestError(path, kind, _listed(), code="media_format_refused")
    try:
        picture = MEASURE[kind](data)
    except (Truncated, IndexError) as error:
        raise RequestError(path, f"a {kind} that is cut off", "a whole one", code="media_truncated") from error
    _check(picture, path, limits)
    return picture


def _listed() -> str:
    return f"one of {', '.join(ALLOWED)}"


def _identified(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WEBP
    if data[4:8] == b"ftyp":
        return "avif or heic"
    return next((kind for mark, kind in MARKS if data.startswith(mark)), None)


def _check(picture: Picture, path: str, limits: MediaLimits) -> None:
    size = f"{picture.width}x{picture.height}"
    if picture.num_frames != 1:
        raise RequestError(path, f"{picture.num_frames} frames", "1 frame", code="media_animated")
    short, long = sorted((picture.width, picture.height))
    if short < 1:
        raise RequestError(path, size, "sides of 1 pixel or more", code="media_bad_shape")
    if picture.width * picture.height > limits.max_pixels:
        allowed = f"at most {limits.max_pixels} pixels"
        raise RequestError(path, size, allowed, code="media_too_many_pixels", flag="--max-image-pixels")
    if long > limits.max_side or long > limits.max_aspect * short:
        allowed = f"side {limits.max_side} and aspect {limits.max_aspect} at most"
        raise RequestError(path, size, allowed, code="media_bad_shape", flag="--max-image-side or --max-image-aspect")


def _number(data: bytes, start: int, size: int, order: str = "big") -> int:
    piece = data[start : start + size]
    if len(piece) < size:
        raise Truncated
    return int.from_bytes(piece, "little" if order == "little" else "big")


def _png(data: bytes) -> Picture:
    """Chunk by chunk to the end; ``acTL`` says how many frames there are."""
    width, height, frames, at = _number(data, 16, 4), _number(data, 20, 4), 1, 8
    while True:
        length, kind = _number(data, at, 4), data[at + 4 : at + 8]
        if kind == b"acTL":
            frames = _number(data, at + 8, 4)
        at += 12 + length
        if at > len(data):
            raise Truncated
        if kind == b"IEND":
            return Picture(PNG, width, height, frames)


def _jpeg(data: bytes) -> Picture:
    """Segment by segment to the frame header; the end mark must be there."""
    at, size = 2, None
    while size is None:
        while data[at] != 0xFF:
            at += 1
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in BARE_JPEG:
            at += 2
        elif marker in (0xD9, 0xDA):
            raise Truncated
        else:
            if marker in FRAMES_OF_JPEG:
                size = (_number(data, at + 7, 2), _number(data, at + 5, 2))
            at += 2 + _number(data, at + 2, 2)
    if b"\xff\xd9" not in data[at:]:
        raise Truncated
    return Picture(JPEG, *size)


def _gif(data: bytes) -> Picture:
    """Block by block, counting images; the screen is the canvas of them all."""
    width, height = _number(data, 6, 2, "little"), _number(data, 8, 2, "little")
    at = 13 + _table(data[10])
    frames = 0
    while (kind := data[at]) != 0x3B:
        if kind == 0x21:
            at = _blocks(data, at + 2)
        elif kind == 0x2C:
            frames += 1
            width = max(width, _number(data, at + 1, 2, "little") + _number(data, at + 5, 2, "little"))
            height = max(height, _number(data, at + 3, 2, "little") + _number(data, at + 7, 2, "little"))
            at = _blocks(data, at + 11 + _table(data[at + 9]))
        else:
            raise Truncated
    return Picture(GIF, width, height, frames)


def _table(flags: int) -> int:
    """Bytes of a table of colours."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks(data: bytes, at: int) -> int:
    """Where a chain of sub-blocks ends."""
    while size := data[at]:
        at += size + 1
    return at + 1


def _webp(data: bytes) -> Picture:
    """Chunk by chunk; ``ANMF`` is a frame, ``VP8X`` the canvas."""
    end, at, frames = 8 + _number(data, 4, 4, "little"), 12, 0
    if end > len(data):
        raise Truncated
    size: tuple[int, int] | None = None
    while at + 8 <= end:
        kind, length, body = data[at : at + 4], _number(data, at + 4, 4, "little"), at + 8
        if kind == b"VP8X":
            size = (1 + _number(data, body + 4, 3, "little"), 1 + _number(data, body + 7, 3, "little"))
        elif kind == b"ANMF":
            frames += 1
        elif kind == b"VP8 " and size is None:
            size = (_number(data, body + 6, 2, "little") & 0x3FFF, _number(data, body + 8, 2, "little") & 0x3FFF)
        elif kind == b"VP8L" and size is None:
            bits = _number(data, body + 1, 4, "little")
            size = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
        at = body + length + (length & 1)
    if size is None or at > end + 1:
        raise Truncated
    return Picture(WEBP, *size, num_frames=frames or 1)


MEASURE: dict[str, Callable[[bytes], Picture]] = {PNG: _png, JPEG: _jpeg, GIF: _gif, WEBP: _webp}
