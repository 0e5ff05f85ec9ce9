"""Pictures from elsewhere: fetched by one door, which knows hosts, folders, sizes and times, and then looked at."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.servekit.server.canary import Sight, canary
from tests.servekit.server.processes import PATIENCE_S, ServerProcess
from tests.servekit.server.rows import CHAT, chat
from tests.servekit.server.test_images import EPS, data, picture
from tests.servekit.server.test_tls import self_signed

from common_platform.errors import ConfigError, RequestError
from servekit.multimodal.fetch import fetch, is_public
from servekit.multimodal.limits import MediaLimits

URL = "messages[0].content[0].image_url.url"
HERE = "127.0.0.1"  # named, so it may be called though it is private; ``localhost`` is named too, and may not
MOST = 100_000


def answer(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + body


def chunked(body: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[i : i + 50]), body[i : i + 50]) for i in range(0, len(body), 50))
    return answer(chunks + b"0\r\n\r\n", "Transfer-Encoding: chunked")


class Host:
    """Says what it is told to, to one caller after the other, and keeps what it was asked."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._listener = socket.create_server((HERE, 0))
        self.port = self._listener.getsockname()[1]
        self.asked: list[bytes] = []
        self.say: Callable[[socket.socket], None] = lambda caller: None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            with caller:
                caller.settimeout(PATIENCE_S)
                try:
                    if self._tls is not None:
                        caller = self._tls.wrap_socket(caller, server_side=True)
                    self.asked.append(caller.recv(65536))
                    self.say(caller)
                    caller.close()
                except OSError:  # the caller has heard enough
                    continue

    def says(self, content: bytes) -> None:
        self.say = lambda caller: caller.sendall(content)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pictures").resolve() / "open"
    (made / "deep").mkdir(parents=True)
    (made / "good.png").write_bytes(picture("PNG"))
    (made / "deep" / "good.gif").write_bytes(picture("GIF"))
    (made / "large.png").write_bytes(bytes(MOST + 1))
    (made / "empty.png").write_bytes(b"")
    (made.parent / "secret.png").write_bytes(picture("PNG"))
    (made / "link.png").symlink_to(made.parent / "secret.png")
    (made / "away").symlink_to(made.parent)
    return made


@pytest.fixture(scope="module")
def curious(tiny_model: Path, folder: Path) -> Iterator[ServerProcess]:
    flags = ["--allowed-media-domains", HERE, "--allowed-media-domains", "localhost", "--media-timeout-s", "3"]
    flags += ["--allowed-media-dirs", str(folder), "--max-media-bytes", str(MOST)]
    started = ServerProcess(tiny_model, *flags)
    yield started
    started.stop()


@pytest.fixture
def http(curious: ServerProcess) -> Iterator[httpx.Client]:
    with curious.client() as client:
        yield client


@pytest.fixture(scope="module")
def before(curious: ServerProcess) -> Sight:
    with curious.client() as client:
        return canary(client)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) of a host here, which stands for itself."""
    folder = tmp_path_factory.mktemp("authority")
    return self_signed(folder, HERE)


def test_a_picture_of_a_host_that_proves_who_it_is_is_fetched_over_tls(
    tiny_model: Path, certificate: tuple[Path, Path]
) -> None:
    """And of one that does not, it is not: only the first server here trusts whoever signed the certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*map(str, certificate))
    host = Host(context)
    host.says(answer(GOOD, f"Content-Length: {len(GOOD)}"))
    found = []
    try:
        for trusted in ({"SSL_CERT_FILE": str(certificate[0])}, {}):
            started = ServerProcess(tiny_model, "--allowed-media-domains", HERE, env=trusted)
            try:
                with started.client() as client:
                    error = error_of(client, f"https://{HERE}:{host.port}/a.png")
                    found.append((error["code"], error["param"]))
            finally:
                started.stop()
    finally:
        host.close()
    assert found == [SEEN, ("media_fetch_failed", URL)]
    assert [asked.split(b"\r\n")[0] for asked in host.asked] == [b"GET /a.png HTTP/1.1"]


def error_of(http: httpx.Client, url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    told = http.post(CHAT, json=chat(messages=[{"role": "user", "content": [part]}]))
    assert told.status_code == 400, told.text
    return told.json()["error"]


GOOD = picture("PNG")
SEEN = ("unsupported", "messages[0].content[0].type")


@pytest.mark.parametrize(
    "said",
    [
        answer(GOOD, f"Content-Length: {len(GOOD)}"),
        answer(GOOD, "Content-Type: text/plain"),
        chunked(GOOD),
    ],
    ids=["length", "end", "chunks"],
)
def test_a_picture_elsewhere_is_treated_as_one_that_came_along(
    http: httpx.Client, host: Host, before: Sight, said: bytes
) -> None:
    host.says(said)
    error = error_of(http, f"http://{HERE}:{host.port}/a%20b.png?size=1#part")
    assert (error["code"], error["param"]) == SEEN, error
    lines = host.asked[0].decode().split("\r\n")
    assert lines[:2] == ["GET /a%20b.png?size=1 HTTP/1.1", f"Host: {HERE}:{host.port}"]
    assert canary(http) == before


BAD: list[tuple[str, bytes, str, tuple[str, ...]]] = [
    ("format", answer(EPS), "media_format_refused", ()),
    ("med-023", answer(b"", "Location: http://127.0.0.1:9/", status="302 Found"), "media_redirect_refused", ("302",)),
    ("status", answer(GOOD, status="404 Not Found"), "media_fetch_failed", ("404",)),
    ("no-http", b"SSH-2.0-OpenSSH_9.2\r\n", "media_fetch_failed", ()),
    ("headers", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 4000, "media_fetch_failed", ("16384",)),
    ("nothing", b"", "media_truncated", ()),
    ("no-body", answer(b"", "Content-Length: 0"), "media_empty", ()),
    ("cut", answer(GOOD[:-5], f"Content-Length: {len(GOOD)}"), "media_truncated", ()),
    ("more", answer(GOOD + b"x" * 5000, f"Content-Length: {len(GOOD)}"), "media_inconsistent", ()),
    ("zipped", answer(b"\x1f\x8b" + GOOD, "Content-Encoding: gzip"), "media_unknown_format", ()),
]


@pytest.mark.parametrize(("said", "code", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_what_is_no_picture_is_said(
    http: httpx.Client, host: Host, before: Sight, said: bytes, code: str, words: tuple[str, ...]
) -> None:
    host.says(said)
    error = error_of(http, f"http://{HERE}:{host.port}/x.png")
    assert (error["code"], error["param"]) == (code, URL), error
    assert all(word in error["message"] for word in words), error
    assert len(host.asked) == 1, "nobody else is called"
    assert canary(http) == before


@pytest.mark.parametrize("lines", [["Content-Length: 100"], []])
def test_bytes_are_counted_and_not_believed(http: httpx.Client, host: Host, before: Sight, lines: list[str]) -> None:
    """med-029: with no end; the host notices when it is heard no more."""
    sent = 0

    def say(caller: socket.socket) -> None:
        nonlocal sent
        caller.sendall(answer(b"", *lines))
        while True:
            sent += caller.send(bytes(65536))

    host.say = say
    error = error_of(http, f"http://{HERE}:{host.port}/x.png")
    assert (error["code"], error["param"]) == ("media_too_large", URL), error
    assert all(word in error["message"] for word in (str(MOST), "--max-media-bytes"))
    assert canary(http) == before


def test_a_host_that_dribbles_is_given_up_and_keeps_nobody_waiting(
    curious: ServerProcess, http: httpx.Client, host: Host, before: Sight
) -> None:
    """med-030: there is one deadline for all of it."""
    enough = threading.Event()

    def say(caller: socket.socket) -> None:
        caller.sendall(answer(b"", "Content-Length: 90000"))
        while not enough.wait(0.05):
            caller.sendall(b"x")

    host.say = say
    told: list[dict[str, Any]] = []
    waiting = threading.Thread(target=lambda: told.append(error_of(http, f"http://{HERE}:{host.port}/x.png")))
    waiting.start()
    with curious.client() as other:
        assert other.post(CHAT, json=chat()).status_code == 200
    waiting.join(2 * PATIENCE_S)
    enough.set()
    assert (told[0]["code"], told[0]["param"]) == ("media_timeout", URL)
    assert all(word in told[0]["message"] for word in ("3 s", "--media-timeout-s"))
    assert canary(http) == before


def test_a_name_that_leads_to_a_private_address_is_not_called(http: httpx.Client, host: Host, before: Sight) -> None:
    error = error_of(http, f"http://localhost:{host.port}/x.png")  # med-024
    assert (error["code"], error["param"]) == ("media_host_refused", URL)
    assert "private address" in error["message"]
    assert not host.asked
    assert error_of(http, "http://127.0.0.2/x.png")["code"] == "media_host_refused"
    assert canary(http) == before


def test_a_host_that_does_not_answer_is_said_without_a_word_about_it(http: httpx.Client) -> None:
    with socket.create_server((HERE, 0)) as taken:
        port = taken.getsockname()[1]
    error = error_of(http, f"http://{HERE}:{port}/x.png")
    assert error["code"] == "media_fetch_failed"
    assert "Errno" not in error["message"]


@pytest.mark.parametrize("name", ["good.png", "deep/good.gif"])
def test_files_of_a_folder_that_is_named_are_pictures(http: httpx.Client, folder: Path, name: str) -> None:
    error = error_of(http, f"file://{folder}/{name}")
    assert (error["code"], error["param"]) == SEEN, error


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param("../secret.png", "media_path_refused", id="med-019"),
        pytest.param("link.png", "media_path_refused", id="med-020"),
        ("%2e%2e/secret.png", "media_path_refused"),
        ("away/secret.png", "media_path_refused"),
        ("./good.png", "media_path_refused"),
        ("/good.png", "media_path_refused"),
        ("deep", "media_path_refused"),
        ("no-such.png", "media_path_refused"),
        ("good.png%00", "media_path_refused"),
        ("", "media_path_refused"),
        ("large.png", "media_too_large"),
        ("empty.png", "media_empty"),
    ],
)
def test_other_files_are_not_opened(http: httpx.Client, folder: Path, before: Sight, name: str, code: str) -> None:
    error = error_of(http, f"file://{folder}/{name}")
    assert (error["code"], error["param"]) == (code, URL), error
    assert str(folder) not in error["message"]
    assert canary(http) == before


def test_files_of_other_hosts_and_folders_are_not_opened(http: httpx.Client, folder: Path) -> None:
    for url in (f"file://elsewhere{folder}/good.png", "file:///etc/passwd", f"file://{folder}-not/x.png"):
        assert error_of(http, url)["code"] == "media_path_refused"


def test_every_form_of_request_looks_elsewhere(http: httpx.Client, host: Host) -> None:
    host.says(answer(data(GOOD).encode()))
    url = f"http://{HERE}:{host.port}/x.png"
    image = {"type": "image", "source": {"type": "url", "url": url}}
    for path, body in (
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}),
        ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "user", "content": [image]}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": [image]}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}),
    ):
        error = http.post(path, json={"model": "M", **body}).json()["error"]
        assert error["code"] == "media_unknown_format", (path, error)
    assert len(host.asked) == 4


PRIVATE = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1"]  # noqa: S104
PRIVATE += ["::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]
PRIVATE += ["255.255.255.255", "198.18.0.1", "240.0.0.1", "64:ff9b::a00:1", "2001:db8::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_our_own_are_private_in_every_disguise(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
def test_a_wrapped_address_is_what_it_wraps(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    for wrapped in (f"::ffff:{address}", str(ipaddress.IPv6Address((0x64FF9B << 96) | number))):
        assert is_public(ipaddress.ip_address(wrapped)) == is_public(address)
    if is_public(address):
        assert address.is_global


def test_a_public_address_may_be_called() -> None:
    assert is_public(ipaddress.ip_address("93.184.216.34"))
    assert is_public(ipaddress.ip_address("2606:2800:220:1:248:1893:25c8:1946"))


@pytest.mark.parametrize("given", ["relative", "/", "/no/such/folder"])
def test_folders_that_are_not_plain_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="allowed_media_dirs"):
        MediaLimits(allowed_dirs=(given,))


def test_nobody_is_called_and_nothing_opened_unless_named(host: Host, folder: Path) -> None:
    for url in (f"http://{HERE}:{host.port}/x.png", f"file://{folder}/good.png"):
        with pytest.raises(RequestError):
            asyncio.run(fetch(url, "u", MediaLimits()))
    assert not host.asked
