"""Clients that people have, unchanged, against a live server. ``nox -s clients`` installs them, each for itself.

``CLIENTS`` names the folder with an environment a client; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.servekit.server.processes import ServerProcess

pytestmark = pytest.mark.skipif("CLIENTS" not in os.environ, reason="no clients are installed: nox -s clients does it")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT_S = 240
# What a client asks the network for by itself: there may be none.
ENV = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "x"}


def program(client: str, name: str = "python") -> str:
    found = Path(os.environ["CLIENTS"]) / client / "bin" / name
    if not found.exists():
        pytest.skip(f"{client} is not installed: nox -s clients does it")
    return str(found)


def run(*command: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENV
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=env, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def told(script: str, client: str, server: ServerProcess) -> dict[str, Any]:
    return json.loads(run(program(client), str(HERE / script), server.url).splitlines()[-1])


@pytest.mark.timeout(LIMIT_S)
def test_litellm(server: ServerProcess) -> None:
    found = told("ask_litellm.py", "litellm", server)
    assert found["streamed"] == found["whole"]
    assert found["streamed_tokens"] == found["tokens"] > 0
    assert (found["call"], found["text_tokens"]) == ("weather", 5)
    assert found["arguments"]["town"] in ("Oslo", "Rome")
    assert found["vectors"] == [64, 64]
    assert "max_tokens" in found["refused"]


@pytest.mark.timeout(LIMIT_S)
def test_langchain(server: ServerProcess) -> None:
    found = told("ask_langchain.py", "langchain", server)
    assert found["streamed"] == found["whole"]
    assert found["tokens"] > 0
    assert found["place"]["town"] in ("Oslo", "Rome")
    assert found["call"] == "weather"
    assert found["arguments"]["town"] in ("Oslo", "Rome")
    assert found["vectors"] == [64, 64]
    assert found["batch"] == 3


CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["one", "two"]
metric_list: [{metric: acc}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
generation_kwargs: {max_gen_toks: 8, until: ["."], do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(
    ("kind", "path", "tasks"),
    [
        ("local-completions", "/v1/completions", "choice,write"),
        ("local-chat-completions", "/v1/chat/completions", "write"),
    ],
)
def test_lm_eval(server: ServerProcess, model: Path, tmp_path: Path, kind: str, path: str, tasks: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"What is {i}?"}) + "\n" for i in range(4)))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    about = f"model=M,base_url={server.url}{path},num_concurrent=2,max_retries=1,tokenizer={model}"
    more = ["--apply_chat_template"] if "chat" in kind else []
    flags = ["--model", kind, "--model_args", about, "--tasks", tasks, "--include_path", str(tmp_path), "--log_samples"]
    run(program("lm-eval", "lm_eval"), *flags, "--output_path", str(tmp_path / "out"), *more)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    assert set(found) == set(tasks.split(","))
    samples = [
        json.loads(line) for p in (tmp_path / "out").rglob("samples_*.jsonl") for line in p.read_text().splitlines()
    ]
    assert len(samples) == 4 * len(found)


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize(("backend", "path"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")])
def test_vllms_own_benchmark_client(
    server: ServerProcess, model: Path, tmp_path: Path, backend: str, path: str
) -> None:
    vllm = ROOT / ".peers" / "vllm" / "bin" / "python"
    if not vllm.exists():
        pytest.skip("vllm is not installed: nox -s peers -- vllm does it")
    flags = ["--backend", backend, "--base-url", server.url, "--endpoint", path, "--model", "M", "--ignore-eos"]
    random = ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8", "--num-prompts", "6"]
    saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json", "--tokenizer", str(model)]
    run(
        str(vllm),
        str(HERE / "ask_vllm_bench.py"),
        *flags,
        *random,
        *saved,
        "--percentile-metrics",
        "ttft,tpot,itl,e2el",
    )
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["completed"], found["total_output_tokens"]) == (6, 48)
