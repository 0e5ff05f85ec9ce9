"""Deny by default: with a key, one route is open, and it says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from starlette.routing import Match
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.raw import connect, read_all
from tests.servekit.server.rows import COMPLETIONS, completion

from servekit.server.app import ROUTES as MODULES
from servekit.server.routes import health

KEY, OTHER = "correct-horse-battery", "another-key-entirely"
ROUTES = [
    (method, route.path.replace("{name:path}", "M").replace("{response_id}", "resp_x"))
    for routes in MODULES
    for route in routes.router.routes
    for method in sorted(route.methods)
]


@pytest.fixture(scope="module")
def locked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# for tests\n{OTHER}\n")
    started = ServerProcess(tiny_model, "--api-key-file", str(keys), env={"SERVEKIT_API_KEY": KEY})
    yield started
    started.stop()


@pytest.fixture
def http(locked: ServerProcess) -> Iterator[httpx.Client]:
    with locked.client() as client:
        yield client


def code(response: httpx.Response) -> str:
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"
    return response.json()["error"]["code"]


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route != ("GET", "/health")])
def test_every_route_wants_the_key(http: httpx.Client, method: str, path: str) -> None:
    """srv-156, srv-157, srv-158, srv-159, srv-160, srv-161, srv-162."""
    assert code(http.request(method, path)) == "missing_api_key"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/metrics", "/docs", "/openapi.json", "//v1/completions", "/"])
def test_so_does_a_route_that_is_not_there(http: httpx.Client, path: str) -> None:  # srv-163, srv-164, srv-171
    assert code(http.get(f"{str(http.base_url).rstrip('/')}{path}")) == "missing_api_key"


@pytest.mark.parametrize("method", ["OPTIONS", "POST", "DELETE"])
def test_health_is_open_to_get_only(http: httpx.Client, method: str) -> None:
    assert code(http.request(method, "/health")) == "missing_api_key"


def test_health_is_open_and_says_nothing(http: httpx.Client) -> None:  # srv-172
    response = http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "given",
    [f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer", KEY, f"Bearer {KEY} {KEY}", "Bearer \xff"],
)
def test_a_wrong_key_is_refused(locked: ServerProcess, http: httpx.Client, given: str) -> None:
    """srv-165, srv-167, srv-168."""
    response = http.get("/v1/models", headers=[(b"Authorization", given.encode("latin-1"))])
    assert code(response) == "invalid_api_key"
    assert KEY[:8] not in response.text
    assert not any(KEY in line for line in locked.said)


def test_two_headers_are_none(http: httpx.Client) -> None:  # srv-169
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer wrong-wrong")]
    assert code(http.get("/v1/models", headers=headers)) == "invalid_api_key"
    assert code(http.get("/v1/models", headers=headers[::-1])) == "invalid_api_key"


def test_the_host_header_opens_nothing(locked: ServerProcess) -> None:  # srv-170
    with connect(locked) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a/health?\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
        )
        assert read_all(connection).startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_each_key_opens_the_server(locked: ServerProcess, key: str) -> None:
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0) as client:
        assert client.completions.create(model="M", prompt="x", max_tokens=2).usage.completion_tokens > 0


def test_keys_do_not_share_cached_prefixes(http: httpx.Client) -> None:  # srv-187
    def cached(key: str, **more: str) -> int:
        body = completion(prompt="a prompt of more than one block of tokens", **more)
        answer = http.post(COMPLETIONS, json=body, headers={"Authorization": f"Bearer {key}"}).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(KEY) == 0
    assert cached(KEY) > 0
    assert cached(OTHER) == 0
    assert cached(KEY, cache_salt="salt") == 0
    assert cached(KEY, cache_salt="salt") > 0


def test_the_key_is_in_no_childs_environment(locked: ServerProcess) -> None:
    assert KEY not in Path(f"/proc/{locked.engine_pid}/environ").read_text()


def test_one_route_is_public() -> None:
    scope = {"type": "http", "method": "GET", "path": "/health", "headers": []}
    assert [route.path for route in health.router.routes if route.matches(scope)[0] is Match.FULL] == ["/health"]
    public = [
        route.path
        for routes in MODULES
        for route in routes.router.routes
        if getattr(route.endpoint, "is_public", False)
    ]
    assert public == ["/health"]


def test_a_model_for_text_gives_no_embeddings(http: httpx.Client) -> None:  # srv-144
    body = {"model": "M", "input": "hi"}
    answer = http.post("/v1/embeddings", json=body, headers={"Authorization": f"Bearer {KEY}"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported", "model")
    assert "embeddings" in error["message"]


def test_anthropics_header_opens_the_server_and_both_headers_do_not(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"X-Api-Key": KEY}).status_code == 200
    assert code(http.get("/v1/models", headers={"X-Api-Key": KEY[:-1]})) == "invalid_api_key"
    both = {"X-Api-Key": KEY, "Authorization": f"Bearer {KEY}"}
    assert code(http.get("/v1/models", headers=both)) == "invalid_api_key"
