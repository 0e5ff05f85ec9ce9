from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from tests.servekit.server.processes import ServerProcess, is_alive, wait_until
from tests.servekit.server.tiny import save_tiny_model

import servekit
from common_platform.embedded import smollm2
from servekit.cli import cli
from servekit.engine.config import EngineConfig
from servekit.server.limits import ServerLimits

KEY = "planted-marker-key"
EVERYWHERE = "0.0.0.0"  # noqa: S104 - refused, which is the point


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "servekit.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **env})


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        pytest.param([], 2, ["MODEL"], id="cli-001"),
        pytest.param(["M", "--port", "70000"], 2, ["--port", "70000", "65535"], id="cli-002"),
        pytest.param(["M", "--host", EVERYWHERE], 3, ["host", "--api-key", "--insecure-no-auth"], id="cli-004"),
        pytest.param(["M", "--max-model-len", "0"], 3, ["--max-model-len", "0"], id="cli-005"),
        pytest.param(["M", "--api-key", ""], 3, ["api_key"], id="cli-011"),
        pytest.param(["M", "--enable-prefix-caching=maybe"], 2, ["--enable-prefix-caching"], id="cli-014"),
        pytest.param(["M", "--max-n", "17"], 3, ["--max-n", "17", "1..16"], id="limit-above-the-engine's"),
        pytest.param(["M", "--body-timeout-s", "nan"], 3, ["--body-timeout-s", "nan"], id="not-a-number"),
        pytest.param(["M", "--block-size", "24"], 3, ["--block-size", "24", "(8, 16, 32, 64)"], id="block-size"),
        pytest.param(["M", "--shutdown-timeout-s", "-1"], 3, ["--shutdown-timeout-s"], id="negative-time"),
        pytest.param(["M", "--no-such-flag"], 2, ["--no-such-flag"], id="unknown-flag"),
        pytest.param(["M", "--api-key-file", "no-such-file"], 3, ["--api-key-file", "no-such-file"], id="no-key-file"),
        pytest.param(["M", "--host", "no-such-host.invalid", "--api-key", KEY], 5, ["host"], id="no-such-host"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line_before_anything_is_loaded(
    flags: list[str], status: int, words: list[str]
) -> None:
    ended = run("serve", *flags)
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    first = ended.stderr.splitlines()[0]
    assert first.startswith("error: ")
    assert all(word in first for word in words)
    assert "Traceback" not in ended.stderr
    assert KEY not in ended.stderr


def test_a_port_in_use_is_known_at_once(tiny_model: Path) -> None:  # cli-003
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        started = time.monotonic()
        ended = run("serve", str(tiny_model), "--port", port)
        assert time.monotonic() - started < 10
    assert ended.returncode == 5
    assert "--port" in ended.stderr
    assert port in ended.stderr


def _damage(folder: Path, name: str) -> None:
    if name == "missing":
        (folder / "config.json").unlink()
    elif name == "auto_map":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    else:
        (folder / "model.safetensors").write_bytes(b"\0" * 100)


@pytest.mark.parametrize(
    ("fault", "word"), [("missing", "config.json"), ("auto_map", "auto_map"), ("weights", "model")]
)
def test_a_model_folder_that_cannot_be_served_exits_4(tmp_path: Path, fault: str, word: str) -> None:  # cli-013
    folder = save_tiny_model(tmp_path / "model")
    _damage(folder, fault)
    ended = run("serve", str(folder), "--port", "0", TRUST_REMOTE_CODE="1", SERVEKIT_TRUST_REMOTE_CODE="1")
    assert ended.returncode == 4, ended.stderr
    assert ended.stdout == ""
    assert word in ended.stderr.splitlines()[0]


def test_a_context_longer_than_the_models_is_refused(tiny_model: Path) -> None:  # cli-006
    ended = run("serve", str(tiny_model), "--port", "0", "--max-model-len", str(10**9))
    assert ended.returncode == 3
    assert "1..1024" in ended.stderr
    assert "--max-model-len" in ended.stderr


def test_a_signal_while_loading_ends_it(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "servekit.cli", "serve", str(tiny_model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    assert wait_until(lambda: children.read_text().split(), 20)
    (engine,) = map(int, children.read_text().split())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert not is_alive(engine)


def test_the_real_model_is_served_and_nothing_is_said_on_stdout() -> None:
    server = ServerProcess(smollm2(), "--api-key", KEY)
    try:
        assert server.process.stdout is not None
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            question: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
            answer = client.chat.completions.create(model="M", messages=question, max_tokens=12, temperature=0)
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert answer.choices[0].finish_reason == "stop"
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert server.process.stdout.read() == ""
        assert not any(KEY in line for line in server.said)  # cli-012
        assert not is_alive(server.engine_pid)
    finally:
        server.stop()


def test_every_limit_and_every_engine_setting_has_a_flag() -> None:
    told = CliRunner().invoke(cli, ["serve", "--help"]).output
    elsewhere = {"model", "device", "enable_prefix_caching", "async_scheduling", "probe_tolerance"}
    names = set(ServerLimits.__struct_fields__) | set(EngineConfig.__struct_fields__) - elsewhere
    assert all("--" + name.replace("_", "-") in told for name in names)


def test_generate_and_chat_answer_with_the_real_model() -> None:
    model = str(smollm2())
    said = CliRunner().invoke(cli, ["generate", model, "The capital of France is", "--max-tokens", "4"])
    assert (said.exit_code, said.stderr) == (0, "")
    assert "Paris" in said.stdout
    question = "What is the capital of France?\n"
    assert "Paris" in CliRunner().invoke(cli, ["chat", model, "--max-tokens", "12"], input=question).stdout


def test_generate_refuses_what_the_sampler_would() -> None:
    ended = run("generate", "M", "x", "--temperature", "9")
    assert ended.returncode == 3
    assert ended.stderr.startswith("error: temperature: got 9")


def test_info_and_version() -> None:
    assert "kernel paged_attention" in run("info").stdout
    assert run("--version").stdout.strip().endswith(servekit.__version__)
