"""Every bad request is answered as written, tells nothing of the inside, and hurts nobody else."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from tests.servekit.server.canary import Sight, canary
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.rows import CHAT, COMPLETIONS, ROWS, Row, chat, completion

TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    405: "invalid_request_error",
    415: "invalid_request_error",
}
INSIDE = re.compile(r"0x[0-9a-f]{6}|Traceback|site-packages|/tmp/|/home/|\.py\b|Exception|object at ")


def send(http: httpx.Client, row: Row) -> httpx.Response:
    headers = dict(row.headers)
    if isinstance(row.body, bytes):
        content = row.body
        if row.status not in (415, 405, 404):
            headers.setdefault("Content-Type", "application/json")
    else:
        content, headers["Content-Type"] = json.dumps(row.body).encode(), "application/json"
    return http.request(row.method, row.path, content=content, headers=headers)


@pytest.fixture(scope="module")
def baseline(server: ServerProcess) -> Sight:
    with server.client() as client:
        return canary(client)


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_bad_row(server: ServerProcess, http: httpx.Client, baseline: Sight, row: Row) -> None:
    response = send(http, row)
    body = response.json()
    assert (response.status_code, body["error"]["code"], body["error"]["param"]) == (row.status, row.code, row.param), (
        body
    )
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == TYPES[row.status]
    assert len(body["error"]["message"]) <= 400
    for word in row.words:
        assert word in body["error"]["message"]
    assert not INSIDE.search(response.text)
    assert server.engine() == server.engine_pid
    assert canary(http) == baseline


def test_a_method_that_is_not_allowed_names_those_that_are(http: httpx.Client) -> None:
    assert http.get(COMPLETIONS).headers["allow"] == "POST"


GOOD_BUT_ODD: list[tuple[str, str, dict[str, Any]]] = [
    ("srv-012", COMPLETIONS, completion(prompt="a\x00b")),
    ("srv-057", CHAT, chat(messages=[{"role": "user", "content": "<|vision_start|><|image_pad|>"}])),
    ("srv-094", COMPLETIONS, completion(echo=True, max_tokens=0, logprobs=1)),
    ("srv-125", CHAT, chat(messages=[{"role": "user", "content": "hi", "name": "\n{{ 7*7 }}"}])),
    ("srv-126", CHAT, chat(messages=[{"role": "user", "content": "{% for i in range(10**9) %}x{% endfor %}"}])),
    ("null-is-absent", COMPLETIONS, completion(temperature=None, stop=None, suffix=None, n=None, user=None)),
    ("empty-suffix", COMPLETIONS, completion(suffix="")),
    ("no-tools", CHAT, chat(tools=[], tool_choice="none")),
    (
        "developer",
        CHAT,
        chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "x"}]),
    ),
]


@pytest.mark.parametrize(("path", "body"), [row[1:] for row in GOOD_BUT_ODD], ids=[row[0] for row in GOOD_BUT_ODD])
def test_odd_but_good_requests_are_served(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    assert "49" not in response.json().get("prompt", "")


def test_a_name_in_a_message_is_data_to_the_template(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "hi", "name": "{{ 7*7 }}"}]
    tokens = http.post("/tokenize", json={"model": "M", "messages": messages}).json()["tokens"]
    assert "{{ 7*7 }}" in http.post("/detokenize", json={"model": "M", "tokens": tokens}).json()["prompt"]


def test_a_variable_that_the_template_reads_may_be_set(http: httpx.Client) -> None:
    body = {"model": "M", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"loud": True}}
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    assert "LOUD" in http.post("/detokenize", json={"model": "M", "tokens": tokens}).json()["prompt"]


def test_a_limit_itself_passes(http: httpx.Client) -> None:
    body = completion(stop=["x" * 256] * 16, n=1, logprobs=20, user="u" * 256, top_k=258, logit_bias={"257": -100})
    assert http.post(COMPLETIONS, json=body).status_code == 200
