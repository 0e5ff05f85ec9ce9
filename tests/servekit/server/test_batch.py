"""``servekit run-batch``: each line has its answer, in order, and it is the server's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.servekit.server.rows import CHAT, COMPLETIONS, chat, completion


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "servekit.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def line(custom_id: Any, url: str, body: Any, **more: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | more)


def test_every_line_is_answered_as_the_server_does(http: httpx.Client, tiny_model: Path, tmp_path: Path) -> None:
    asked = completion(prompt="batch", temperature=0, max_tokens=6)
    lines = [line(f"c{i}", COMPLETIONS, asked) for i in range(40)]
    lines += [
        line("chat", CHAT, chat(temperature=0)),
        line("bad", COMPLETIONS, completion(temperature=9)),
        line("vector", "/v1/embeddings", {"model": "M", "input": "hi"}),
        "not json",
        "[" * 50,
        line("stream", CHAT, chat(stream=True)),
        line("place", "/admin/sleep", {}),
        line(5, CHAT, chat()),
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n\n")
    flags = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--served-model-name", "M"]
    flags += ["--pooling", "last", "--dtype", "float32", "--num-threads", "1", "--max-num-seqs", "4"]
    ended = run("run-batch", str(tiny_model), *flags)
    assert ended.returncode == 0, ended.stderr
    assert "42 answered, 6 failed" in ended.stderr
    answers = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers[:43]] == [*(f"c{i}" for i in range(40)), "chat", "bad", "vector"]
    wanted = http.post(COMPLETIONS, json=asked).json()["choices"][0]["text"]
    for answer in answers[:40]:
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["choices"][0]["text"] == wanted
    bad = answers[41]["response"]
    assert (bad["status_code"], bad["body"]["error"]["param"]) == (400, "temperature")
    codes = [answer["error"]["code"] for answer in answers[43:]]
    assert codes == ["invalid_json", "invalid_json", "unsupported", "unsupported", "missing_field"]
    again = run("run-batch", str(tiny_model), *flags)
    assert again.returncode == 3, "what is there is not written over"
    assert "--output" in again.stderr


@pytest.mark.parametrize("source", ["no-such-file"])
def test_a_file_that_is_not_there_is_named(tiny_model: Path, tmp_path: Path, source: str) -> None:
    ended = run("run-batch", str(tiny_model), "-i", source, "-o", str(tmp_path / "out"))
    assert (ended.returncode, source in ended.stderr) == (3, True)
    assert list(tmp_path.iterdir()) == []


def test_verify_says_what_it_has_checked(tiny_model: Path, tmp_path: Path) -> None:
    ended = run("verify", str(tiny_model), "--dtype", "float32")
    assert ended.returncode == 0, ended.stderr
    assert "LlamaForCausalLM" in ended.stdout
    assert run("verify", str(tmp_path)).returncode == 4
