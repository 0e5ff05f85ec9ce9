"""Pictures before a model that cannot see: what is wrong with one is said first, then that it cannot be seen."""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import zlib
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.servekit.server.canary import Sight, canary
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.rows import CHAT, chat

from common_platform.errors import ConfigError, RequestError
from servekit.multimodal.header import examine
from servekit.multimodal.limits import MediaLimits
from servekit.multimodal.source import check_url
from servekit.server.config import ServerConfig

URL = "messages[0].content[0].image_url"
HEAD = "data:image/png;base64,"


def picture(kind: str, width: int = 8, height: int = 8, frames: int = 1) -> bytes:
    images = [Image.new("RGB", (width, height), (80 * index, 0, 0)) for index in range(frames)]
    made = io.BytesIO()
    more = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(made, kind, **more)
    return made.getvalue()


def png(width: int, height: int) -> bytes:
    """One that claims a size; its header is all there is of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"\x78\x9c") + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    frame = b"\x2c\x00\x00\x00\x00\x0a\x00\x0a\x00\x00\x02\x02\x4c\x01\x00"
    return b"GIF89a\x0a\x00\x0a\x00\x00\x00\x00" + frame * frames + b"\x3b"


def webp(frames: int, side: int) -> bytes:
    canvas = (side - 1).to_bytes(3, "little") * 2
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\x00\x00\x00" + canvas
    body += (b"ANMF" + struct.pack("<I", 16) + bytes(16)) * frames
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def data(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


JP2 = b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(100)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n"
TIFF = b"II*\x00\x08\x00\x00\x00" + bytes(100)
FETCHED = f"{URL}.url"
ROWS: list[tuple[str, str, str, str, tuple[str, ...]]] = [
    ("med-001", data(png(60_000, 60_000)), "media_too_many_pixels", URL, ("60000x60000", "33554432", "--max-image-p")),
    ("med-002", data(png(1, 100_000)), "media_bad_shape", URL, ("1x100000", "16384", "200")),
    ("med-004", data(picture("PNG", 900, 900)[:100]), "media_truncated", URL, ()),
    ("med-005", HEAD, "media_empty", URL, ()),
    ("med-006", data(b"\x07" + os.urandom(4095)), "media_unknown_format", URL, ()),
    ("med-007", HEAD + "@@@@", "invalid_base64", URL, ()),
    ("med-008", "data:image/png,rawbytes", "media_bad_data_uri", URL, ()),
    ("med-009", data(gif(2000), "gif"), "media_animated", URL, ("2000", "1 frame")),
    ("med-010", data(webp(500, 4000), "webp"), "media_animated", URL, ("500",)),
    ("med-014", data(JP2, "jp2"), "media_format_refused", URL, ("jp2", "png, jpeg, gif, webp")),
    ("med-015", data(JP2), "media_format_refused", URL, ()),
    ("med-016", data(EPS), "media_format_refused", URL, ()),
    ("med-017", data(TIFF, "tiff"), "media_format_refused", URL, ()),
    ("med-018", "file:///etc/passwd", "media_scheme_refused", FETCHED, ("file",)),
    ("med-021", "http://169.254.169.254/latest/meta-data", "media_host_refused", FETCHED, ("--allowed-media-domains",)),
    ("med-022", "http://localhost:8000/admin/pause", "media_host_refused", FETCHED, ()),
    ("med-025", "https://img.test\\@127.0.0.1/x.png", "media_bad_url", FETCHED, ()),
    ("med-026", "ftp://img.test/x.png", "media_scheme_refused", FETCHED, ()),
    ("med-027", "gopher://img.test/", "media_scheme_refused", FETCHED, ()),
    ("med-028", "jar:file:///x!/y.png", "media_scheme_refused", FETCHED, ()),
    ("med-032", data(picture("PNG")), "unsupported", "messages[0].content[0].type", ("image",)),
]


def ask(http: httpx.Client, *urls: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": url if isinstance(url, dict) else {"url": url}} for url in urls]
    answer = http.post(CHAT, json=chat(messages=[{"role": "user", "content": parts}]))
    assert answer.status_code == 400, answer.text
    assert not re.search(r"0x[0-9a-f]{6}|BytesIO", answer.text)
    return answer.json()["error"]


@pytest.fixture(scope="module")
def before(server: ServerProcess) -> Sight:
    with server.client() as client:
        return canary(client)


@pytest.mark.parametrize(("url", "code", "param", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_picture_is_refused_for_what_it_is(
    http: httpx.Client, before: Sight, url: str, code: str, param: str, words: tuple[str, ...]
) -> None:
    error = ask(http, url)
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error"), error
    assert all(word in error["message"] for word in words), error
    assert canary(http) == before


def test_seventeen_pictures_are_too_many(http: httpx.Client, before: Sight) -> None:
    error = ask(http, *[HEAD] * 17)  # med-031
    assert (error["code"], error["param"]) == ("out_of_range", "messages")
    assert all(word in error["message"] for word in ("17", "16", "--max-media-parts"))
    assert canary(http) == before


def test_the_other_forms_are_read_alike(http: httpx.Client) -> None:
    good, bad = data(picture("JPEG"), "jpeg"), data(JP2)
    base64_of = {
        url: {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]} for url in (good, bad)
    }

    def code(path: str, part: dict[str, Any], name: str) -> tuple[str, str]:
        body = {"model": "M", name: [{"role": "user", "content": [part]}]}
        body |= {"max_tokens": 4} if path == "/v1/messages" else {}
        error = http.post(path, json=body).json()["error"]
        return error["code"], error["param"]

    seen = code("/v1/responses", {"type": "input_image", "image_url": good}, "input")
    assert seen == ("unsupported", "input[0].content[0].type")
    seen = code("/v1/responses", {"type": "input_image", "image_url": bad}, "input")
    assert seen == ("media_format_refused", "input[0].content[0].image_url")
    seen = code("/v1/messages", {"type": "image", "source": base64_of[good]}, "messages")
    assert seen == ("unsupported", "messages[0].content[0].type")
    seen = code("/v1/messages", {"type": "image", "source": base64_of[bad]}, "messages")
    assert seen == ("media_format_refused", "messages[0].content[0].source.data")
    url = {"type": "url", "url": "http://x.test/a.png"}
    assert code("/v1/messages", {"type": "image", "source": url}, "messages")[0] == "media_host_refused"
    assert ask(http, {"url": good, "detail": "high"})["code"] == "unsupported"
    assert ask(http, {"url": good, "detail": "huge"})["code"] == "unsupported"
    assert ask(http, {})["code"] == "missing_field"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 300), (640, 480)])
def test_sizes_are_those_that_a_decoder_finds(kind: str, width: int, height: int) -> None:
    content = picture(kind, width, height)
    found = examine(content, "x", MediaLimits())
    assert (found.width, found.height, found.num_frames) == (width, height, 1)
    with pytest.raises(RequestError, match="cut off"):
        examine(content[:-10], "x", MediaLimits())
    if kind == "WEBP":
        lossless = io.BytesIO()
        Image.new("RGBA", (width, height)).save(lossless, kind, lossless=True)
        assert examine(lossless.getvalue(), "x", MediaLimits()).width == width


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_frames_are_counted(kind: str) -> None:
    with pytest.raises(RequestError, match="3 frames"):
        examine(picture(kind, 16, 16, frames=3), "x", MediaLimits())


@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP"]), st.data())
def test_whatever_the_bytes_claim_there_is_an_answer(kind: str, chosen: st.DataObject) -> None:
    content = bytearray(picture(kind, 20, 20))
    for _ in range(chosen.draw(st.integers(1, 6))):
        content[chosen.draw(st.integers(0, len(content) - 1))] = chosen.draw(st.integers(0, 255))
    content = content[: chosen.draw(st.integers(1, len(content)))]
    try:
        found = examine(bytes(content), "x", MediaLimits())
    except RequestError as error:
        assert error.code.startswith("media_")
    else:
        assert found.width * found.height <= MediaLimits().max_pixels


def test_only_hosts_that_are_named_in_full_are_allowed() -> None:
    limits = MediaLimits(allowed_domains=("img.test",))
    check_url("https://img.test/x.png", "u", limits)
    check_url("https://IMG.test:443/x.png", "u", limits)
    for url in ("https://img.test.evil/x", "https://a.img.test/", "https://u@img.test/", "https://img.test:0/"):
        with pytest.raises(RequestError):
            check_url(url, "u", limits)
    for domain in ("*", "*.test", "", "a..b", "http://img.test"):  # cfg-007
        with pytest.raises(ConfigError, match="allowed_media_domains"):
            ServerConfig(allowed_media_domains=(domain,))
