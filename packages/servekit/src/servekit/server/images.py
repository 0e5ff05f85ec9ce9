"""Pictures in requests: identified, measured, held to the limits; and then refused by a model that cannot see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from common_platform.errors import RequestError
from servekit.multimodal.fetch import fetch
from servekit.multimodal.header import examine
from servekit.multimodal.limits import MediaLimits
from servekit.multimodal.source import check_url, data_of, decoded, is_data
from servekit.server import fields as f

IMAGE = "image_url"  # of chats
INPUT_IMAGE = "input_image"  # of /v1/responses
KINDS = (IMAGE, INPUT_IMAGE, "image")
URL = f.text(2**31)
T = TypeVar("T")


def check_num_images(messages: Any, path: str, media: MediaLimits) -> None:
    """Raise RequestError for more pictures than a request may bring, before any of them is looked at."""
    count = sum(part.get("type") in KINDS for part in _parts(messages))
    if count > media.max_parts:
        allowed = f"0..{media.max_parts} pictures"
        raise RequestError(path, f"{count} pictures", allowed, code="out_of_range", flag="--max-media-parts")


def _parts(messages: Any) -> Iterable[dict[str, Any]]:
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("type"), str):
                yield part


def check_image_part(value: dict[str, Any], path: str, media: MediaLimits) -> None:
    """A part of a chat's message, in OpenAI's form. Raises RequestError in every case: no model here can see."""

    def image(found: Any, at: str) -> str:
        if isinstance(found, str):
            return found
        checks = {"url": URL, "detail": f.one_of("auto", "low", "high")}
        return str(f.check_object(found, at, checks, required=("url",))["url"])

    part = f.check_object(value, path, {"type": URL, IMAGE: image, "uuid": f.text(256)}, required=(IMAGE,))
    check_image(part[IMAGE], f"{path}.{IMAGE}", media, is_nested=isinstance(value[IMAGE], dict))
    raise cannot_see(path)


class Elsewhere(Exception):
    """A picture that is to be fetched before more can be said of it."""

    def __init__(self, url: str, path: str) -> None:
        super().__init__(path)
        self.url = url
        self.path = path


def check_image(url: str, path: str, media: MediaLimits, *, is_nested: bool = False) -> None:
    """A picture by its URL.

    Args:
        is_nested: the URL stands below ``path``, as ``url``.

    Raises:
        RequestError: it would not be taken. Elsewhere: it may be fetched.
    """
    if is_data(url):
        examine(data_of(url, path, media), path, media)
        return
    at = f"{path}.url" if is_nested else path
    check_url(url, at, media)
    raise Elsewhere(url, at)


class Sight:
    """Looks at the pictures of requests that are elsewhere.

    Args:
        inflight_bytes: of all that are fetched at once; further ones wait.
    """

    def __init__(self, limits: MediaLimits, inflight_bytes: int) -> None:
        self._limits = limits
        self._places = asyncio.Semaphore(max(1, inflight_bytes // limits.max_bytes))

    async def of(self, read: Callable[[], T]) -> T:
        """What ``read`` makes of a request. A picture elsewhere is fetched, and then treated as one that came along.

        Raises:
            RequestError: what ``read`` raises, or what is wrong with the picture.
        """
        try:
            return read()
        except Elsewhere as found:
            async with self._places:
                content = await fetch(found.url, found.path, self._limits)
                await asyncio.to_thread(examine, content, found.path, self._limits)
            raise cannot_see(found.path.removesuffix(".url").rpartition(".")[0]) from found


def check_base64(text: str, path: str, media: MediaLimits) -> None:
    examine(decoded(text, path, media), path, media)


def cannot_see(path: str) -> RequestError:
    return RequestError(f"{path}.type", "an image", "text: this model cannot see", code="unsupported")
