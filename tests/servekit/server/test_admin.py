"""Management on its own listener with its own key; keys that change; what one key may use; pages of other origins."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.servekit.server.processes import PATIENCE_S, ServerProcess, is_alive, wait_until
from tests.servekit.server.raw import connect, post_of
from tests.servekit.server.rows import COMPLETIONS, completion

from common_platform.errors import ConfigError
from servekit.server.app import ADMIN_ROUTES
from servekit.server.budgets import Budget, Budgets
from servekit.server.config import ServerConfig
from servekit.server.errors import RateLimited
from servekit.server.keys import KeyRing

KEY, OTHER, GUEST, ADMIN = "key-of-a-caller", "another-callers-key", "a-guests-own-key", "key-for-management"
ORIGIN = "https://page.example"
ROUTES = [
    (method, route.path)
    for module in ADMIN_ROUTES
    for route in module.router.routes
    for method in sorted(route.methods)
]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"{KEY}\n{GUEST}\n")
    return path


@pytest.fixture(scope="module")
def managed(tiny_model: Path, key_file: Path) -> Iterator[ServerProcess]:
    flags = ["--api-key-file", str(key_file), "--allowed-origins", ORIGIN]
    flags += ["--key-max-concurrent-requests", "3", "--key-tokens-per-minute", "60000"]
    started = ServerProcess(tiny_model, *flags, env={"SERVEKIT_ADMIN_KEY": ADMIN})
    yield started
    started.stop()


@pytest.fixture
def admin(managed: ServerProcess) -> Iterator[httpx.Client]:
    url = next(line.split()[-1] for line in managed.said if "management on" in line)
    with httpx.Client(base_url=url, timeout=2 * PATIENCE_S, headers=bearer(ADMIN)) as client:
        yield client


@pytest.fixture
def http(managed: ServerProcess) -> Iterator[httpx.Client]:
    with managed.client(headers=bearer(KEY)) as client:
        yield client


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route != ("GET", "/health")])
def test_management_wants_its_own_key(admin: httpx.Client, http: httpx.Client, method: str, path: str) -> None:
    assert code(admin.request(method, path, headers=bearer("wrong-wrong"))) == (401, "invalid_api_key")
    assert code(admin.request(method, path, headers=bearer(KEY))) == (403, "permission_denied")  # srv-175
    if path.startswith("/admin"):  # srv-173, srv-174
        assert code(http.request(method, path)) == (404, "not_found")
        assert code(http.request(method, path, headers=bearer(ADMIN))) == (401, "invalid_api_key")


def test_paused_means_no_new_requests_and_resumed_that_they_are_taken(admin: httpx.Client, http: httpx.Client) -> None:
    assert admin.post("/admin/pause").json()["closed_for"] == "paused"
    refused = http.post(COMPLETIONS, json=completion())
    assert code(refused) == (503, "paused")
    assert refused.headers["retry-after"] == "1"
    assert http.get("/health").status_code == 200
    assert http.get("/health/ready").status_code == 503
    assert admin.post("/admin/resume").json()["ready"] is True
    assert http.post(COMPLETIONS, json=completion()).status_code == 200


def test_no_route_takes_work_while_paused_and_none_looks_at_it(admin: httpx.Client, http: httpx.Client) -> None:
    paths = (COMPLETIONS, "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")
    paths += ("/v1/rerank", "/rerank", "/v1/score", "/score")
    admin.post("/admin/pause")
    try:
        for path in paths:
            refused = http.post(path, content=b"no JSON")
            assert code(refused) == (503, "paused"), path
            assert int(refused.headers["retry-after"]) >= 1
            assert ("type" in refused.json()) == (path == "/v1/messages"), path
        counted = http.get("/metrics").text
        assert http.get("/v1/models").status_code == 200
    finally:
        admin.post("/admin/resume")
    for path in paths:
        series = f'http_requests_total{{handler="{path}",method="POST",status="503"}}'
        assert any(line.startswith(series) for line in counted.splitlines()), path


@pytest.mark.parametrize("level", [1, 2])
def test_a_model_that_slept_says_the_same_when_awake(admin: httpx.Client, http: httpx.Client, level: int) -> None:
    asked = completion(prompt="sleepy", temperature=0, max_tokens=8)
    before = http.post(COMPLETIONS, json=asked).json()["choices"][0]["text"]
    assert admin.post("/admin/sleep", json={"level": level}).json()["closed_for"] == "sleeping"
    assert code(http.post(COMPLETIONS, json=asked)) == (503, "sleeping")
    assert admin.post("/admin/wake_up").json()["ready"] is True
    assert http.post(COMPLETIONS, json=asked).json()["choices"][0]["text"] == before


def test_nobody_is_put_to_sleep_at_work(admin: httpx.Client, http: httpx.Client) -> None:
    body = completion(max_tokens=1000, ignore_eos=True, stream=True)

    def is_refused() -> bool:
        """Once more where the answer had ended before."""
        with http.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            told = admin.post("/admin/sleep")
            if told.status_code == 200:
                admin.post("/admin/wake_up")
                return False
            assert code(told) == (409, "conflict")
            assert admin.get("/admin/status").json()["ready"] is True
            return any("[DONE]" in line for line in lines)

    assert wait_until(is_refused)
    assert code(admin.post("/admin/sleep", json={"level": 3})) == (400, "out_of_range")


def test_a_reset_forgets_prefixes(admin: httpx.Client, http: httpx.Client) -> None:
    def cached() -> int:
        body = completion(prompt="a prompt that is long enough to be kept in blocks")
        return http.post(COMPLETIONS, json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() > 0
    assert admin.post("/admin/reset_prefix_cache").json() == {"done": True}
    assert cached() == 0


def test_a_key_over_its_share_is_told_and_others_are_served(managed: ServerProcess, http: httpx.Client) -> None:
    asked = post_of(completion(max_tokens=1000, ignore_eos=True, stream=True, n=2), f"Authorization: Bearer {GUEST}")
    with contextlib.ExitStack() as held, managed.client(headers=bearer(GUEST)) as guest:
        with managed.frozen():
            for _ in range(3):
                held.enter_context(connect(managed)).sendall(asked)
            assert wait_until(lambda: managed.requests() == 3)
            refused = guest.post(COMPLETIONS, json=completion())
        assert code(refused) == (429, "rate_limit_exceeded")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "--key-max-concurrent-requests" in refused.json()["error"]["message"]
        assert http.post(COMPLETIONS, json=completion()).status_code == 200
        held.close()
        assert wait_until(lambda: guest.post(COMPLETIONS, json=completion()).status_code == 200)


def test_a_hang_up_exchanges_the_keys_and_a_bad_file_changes_nothing(managed: ServerProcess, key_file: Path) -> None:
    def opens(key: str) -> bool:
        return httpx.get(f"{managed.url}/v1/models", headers=bearer(key)).status_code == 200

    assert (opens(KEY), opens(OTHER)) == (True, False)
    key_file.write_text("short\n")
    managed.process.send_signal(signal.SIGHUP)
    assert wait_until(lambda: any("the keys stay" in line for line in managed.said))
    assert (opens(KEY), opens(OTHER)) == (True, False)
    key_file.write_text(f"{OTHER}\n")
    managed.process.send_signal(signal.SIGHUP)
    assert wait_until(lambda: opens(OTHER))
    assert not opens(KEY)
    key_file.write_text(f"{KEY}\n{GUEST}\n")
    managed.process.send_signal(signal.SIGHUP)
    assert wait_until(lambda: opens(KEY))


def test_pages_of_named_origins_only_may_call(managed: ServerProcess) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    url = f"{managed.url}/v1/models"
    allowed = httpx.options(url, headers={"Origin": ORIGIN} | asks)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in allowed.headers
    strange = httpx.options(url, headers={"Origin": "https://evil.example"} | asks)
    assert code(strange) == (401, "missing_api_key")
    assert "access-control-allow-origin" not in strange.headers
    answer = httpx.get(url, headers={"Origin": ORIGIN} | bearer(KEY))
    assert (answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (ORIGIN, "Origin")
    assert httpx.get(url, headers={"Origin": ORIGIN}).status_code == 401
    assert "access-control-allow-origin" not in httpx.get(url, headers=bearer(KEY)).headers


def test_why_it_is_not_ready_is_told_to_those_with_a_key(managed: ServerProcess, http: httpx.Client) -> None:
    with managed.frozen():
        assert wait_until(lambda: http.get("/health").status_code == 503)
        assert code(http.get("/health")) == (503, "engine_stalled")
        stranger = httpx.get(f"{managed.url}/health", timeout=PATIENCE_S)
    assert code(stranger) == (503, "not_ready")
    assert stranger.json()["error"]["message"] == "not ok"
    assert wait_until(lambda: http.get("/health").status_code == 200)


def test_drain_ends_the_server_once_answers_have_ended(managed: ServerProcess, admin: httpx.Client) -> None:
    """The last test of this server."""
    body = completion(max_tokens=800, ignore_eos=True, stream=True)
    with managed.client(headers=bearer(KEY)) as http, http.stream("POST", COMPLETIONS, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        admin.post("/admin/drain")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert managed.wait() == 0
    assert not is_alive(managed.engine_pid)


@pytest.mark.parametrize(
    "settings",
    [
        {"admin_port": 1},
        {"admin_port": 9000, "port": 9000, "admin_keys": (ADMIN,)},  # cfg-014
        {"admin_port": 1, "admin_keys": (KEY,), "api_keys": (KEY,)},
        {"admin_port": 70000, "admin_keys": (ADMIN,)},
        {"admin_port": 1, "admin_keys": ("short",)},
        {"api_key_file": "no-such-file"},
        {"ssl_certfile": "no-such-file"},
        {"ssl_keyfile": __file__},
        {"max_engine_restarts": -1},
    ],
)
def test_settings_that_would_leave_it_open_or_broken_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as raised:
        ServerConfig(**settings)
    assert raised.value.flag
    assert KEY not in str(raised.value)


def test_a_bucket_fills_up_evenly_and_tells_when_to_come_back() -> None:
    now = [0.0]
    budgets = Budgets(Budget(requests_per_minute=2, tokens_per_minute=600), clock=lambda: now[0])
    for _ in range(2):
        budgets.enter("a")
        budgets.leave("a", 0)
    with pytest.raises(RateLimited) as raised:
        budgets.enter("a")
    assert raised.value.retry_after_s == pytest.approx(30)
    budgets.enter("b")
    budgets.leave("b", 1200)  # the length of an answer is known at its end: a debt is paid off first
    now[0] = 30
    budgets.enter("a")
    with pytest.raises(RateLimited) as raised:
        budgets.enter("b")
    assert raised.value.retry_after_s == pytest.approx(30.1)
    now[0] = 61
    budgets.enter("b")


def test_a_ring_of_keys_keeps_no_key(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# remark\n\n{OTHER}\n")
    ring = KeyRing([KEY], str(tmp_path / "keys"))
    assert ring.tenant(KEY.encode()) != ring.tenant(OTHER.encode())
    assert ring.tenant(b"wrong-wrong") is None
    held = repr([getattr(ring, name) for name in vars(ring)])
    assert KEY not in held
    assert OTHER not in held
    assert not KeyRing([])
