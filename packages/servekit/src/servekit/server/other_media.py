"""Sounds and films in a chat's message: held to the limits, and then refused by a model that takes neither."""

from __future__ import annotations

from typing import Any

from common_platform.errors import RequestError
from servekit.multimodal.limits import MediaLimits
from servekit.multimodal.sound import examine_wav
from servekit.multimodal.source import decoded, is_data
from servekit.server import fields as f

AUDIO, VIDEO = "input_audio", "video_url"
FORMATS = ("wav", "mp3")  # OpenAI's
TEXT = f.text(2**31)


def check_audio_part(value: dict[str, Any], path: str, media: MediaLimits) -> None:
    """OpenAI's ``input_audio``. Raises RequestError in every case: no model here can hear."""

    def sound(found: Any, at: str) -> None:
        checks = {"data": TEXT, "format": f.one_of(*FORMATS)}
        given = f.check_object(found, at, checks, required=("data", "format"))
        content = decoded(given["data"], at, media)
        if given["format"] == "wav":
            examine_wav(content, at, media)

    f.check_object(value, path, {"type": TEXT, AUDIO: sound, "uuid": f.text(256)}, required=(AUDIO,))
    raise RequestError(f"{path}.type", "a sound", "text: this model cannot hear", code="unsupported")


def check_video_part(value: dict[str, Any], path: str, media: MediaLimits) -> None:
    """vLLM's ``video_url``; one that is JPEGs in a row says how many. Raises RequestError in every case."""

    def film(found: Any, at: str) -> None:
        url = found if isinstance(found, str) else f.check_object(found, at, {"url": TEXT}, required=("url",))["url"]
        head, _, frames = str(url).partition(",")
        if is_data(head) and head.lower().startswith("data:video/jpeg"):
            count = frames.count(",") + 1
            if count > media.max_frames:
                got, allowed = f"{count} frames", f"at most {media.max_frames}"
                raise RequestError(at, got, allowed, code="media_too_many_frames", flag="--max-video-frames")

    f.check_object(value, path, {"type": TEXT, VIDEO: film, "uuid": f.text(256)}, required=(VIDEO,))
    raise RequestError(f"{path}.type", "a film", "text: this model cannot see", code="unsupported")
