"""The bytes of a picture from where a request says they are; nothing is opened and nobody is called here."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import urlsplit

from common_platform.errors import RequestError
from servekit.multimodal.limits import MediaLimits

DATA, FILE = "data:", "file://"
SCHEMES = ("http", "https")
IN_HOSTS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-.")


def is_data(url: str) -> bool:
    return url[:5].lower() == DATA


def data_of(url: str, path: str, limits: MediaLimits) -> bytes:
    """What a ``data:`` URL holds.

    Raises:
        RequestError: it is not base64, empty, or too large, which is known before it is decoded.
    """
    head, comma, text = url[5:].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(path, head[:64] or "nothing", "data:image/TYPE;base64,DATA", code="media_bad_data_uri")
    return decoded(text, path, limits)


def decoded(text: str, path: str, limits: MediaLimits) -> bytes:
    """The bytes that base64 ``text`` stands for."""
    if len(text) // 4 * 3 > limits.max_bytes + 2:
        raise _too_large(len(text) // 4 * 3, path, limits)
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(path, "data that is not base64", "base64", code="invalid_base64") from error
    if not data:
        raise RequestError(path, "no bytes", "a picture", code="media_empty")
    if len(data) > limits.max_bytes:
        raise _too_large(len(data), path, limits)
    return data


def _too_large(size: int, path: str, limits: MediaLimits) -> RequestError:
    allowed = f"at most {limits.max_bytes} bytes"
    return RequestError(path, f"{size} bytes", allowed, code="media_too_large", flag="--max-media-bytes")


def is_file(url: str) -> bool:
    return url[:7].lower() == FILE


def check_url(url: str, path: str, limits: MediaLimits) -> None:
    """Raise RequestError for a URL that would not be fetched: parsed once, here, and strictly.

    Scheme first, then form, then host: only hosts that the operator names are allowed. Files are where the operator
    names folders; which of them is looked at when one is opened.
    """
    scheme = url.partition(":")[0].lower()
    if limits.allowed_dirs and is_file(url):
        return
    if scheme not in SCHEMES:
        raise RequestError(path, scheme, "data, http or https", code="media_scheme_refused")
    host = _host_of(url)
    if host is None:
        raise RequestError(path, url, "a URL of host and path, without user or odd characters", code="media_bad_url")
    if host not in limits.allowed_domains:
        allowed = f"one of {', '.join(limits.allowed_domains) or 'none'}"[:200]
        raise RequestError(path, host, allowed, code="media_host_refused", flag="--allowed-media-domains")


def _host_of(url: str) -> str | None:
    if not url.isascii() or not url.isprintable() or "\\" in url or " " in url:
        return None
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if not host or "@" in parts.netloc or not set(host) <= IN_HOSTS or port == 0:
        return None
    return host
