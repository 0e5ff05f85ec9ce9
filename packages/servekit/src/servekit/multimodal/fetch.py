"""The one door through which pictures come from elsewhere: other hosts, and files of this one.

Both are shut unless the operator names hosts, or folders. A URL is taken apart once; of its parts the request is made,
and the socket goes to the very address that was looked at. Redirects are not followed, one deadline is for all of it,
and bytes are counted as they come, whatever a header says.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import httptools

from common_platform.artifact.safe_files import read_bytes
from common_platform.errors import ArtifactFormatError, ArtifactMissing, ArtifactRefused, RequestError
from servekit.multimodal.limits import MediaLimits
from servekit.multimodal.source import check_url, is_file

MAX_HEADER_BYTES = 16_384
PIECE = 1 << 16
LAST_BYTES_S = 0.5  # for a connection to close, or for more than was announced, once an answer is complete
PORTS = {"http": 80, "https": 443}
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
TRANSLATED = ipaddress.IPv6Network("64:ff9b::/96")


class Place(NamedTuple):
    """The parts of a URL that has passed ``check_url``."""

    scheme: str
    host: str
    port: int
    target: str


async def fetch(url: str, path: str, limits: MediaLimits) -> bytes:
    """The bytes at ``url``, which is of a scheme and a place that the operator allows.

    Args:
        path: the caller's name for it, for errors.

    Raises:
        RequestError: code ``media_*``.
    """
    check_url(url, path, limits)
    if is_file(url):
        return await asyncio.to_thread(_read_file, url, path, limits)
    try:
        async with asyncio.timeout(limits.timeout_s):
            return await _download(_place_of(url), path, limits)
    except TimeoutError as error:
        allowed = f"all of it within {limits.timeout_s:g} s"
        raise RequestError(
            path, "a host that is too slow", allowed, code="media_timeout", flag="--media-timeout-s"
        ) from error


def _place_of(url: str) -> Place:
    parts = urlsplit(url)
    scheme, host = parts.scheme.lower(), parts.hostname or ""
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Place(scheme, host, parts.port or PORTS[scheme], target)


def is_public(address: Address) -> bool:
    """Whether anybody may be called there: not this machine, nor its network, also where IPv6 wraps such an address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if address in TRANSLATED:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


async def _address_of(place: Place, path: str, limits: MediaLimits) -> str:
    """Where to call ``place``. All its addresses must be public, but where the operator named the address itself."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise RequestError(path, place.host, "a host that has an address", code="media_fetch_failed") from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    for text in addresses:
        is_named = text == place.host and text in limits.allowed_domains
        if not is_named and not is_public(ipaddress.ip_address(text)):
            got = f"{place.host}, which has a private address"
            raise RequestError(path, got, "a public one", code="media_host_refused", flag="--allowed-media-domains")
    return addresses[0]


async def _download(place: Place, path: str, limits: MediaLimits) -> bytes:
    address = await _address_of(place, path, limits)
    secure = ssl.create_default_context() if place.scheme == "https" else None
    try:
        reader, writer = await asyncio.open_connection(
            address, place.port, ssl=secure, server_hostname=place.host if secure else None
        )
    except (OSError, ssl.SSLError) as error:
        raise RequestError(path, place.host, "a host that answers", code="media_fetch_failed") from error
    try:
        writer.write(_request_for(place))
        return await _Answer(path, limits).read(reader)
    except (OSError, ssl.SSLError) as error:
        raise RequestError(path, place.host, "an answer that is whole", code="media_fetch_failed") from error
    finally:
        writer.transport.abort()


def _request_for(place: Place) -> bytes:
    host = place.host if place.port == PORTS[place.scheme] else f"{place.host}:{place.port}"
    lines = [f"GET {place.target} HTTP/1.1", f"Host: {host}", "Accept: image/*", "Accept-Encoding: identity"]
    return "\r\n".join([*lines, "User-Agent: servekit", "Connection: close", "", ""]).encode("ascii")


class _Answer:
    """An HTTP answer as it comes; the parser calls the methods that begin with ``on_``."""

    def __init__(self, path: str, limits: MediaLimits) -> None:
        self._path = path
        self._limits = limits
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._num_read = 0
        self._has_headers = False
        self._has_length = False
        self._is_whole = False
        self._has_more = False  # than was announced

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        """The body. A host that says more than it announced is heard until it has said too much."""
        while piece := await self._next(reader):
            self._num_read += len(piece)
            if self._is_whole:
                self._has_more = True
            else:
                self._parse(piece)
            self._check_size()
        if self._has_more:
            raise self._refusal("media_inconsistent", "more than its host announced", "what it announced")
        if not self._has_headers or (self._has_length and not self._is_whole):
            raise self._refusal("media_truncated", "a part of it", "all that its host announced")
        if not self._body:
            raise self._refusal("media_empty", "no bytes", "a picture")
        return bytes(self._body)

    async def _next(self, reader: asyncio.StreamReader) -> bytes:
        """What comes next; nothing where the connection ends, or where no more is to come and none does."""
        if not self._is_whole:
            return await reader.read(PIECE)
        try:
            async with asyncio.timeout(LAST_BYTES_S):
                return await reader.read(PIECE)
        except TimeoutError:
            return b""

    def _parse(self, piece: bytes) -> None:
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserError as error:
            if not self._is_whole:
                raise self._refusal("media_fetch_failed", "what is no HTTP", "an answer over HTTP") from error
            self._has_more = True
        status = self._parser.get_status_code() if self._has_headers else 200
        if 300 <= status < 400:
            raise self._refusal("media_redirect_refused", f"status {status}", "the picture itself, not another place")
        if status != 200:
            raise self._refusal("media_fetch_failed", f"status {status}", "status 200")

    def _check_size(self) -> None:
        most = self._limits.max_bytes
        if not self._has_headers and self._num_read > MAX_HEADER_BYTES:
            raise self._refusal(
                "media_fetch_failed", "headers without end", f"at most {MAX_HEADER_BYTES} bytes of them"
            )
        if len(self._body) > most or self._num_read > most + MAX_HEADER_BYTES:
            raise self._refusal("media_too_large", "more bytes", f"at most {most} bytes", "--max-media-bytes")

    def _refusal(self, code: str, got: str, allowed: str, flag: str | None = None) -> RequestError:
        return RequestError(self._path, got, allowed, code=code, flag=flag)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_length = self._has_length or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._has_headers = True

    def on_body(self, piece: bytes) -> None:
        self._body += piece

    def on_message_complete(self) -> None:
        self._has_more = self._has_more or self._is_whole
        self._is_whole = True


def _read_file(url: str, path: str, limits: MediaLimits) -> bytes:
    """A file below one of the allowed folders, reached without links."""
    parts = urlsplit(url)
    wanted = unquote(parts.path) if parts.netloc in ("", "localhost") else ""
    for folder in map(Path, limits.allowed_dirs):
        name = wanted.removeprefix(f"{folder}/")
        try:
            if name and name != wanted:
                return _content(read_bytes(folder, name, limits.max_bytes), path)
        except ArtifactFormatError as error:
            allowed = f"at most {limits.max_bytes} bytes"
            raise RequestError(path, "more bytes", allowed, code="media_too_large", flag="--max-media-bytes") from error
        except (ArtifactRefused, ArtifactMissing):
            break
    allowed = "a regular file in an allowed folder, reached without links"
    raise RequestError(path, "a path", allowed, code="media_path_refused", flag="--allowed-media-dirs")


def _content(data: bytes, path: str) -> bytes:
    if not data:
        raise RequestError(path, "no bytes", "a picture", code="media_empty")
    return data
