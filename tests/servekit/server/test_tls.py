"""TLS, with callers that show a certificate where one is wanted."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.rows import COMPLETIONS, completion


def self_signed(folder: Path, address: str) -> tuple[Path, Path]:
    """(certificate, key) for a host by its address, signed by itself."""
    paths = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", f"subjectAltName=IP:{address}", "-out", str(paths[0]), "-keyout", str(paths[1])]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return paths


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) for this machine."""
    return self_signed(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture(scope="module")
def secured(tiny_model: Path, certificate: tuple[Path, Path]) -> Iterator[ServerProcess]:
    cert, key = map(str, certificate)
    started = ServerProcess(tiny_model, "--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ca-certs", cert)
    yield started
    started.stop()


def test_callers_with_a_certificate_are_served_over_tls(secured: ServerProcess, certificate: tuple[Path, Path]) -> None:
    assert secured.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(certificate[0]))
    context.load_cert_chain(*map(str, certificate))
    with secured.client(verify=context) as http:
        body = completion(max_tokens=5, ignore_eos=True, stream=True)
        with http.stream("POST", COMPLETIONS, json=body) as response:
            assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"


def test_others_are_not(secured: ServerProcess, certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with secured.client(verify=context) as http, pytest.raises(httpx.TransportError):
        http.get("/health")
    with pytest.raises(httpx.TransportError):
        httpx.get(secured.url.replace("https", "http") + "/health")
