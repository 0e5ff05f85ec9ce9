"""The description of the routes is true: what it allows is answered, and no request of any kind is answered 500."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from tests.servekit.server.canary import canary
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.rows import ROWS, chat, completion

from servekit.server.app import ROUTES

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
jsonschema_rs = pytest.importorskip("jsonschema_rs")  # which it brings along
told = pytest.importorskip("schemathesis.specs.openapi.checks")
common = pytest.importorskip("schemathesis.checks")
Mode = pytest.importorskip("schemathesis.generation").GenerationMode

CHECKS = [
    common.not_a_server_error,
    told.status_code_conformance,
    told.content_type_conformance,
    told.response_schema_conformance,
]
CHEAP = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "n": 1, "background": False}


@pytest.fixture(scope="module")
def described(server: ServerProcess) -> dict[str, Any]:
    return httpx.get(f"{server.url}/openapi.json").json()


def test_every_route_is_described(described: dict[str, Any]) -> None:
    found = {(method, path) for path, methods in described["paths"].items() for method in methods}
    served = {
        (method.lower(), route.path.replace(":path", ""))
        for module in ROUTES
        for route in module.router.routes
        for method in route.methods
    }
    assert served == found


def schema_of(described: dict[str, Any], path: str) -> dict[str, Any]:
    return described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_its_limits_are_those_of_the_checks(described: dict[str, Any]) -> None:
    """Good requests fit it; of the bad rows about single fields, all that a schema can tell do not."""
    assert jsonschema_rs.validator_for(schema_of(described, "/v1/completions")).is_valid(completion())
    assert jsonschema_rs.validator_for(schema_of(described, "/v1/chat/completions")).is_valid(
        chat(stop=["a"], logit_bias={"5": 1}, top_p=0.5)
    )
    fits: Counter[bool] = Counter()
    for row in ROWS:
        if row.code not in ("out_of_range", "invalid_type", "unknown_field") or not isinstance(row.body, dict):
            continue
        if row.path not in described["paths"] or "." in (row.param or ""):
            continue
        validator = jsonschema_rs.validator_for(schema_of(described, row.path))
        fits[validator.is_valid(row.body)] += 1
    assert fits[False] > 50
    assert fits[True] <= 8, "products, and what other fields must say"


def cheap(body: Any) -> Any:
    """The same request, without the work that its numbers ask for."""
    if not isinstance(body, dict):
        return body
    return body | {name: value for name, value in CHEAP.items() if isinstance(body.get(name), int)}


def attack(server: ServerProcess, num_examples: int) -> Counter[int]:
    """Requests that the description allows, and requests that it does not, for every operation; statuses."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    schema.config.generation.update(modes=[Mode.POSITIVE, Mode.NEGATIVE])
    seen: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        limits = settings(
            max_examples=num_examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )

        @limits
        @given(case=operation.as_strategy(Mode.POSITIVE) | operation.as_strategy(Mode.NEGATIVE))
        def one(case: Any) -> None:
            case.body = cheap(case.body)
            response = case.call(timeout=30)
            seen[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        one()
    return seen


@pytest.mark.parametrize("num_examples", [12, pytest.param(500, marks=pytest.mark.slow)])
def test_no_request_that_a_machine_thinks_of_is_answered_500(server: ServerProcess, num_examples: int) -> None:
    with server.client() as client:
        before = canary(client)
        seen = attack(server, num_examples)
        print(json.dumps({"statuses": seen}))
        assert seen[200] > num_examples
        assert seen[400] > num_examples
        assert canary(client) == before
    assert server.engine() == server.engine_pid
    assert not any("Traceback" in line for line in server.said)
