"""Callers that are slow, half gone, too many or too curious: each as a row asks, and the canary after each."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import termios
import threading
import time
import uuid
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.servekit.server.canary import Sight, canary
from tests.servekit.server.processes import PATIENCE_S, ServerProcess, state_of, wait_until
from tests.servekit.server.raw import connect, error_in, head, post_of, read_all
from tests.servekit.server.rows import CHAT, COMPLETIONS, LENGTH, chat, completion

MIB = 1 << 20
FLAGS = ("--body-timeout-s", "2", "--max-num-seqs", "1", "--max-queue", "8", "--max-body-bytes", str(MIB))


@pytest.fixture(scope="module")
def narrow(tiny_model: Path) -> Iterator[ServerProcess]:
    """One sequence at a time, short times."""
    started = ServerProcess(tiny_model, *FLAGS)
    yield started
    started.stop()


@pytest.fixture
def small(narrow: ServerProcess) -> Iterator[httpx.Client]:
    with narrow.client() as client:
        yield client


@pytest.fixture(scope="module")
def of_narrow(narrow: ServerProcess) -> Sight:
    with narrow.client() as client:
        return canary(client)


@pytest.fixture(scope="module")
def of_server(server: ServerProcess) -> Sight:
    with server.client() as client:
        return canary(client)


def num_files(server: ServerProcess) -> int:
    return psutil.Process(server.process.pid).num_fds()


def test_a_body_of_33_mib_is_refused_by_its_length(server: ServerProcess, http: httpx.Client, of_server: Sight) -> None:
    with connect(server) as connection:  # srv-017
        connection.sendall(head(f"Content-Length: {33 * MIB + 2}"))
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    error = error_in(answer)
    assert (error["code"], error["param"], error["type"]) == ("body_too_large", None, "invalid_request_error")
    assert all(word in error["message"] for word in (str(33 * MIB + 2), str(32 * MIB), "--max-body-bytes"))
    assert canary(http) == of_server


def drip(server: ServerProcess, num_chunks: int) -> bytes:
    """A chunked body of 16-byte chunks, as far as the server takes it; its answer."""
    chunks = b"10\r\n" + b" " * 16 + b"\r\n"
    with connect(server) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        try:
            for _ in range(num_chunks // 1000):
                connection.sendall(chunks * 1000)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return read_all(connection)


@pytest.mark.parametrize("mib", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_small_chunks_without_end_are_cut_at_the_limit(
    narrow: ServerProcess, small: httpx.Client, of_narrow: Sight, mib: int
) -> None:
    before = psutil.Process(narrow.process.pid).memory_info().rss  # srv-018
    answer = drip(narrow, mib * MIB // 16)
    assert psutil.Process(narrow.process.pid).memory_info().rss - before <= 64 * MIB
    if answer:  # who still sends when the answer comes may lose it to the reset that follows
        error = error_in(answer)
        assert (answer[9:12], error["code"]) in ((b"413", "body_too_large"), (b"408", "request_timeout"))
    assert canary(small) == of_narrow


def test_two_hundred_slow_bodies_hold_up_nobody(narrow: ServerProcess, small: httpx.Client, of_narrow: Sight) -> None:
    connections = [connect(narrow) for _ in range(200)]  # srv-026
    for connection in connections:
        connection.sendall(head("Content-Length: 100") + b"{")
    assert canary(small) == of_narrow
    for connection in connections:
        with connection:
            answer = read_all(connection)
        error = error_in(answer)
        assert (answer[9:12], error["code"], error["param"]) == (b"408", "request_timeout", None)
        assert "2 s" in error["message"]
        assert "--body-timeout-s" in error["message"]
    assert canary(small) == of_narrow


def test_who_closes_the_sending_half_ends_the_request(
    narrow: ServerProcess, small: httpx.Client, of_narrow: Sight
) -> None:
    """As docs/server.md says: a caller who half closes has left."""
    with connect(narrow) as connection:  # srv-030
        with narrow.frozen():
            connection.sendall(post_of(completion(max_tokens=900, ignore_eos=True, stream=True)))
            assert wait_until(lambda: narrow.requests() == 1)
            connection.shutdown(socket.SHUT_WR)
            assert wait_until(lambda: narrow.requests() == 0)
        assert b"[DONE]" not in read_all(connection)
    assert wait_until(lambda: any(line.get("finish") == "client_gone" for line in narrow.log_lines()))
    assert canary(small) == of_narrow
    assert not any("Traceback" in line for line in narrow.said)


def num_series(http: httpx.Client) -> int:
    return len([line for line in http.get("/metrics").text.splitlines() if not line.startswith("#")])


def test_unknown_models_make_no_series(http: httpx.Client, of_server: Sight) -> None:
    http.post(COMPLETIONS, json=completion(model="unknown"))  # srv-038
    before = num_series(http)
    for _ in range(1000):
        answer = http.post(COMPLETIONS, json=completion(model=str(uuid.uuid4())))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert num_series(http) == before
    assert canary(http) == of_server


def test_a_preflight_from_elsewhere_gets_no_leave(http: httpx.Client, of_server: Sight) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}  # srv-178
    assert not any(name.startswith("access-control") for name in http.options(COMPLETIONS, headers=asked).headers)
    assert canary(http) == of_server


def test_a_hundred_for_nine_places_are_served_or_told_to_come_back(
    narrow: ServerProcess, small: httpx.Client, of_narrow: Sight
) -> None:
    refused: list[httpx.Response] = []  # srv-180
    with narrow.client() as client:

        def ask(_: int) -> httpx.Response:
            answer = client.post(COMPLETIONS, json=completion(max_tokens=32, ignore_eos=True))
            if answer.status_code != 200:
                refused.append(answer)
            return answer

        with ThreadPoolExecutor(100) as pool:
            with narrow.frozen():
                asked = [pool.submit(ask, number) for number in range(100)]
                assert wait_until(lambda: len(refused) == 91), "told while nothing moves"
            answers = [one.result(2 * PATIENCE_S) for one in asked]
    assert sum(answer.status_code == 200 for answer in answers) == 9
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    assert canary(small) == of_narrow


def test_five_hundred_and_twelve_streams_run_and_one_more_is_refused(
    server: ServerProcess, http: httpx.Client, of_server: Sight
) -> None:
    """srv-179. The engine stands still until all are there."""
    body = completion(max_tokens=2, ignore_eos=True, stream=True)
    with contextlib.ExitStack() as held:
        with server.frozen():
            callers = [held.enter_context(connect(server)) for _ in range(512)]
            for caller in callers:
                caller.sendall(post_of(body, "Connection: close"))
            assert wait_until(lambda: server.requests() == 512)
            refused = http.post(COMPLETIONS, json=body)
        assert sum(b"data: [DONE]" in read_all(caller) for caller in callers) == 512
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["type"]) == (429, "too_many_streams", "rate_limit_error")
    assert all(word in error["message"] for word in ("512", "--max-streams"))
    assert int(refused.headers["retry-after"]) >= 1
    assert canary(http) == of_server


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_who_leaves_before_the_first_byte_leaves_nothing(
    narrow: ServerProcess, small: httpx.Client, of_narrow: Sight, count: int
) -> None:
    canary(small)
    files = num_files(narrow)  # srv-182, and srv-181 with a first byte in test_life
    data = post_of(completion(max_tokens=900, ignore_eos=True, stream=True))
    for _ in range(count):
        with connect(narrow) as connection:
            connection.sendall(data)
    assert wait_until(lambda: num_files(narrow) <= files), "descriptors are left"
    assert canary(small) == of_narrow


def shaped(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    return chat(response_format=form, temperature=0, **more)


def one_of(depth: int, branches: int = 4) -> dict[str, Any]:
    """``depth`` times nested, by name: written out, 12 deep and 4 wide would be 16 million schemas."""

    def choice(level: int) -> dict[str, Any]:
        inner = {"$ref": f"#/$defs/d{level + 1}"} if level + 1 < depth else {"type": "integer"}
        made = [{"type": "object", "properties": {f"k{i}": inner}, "required": [f"k{i}"]} for i in range(branches)]
        return {"oneOf": made}

    return {"$defs": {f"d{level}": choice(level) for level in range(depth)}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("schema", "codes"),
    [
        pytest.param(one_of(12), ("grammar_too_large", "grammar_timeout"), id="grm-007"),
        pytest.param({"type": "string", "pattern": "(a+)+$"}, ("grammar_timeout",), id="grm-010"),
    ],
)
def test_a_hard_schema_is_followed_or_refused_in_time(
    http: httpx.Client, of_server: Sight, schema: dict[str, Any], codes: tuple[str, ...]
) -> None:
    answer = http.post(CHAT, json=shaped(schema, max_tokens=32))
    if answer.status_code == 400:
        assert answer.json()["error"]["code"] in codes
    else:
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"]
    assert canary(http) == of_server


def test_a_bad_schema_leaves_a_good_one_at_work(http: httpx.Client, of_server: Sight) -> None:
    good: list[httpx.Response] = []  # grm-020
    schema = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 60}}, "required": ["a"]}
    body = shaped(schema, max_tokens=200)
    asking = threading.Thread(target=lambda: good.append(http.post(CHAT, json=body)))
    asking.start()
    refused = http.post(CHAT, json=shaped(schema | {"type": "not-a-type"}))
    asking.join(2 * PATIENCE_S)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "grammar_invalid")
    assert error["param"].startswith("response_format.json_schema")
    assert good[0].status_code == 200
    assert good[0].json()["choices"][0]["finish_reason"] in ("stop", "length")
    assert canary(http) == of_server


COMPILES = "servekit.sampling.structured.child"


def num_unread(pid: int) -> int:
    """Bytes that wait in the standard input of a process, a pipe."""
    size = array("i", [0])
    with Path(f"/proc/{pid}/fd/0").open("rb", buffering=0) as pipe:
        fcntl.ioctl(pipe, termios.FIONREAD, size)
    return size[0]


def test_a_compile_whose_caller_has_left_is_stopped(tiny_model: Path, of_server: Sight) -> None:
    """The process that compiles is stopped, so that it would take as long as it may: an hour."""
    patient = ServerProcess(tiny_model, "--grammar-timeout-s", "3600")
    try:
        with patient.client() as client:
            assert client.post(CHAT, json=shaped({"const": "first"}, max_tokens=2)).status_code == 200
            (pid,) = patient.running(COMPILES)
            os.kill(pid, signal.SIGSTOP)
            assert wait_until(lambda: state_of(pid) == "T")
            with connect(patient) as leaver, connect(patient) as neighbour:
                leaver.sendall(post_of(shaped({"const": "second"}), path=CHAT))
                assert wait_until(lambda: num_unread(pid) > 0), "the compile has not begun"
                neighbour.sendall(post_of(shaped({"const": "third"}, max_tokens=2), "Connection: close", path=CHAT))
                assert canary(client) == of_server, "who asks for no grammar is served meanwhile"
                assert client.post(CHAT, json=shaped({"const": "first"}, max_tokens=2)).status_code == 200
                leaver.close()
                assert wait_until(lambda: pid not in patient.running(COMPILES)), "the compile goes on"
                assert read_all(neighbour).startswith(b"HTTP/1.1 200")
            assert wait_until(lambda: patient.requests() == 0)
    finally:
        patient.stop()


@pytest.mark.parametrize("count", [40, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_many_schemas_in_turn_are_not_all_kept(server: ServerProcess, http: httpx.Client, count: int) -> None:
    """grm-021. The child that judges them and the engine are looked at too."""
    sizes = []
    for number in range(count):
        answer = http.post(CHAT, json=shaped({"const": f"v{number}"}, max_tokens=2))
        assert answer.status_code == 200, answer.text
        if number % 1000 == 999:
            family = psutil.Process(server.process.pid)
            sizes.append(sum(p.memory_info().rss for p in (family, *family.children(recursive=True))))
    if len(sizes) > 20:
        late = sizes[len(sizes) // 2 :]
        assert (late[-1] - late[0]) / len(late) <= MIB


def test_prefixes_that_a_weak_hash_would_mix_up_are_kept_apart(tiny_model: Path, http: httpx.Client) -> None:
    """srv-188. Blocks that differ in one token, or in order only, in front of one and the same block."""
    last = list(range(40, 56))
    pairs = [([i] * 15 + [i + 1], [i + 1] + [i] * 15) for i in range(3, 53)]
    prompts = [[*block, *last, 7] for pair in pairs for block in pair]

    def said(client: httpx.Client) -> list[list[int]]:
        body = completion(temperature=0, max_tokens=4, ignore_eos=True, return_token_ids=True)
        return [
            client.post(COMPLETIONS, json=body | {"prompt": prompt}).json()["choices"][0]["token_ids"]
            for prompt in prompts
        ]

    cached = said(http)
    assert said(http) == cached
    plain = ServerProcess(tiny_model, "--no-prefix-caching", "--max-num-seqs", "32")
    try:
        with plain.client() as client:
            assert said(client) == cached
    finally:
        plain.stop()


def test_a_full_pool_changes_no_answer(tiny_model: Path) -> None:
    """srv-190. Blocks for six of the sequences at once: the others wait, or give their blocks back."""
    num_blocks, block_bytes = 20, 2 * 2 * 2 * 16 * 16 * 4
    flags = ("--kv-cache-memory-bytes", str(num_blocks * block_bytes), "--max-num-seqs", "64", "--max-model-len", "128")
    full = ServerProcess(tiny_model, "--deterministic", *flags)
    try:
        with full.client() as client:

            def said(number: int) -> list[int]:
                prompt = f"prompt {number} " + "xyz" * (number % 7)
                body = completion(prompt=prompt, temperature=0, max_tokens=40, ignore_eos=True, return_token_ids=True)
                return client.post(COMPLETIONS, json=body).json()["choices"][0]["token_ids"]

            with ThreadPoolExecutor(64) as pool:
                with full.frozen():  # until all are there
                    asked = [pool.submit(said, number) for number in range(64)]
                    assert wait_until(lambda: full.requests() == 64)
                together = [one.result(2 * PATIENCE_S) for one in asked]
            metrics = client.get("/metrics").text
            alone = [said(number) for number in range(0, 64, 4)]
        preempted = next(line for line in metrics.splitlines() if line.startswith("servekit:num_preemptions_total{"))
        assert float(preempted.split()[-1]) > 0, "the pool was never full"
        assert together[::4] == alone
    finally:
        full.stop()


@pytest.mark.slow
def test_a_key_that_begins_well_is_refused_no_later(tiny_model: Path) -> None:
    """srv-166. The medians differ by less than three standard errors."""
    key = "k" * 32
    locked = ServerProcess(tiny_model, "--log-level", "error", env={"SERVEKIT_API_KEY": key})
    try:
        with locked.client() as client:
            times: dict[str, list[float]] = {"x" * 32: [], key[:-1] + "x": []}
            for number in range(4000):
                given = list(times)[number % 2]
                began = time.perf_counter()
                answer = client.get("/v1/models", headers={"Authorization": f"Bearer {given}"})
                times[given].append(time.perf_counter() - began)
                assert answer.status_code == 401
        middles = []
        for taken in times.values():
            taken.sort()
            middles.append(taken[100:1900])  # without the tails that the machine makes
        medians = [middle[len(middle) // 2] for middle in middles]
        spread = max(
            (sum((t - m) ** 2 for t in middle) / len(middle)) ** 0.5 for middle, m in zip(middles, medians, strict=True)
        )
        error = 1.2533 * spread * (2 / len(middles[0])) ** 0.5
        print(json.dumps({"medians_s": medians, "standard_error_s": error}))
        assert abs(medians[0] - medians[1]) < 3 * error
    finally:
        locked.stop()


def test_placeholders_of_images_are_ordinary_text(http: httpx.Client, of_server: Sight) -> None:
    answer = http.post(COMPLETIONS, json=completion(prompt="<|image_pad|>" * 3))  # srv-056
    assert answer.status_code == 200
    assert answer.json()["usage"]["prompt_tokens"] == 3 * len("<|image_pad|>"), "one token a character: no placeholder"
    assert canary(http) == of_server


def test_the_context_itself_fits(http: httpx.Client) -> None:
    assert http.post(COMPLETIONS, json=completion(prompt=[5] * (LENGTH - 1), max_tokens=1)).status_code == 200
