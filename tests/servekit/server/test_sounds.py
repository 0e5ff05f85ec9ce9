"""Sounds and films before a model that takes neither: what is wrong with one is said first, as it is of pictures."""

from __future__ import annotations

import base64
import io
import struct
import wave
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.servekit.server.canary import Sight, canary
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.rows import CHAT, chat

from common_platform.errors import RequestError
from servekit.multimodal.limits import MediaLimits
from servekit.multimodal.sound import examine_wav

PART = "messages[0].content[0]"
AUDIO, VIDEO = f"{PART}.input_audio", f"{PART}.video_url"


def wav(num_samples: int = 80, *, channels: int = 1, rate: int = 8000) -> bytes:
    """Silence of 16 bits; the rate is as claimed."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(max(rate, 1))
        file.writeframes(bytes(2 * channels * num_samples))
    content = bytearray(made.getvalue())
    content[24:28] = struct.pack("<I", rate)
    return bytes(content)


def heard(content: bytes, kind: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": kind}}


def seen(num_frames: int) -> dict[str, Any]:
    frame = base64.b64encode(bytes(1024)).decode()
    return {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join([frame] * num_frames)}}


ROWS: list[tuple[str, dict[str, Any], str, str, tuple[str, ...]]] = [
    ("med-034", seen(5000), "media_too_many_frames", VIDEO, ("5000", "512", "--max-video-frames")),
    ("med-039", heard(wav(0)), "media_empty", AUDIO, ()),
    ("med-040", heard(wav(rate=0)), "media_bad_header", AUDIO, ("0 samples a second",)),
    ("med-041", heard(wav(channels=64)), "out_of_range", AUDIO, ("64", "8", "--max-audio-channels")),
    ("too-long", heard(wav(601, rate=1)), "media_too_long", AUDIO, ("601", "600 s", "--max-audio-seconds")),
    ("no-wav", heard(b"ID3 and so on"), "media_unknown_format", AUDIO, ()),
    ("format", heard(wav(), "aiff"), "unsupported", f"{AUDIO}.format", ("aiff", "wav")),
    ("a-sound", heard(wav(600, rate=1)), "unsupported", f"{PART}.type", ("cannot hear",)),
    ("mp3", heard(b"ID3", "mp3"), "unsupported", f"{PART}.type", ("cannot hear",)),
    ("a-film", seen(512), "unsupported", f"{PART}.type", ("cannot see",)),
]


@pytest.fixture(scope="module")
def before(server: ServerProcess) -> Sight:
    with server.client() as client:
        return canary(client)


@pytest.mark.parametrize(("part", "code", "param", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_sound_or_film_is_refused_for_what_it_is(
    http: httpx.Client, before: Sight, part: dict[str, Any], code: str, param: str, words: tuple[str, ...]
) -> None:
    answer = http.post(CHAT, json=chat(messages=[{"role": "user", "content": [part]}]))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error
    assert all(word in error["message"] for word in words), error
    assert canary(http) == before


@given(st.integers(1, 8), st.integers(1, 100_000), st.integers(1, 100))
def test_a_wav_is_measured_as_it_was_written(channels: int, rate: int, num_samples: int) -> None:
    limits = MediaLimits(max_seconds=1e9)
    found = examine_wav(wav(num_samples, channels=channels, rate=rate), "x", limits)
    assert (found.num_channels, found.rate, found.num_samples) == (channels, rate, num_samples)


@given(st.binary(max_size=80) | st.binary(max_size=60).map(lambda rest: b"RIFF\x00\x00\x00\x00WAVE" + rest))
def test_bytes_of_any_kind_are_measured_or_refused(content: bytes) -> None:
    try:
        assert examine_wav(content, "x", MediaLimits()).num_samples > 0
    except RequestError as error:
        assert error.code in ("media_unknown_format", "media_truncated", "media_bad_header", "media_empty") or (
            error.code in ("media_too_long", "out_of_range")
        )


@given(st.integers(0, 200))
def test_a_wav_that_is_cut_is_refused(length: int) -> None:
    with pytest.raises(RequestError):
        examine_wav(wav(80)[:length], "x", MediaLimits())
