from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
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
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, **env})


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        pytest.param([], 2, ["MODEL"], id="cli-001"),
        pytest.param(["M", "--port", "70000"], 2, ["--port", "70000", "65535"], id="cli-002"),
        pytest.param(["M", "--host", EVERYWHERE], 3, ["host", "--api-key", "--insecure-no-auth"], id="cli-004"),
        pytest.param(["M", "--max-model-len", "0"], 3, ["--max-model-len", "0"], id="cli-005"),
        pytest.param(["M", "--gpu-memory-utilization", "1.5"], 3, ["--gpu-memory", "1.5", "(0,1]"], id="cli-009"),
        pytest.param(["M", "--gpu-memory-utilization", "nan"], 3, ["--gpu-memory-utilization"], id="cli-010"),
        pytest.param(["M", "--api-key", ""], 3, ["api_key"], id="cli-011"),
        pytest.param(["M", "--enable-prefix-caching=maybe"], 2, ["--enable-prefix-caching"], id="cli-014"),
        pytest.param(["M", "--max-n", "17"], 3, ["--max-n", "17", "1..16"], id="limit-above-the-engine's"),
        pytest.param(["M", "--body-timeout-s", "nan"], 3, ["--body-timeout-s", "nan"], id="not-a-number"),
        pytest.param(["M", "--block-size", "24"], 3, ["--block-size", "24", "(8, 16, 32, 64)"], id="block-size"),
        pytest.param(["M", "--shutdown-timeout-s", "-1"], 3, ["--shutdown-timeout-s"], id="negative-time"),
        pytest.param(["M", "--chat-template", "no-such"], 3, ["--chat-template", "no-such"], id="no-template"),
        pytest.param(["M", "--kv-offload-bytes", "-4"], 3, ["--kv-offload-bytes", "-4"], id="cfg-009"),
        pytest.param(["M", "--prefix-caching-hash-algo", "builtin"], 3, ["builtin", "sha256"], id="cfg-010"),
        pytest.param(["M", "--enable-lora"], 3, ["enable_lora", "adapters"], id="lora"),
        pytest.param(["M", "-tp", "0"], 3, ["--tensor-parallel-size", "0"], id="no-device"),
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


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_port_in_use_is_known_before_the_model_is_loaded(tmp_path: Path, is_damaged: bool) -> None:  # cli-003
    folder = save_tiny_model(tmp_path / "model")
    if is_damaged:  # which nobody sees
        _damage(folder, "weights")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run("serve", str(folder), "--port", port)
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


@pytest.mark.parametrize(
    ("size", "status", "words"),
    [
        pytest.param(3, 3, ["3", "8 attention heads"], id="cli-007"),
        pytest.param(8, 5, ["8", "1..1", "devices"], id="cli-008"),
    ],
)
def test_more_devices_than_heads_or_than_there_are_are_refused(
    tiny_model: Path, tmp_path: Path, size: int, status: int, words: list[str]
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"num_attention_heads": 8}))
    ended = run("serve", str(folder), "--port", "0", "--tensor-parallel-size", str(size), COMMON_PLATFORM="cpu")
    assert (ended.returncode, ended.stdout) == (status, ""), ended.stderr
    assert all(word in ended.stderr.splitlines()[0] for word in ["tensor_parallel_size", *words]), ended.stderr


def test_prompts_that_never_fit_a_step_are_known_at_the_start(tiny_model: Path) -> None:  # cfg-008
    ended = run(
        "serve", str(tiny_model), "--port", "0", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "99"
    )
    assert (ended.returncode, ended.stdout) == (3, ""), ended.stderr
    words = ["max_num_batched_tokens", "99", "max_model_len", "1024"]
    assert all(word in ended.stderr.splitlines()[0] for word in words), ended.stderr


def test_keys_and_values_of_an_unknown_kind_are_refused(tiny_model: Path) -> None:  # cfg-006
    ended = run("serve", str(tiny_model), "--port", "0", "--kv-cache-dtype", "fp3")
    first = ended.stderr.splitlines()[0]
    assert (ended.returncode, ended.stdout) == (3, "")
    assert all(word in first for word in ("kv_cache_dtype", "fp3", "fp8", "int8")), ended.stderr


def test_a_signal_while_loading_ends_it(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "servekit.cli", "serve", str(tiny_model), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    assert wait_until(lambda: children.read_text().split())
    (engine,) = map(int, children.read_text().split())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
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
        assert server.process.wait(60) == 0
        assert server.process.stdout.read() == ""
        assert not any(KEY in line for line in server.said)  # cli-012
        assert not is_alive(server.engine_pid)
    finally:
        server.stop()


def test_every_limit_and_every_engine_setting_has_a_flag() -> None:
    told = CliRunner().invoke(cli, ["serve", "--help"]).output
    elsewhere = {"model", "device", "enable_prefix_caching", "async_scheduling", "probe_tolerance", "grammar_limits"}
    names = set(ServerLimits.__struct_fields__) | set(EngineConfig.__struct_fields__) - elsewhere
    assert all("--" + name.replace("_", "-") in told for name in names)


def test_complete_and_chat_answer_with_the_real_model() -> None:
    model = str(smollm2())
    said = CliRunner().invoke(cli, ["complete", model, "The capital of France is", "--max-tokens", "4"])
    assert (said.exit_code, said.stderr) == (0, "")
    assert "Paris" in said.stdout
    question = "What is the capital of France?\n"
    assert "Paris" in CliRunner().invoke(cli, ["chat", model, "--max-tokens", "12"], input=question).stdout


def test_complete_refuses_what_the_sampler_would() -> None:
    ended = run("complete", "M", "x", "--temperature", "9")
    assert ended.returncode == 3
    assert ended.stderr.startswith("error: temperature: got 9")


def test_info_and_version() -> None:
    assert "kernel paged_attention" in run("info").stdout
    assert run("--version").stdout.strip().endswith(servekit.__version__)


def test_a_draft_model_of_another_vocabulary_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"  # cfg-013
    path.write_text(f'speculative-config: \'{{"model": "{tiny_model}", "num_speculative_tokens": 2}}\'\n')
    ended = run("serve", str(smollm2()), "--port", "0", "--config", str(path), "--max-model-len", "512")
    first = ended.stderr.splitlines()[0]
    assert (ended.returncode, ended.stdout) == (3, "")
    assert all(word in first for word in ("speculative_config.model", "258", "49152")), ended.stderr


def test_a_share_of_the_memory_sizes_the_cache(tiny_model: Path) -> None:
    """The share is of all memory; what the process has taken already counts against it."""
    ended = run("serve", str(tiny_model), "--port", "0", "--gpu-memory-utilization", "0.000001")
    assert ended.returncode == 3
    assert "kv_cache_memory_bytes: got 0" in ended.stderr.splitlines()[0]
    said = CliRunner().invoke(cli, ["complete", str(tiny_model), "x", "--gpu-memory-utilization", "0.9"])
    assert said.exit_code == 0, said.output


def test_variables_stand_for_the_flags_of_every_command(tiny_model: Path) -> None:
    def said(**env: str) -> subprocess.CompletedProcess[str]:
        return run("complete", str(tiny_model), "x", SERVEKIT_DTYPE="float32", **env)

    short, longer = said(SERVEKIT_MAX_TOKENS="2"), said(SERVEKIT_MAX_TOKENS="8")
    assert len(longer.stdout) > len(short.stdout) > 0
    assert longer.stdout.startswith(short.stdout.rstrip("\n"))
    wrong = said(SERVEKIT_MAX_TOKENS="many")
    assert wrong.returncode == 3
    assert "SERVEKIT_MAX_TOKENS" in wrong.stderr.splitlines()[0]
    assert run("simulate", "fit", "no-such-profile", SERVEKIT_OUT="x", SERVEKIT_NUM_REQUESTS="few").returncode == 3


def test_chat_and_complete_talk_to_a_running_server(tiny_model: Path, tmp_path: Path) -> None:
    server = ServerProcess(tiny_model, env={"SERVEKIT_API_KEY": KEY})
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    try:
        completed = run("complete", server.url, "hello", "--max-tokens", "6", SERVEKIT_API_KEY=KEY)
        here = run("complete", str(tiny_model), "hello", "--max-tokens", "6", "--dtype", "float32")
        assert (completed.returncode, completed.stdout) == (0, here.stdout)
        command = ["chat", server.url, "--system", "be brief", "--max-tokens", "4", "--api-key-file", str(keys)]
        talked = CliRunner().invoke(cli, command, input="one\n\ntwo\n")
        assert (talked.exit_code, len(talked.stdout) > 2) == (0, True), talked.output
        refused = run("complete", server.url, "hello")
        assert refused.returncode == 3
        assert "API key" in refused.stderr.splitlines()[0]
        too_long = run("complete", server.url, "hello", "--max-tokens", "5000", SERVEKIT_API_KEY=KEY)
        assert too_long.returncode == 3
        assert "max_tokens" in too_long.stderr.splitlines()[0]
    finally:
        server.stop()
    assert run("complete", server.url, "hello").returncode == 5


def test_another_chat_template_may_be_given(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}, as told")
    server = ServerProcess(tiny_model, "--chat-template", str(path))
    try:
        with server.client() as client:
            body = {"model": "M", "messages": [{"role": "user", "content": "hi"}]}
            tokens = client.post("/tokenize", json=body).json()["tokens"]
            assert client.post("/detokenize", json={"model": "M", "tokens": tokens}).json()["prompt"] == "hi, as told"
    finally:
        server.stop()
