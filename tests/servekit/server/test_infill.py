"""``suffix``: the marks of each family around the two texts, and a refusal where there are none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.rows import COMPLETIONS, completion
from tests.servekit.server.tiny import save_tiny_model
from tokenizers import Tokenizer as RustTokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from servekit.engine.tokenizer import Tokenizer
from servekit.server.infill import FORMS, infill_of

QWEN = FORMS[1]


def with_marks(folder: Path, marks: list[str]) -> Path:
    """The tiny model, with room for more tokens."""
    save_tiny_model(folder)
    tokenizer = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def marks_of(form: tuple[str, ...]) -> list[str]:
    return [part for part in form if part not in ("prefix", "suffix")]


@pytest.mark.parametrize("form", FORMS, ids=[form[0] for form in FORMS])
def test_each_family_has_its_own_order(tmp_path: Path, form: tuple[str, ...]) -> None:
    tokenizer = Tokenizer.from_folder(with_marks(tmp_path, marks_of(form)))
    infill = infill_of(tokenizer)
    assert infill is not None
    written = "".join({"prefix": "def f(", "suffix": "): pass"}.get(part, part) for part in form)
    assert tokenizer.decode(infill.prompt("def f(", "): pass"), skip_special_tokens=False) == written
    ids = tokenizer.encode("def f(", add_special_tokens=False)
    assert infill.prompt(ids, "): pass") == infill.prompt("def f(", "): pass")


def test_a_mark_alone_is_no_form(tmp_path: Path) -> None:
    assert infill_of(Tokenizer.from_folder(with_marks(tmp_path, marks_of(QWEN)[:2]))) is None


@pytest.fixture(scope="module")
def filling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    started = ServerProcess(with_marks(tmp_path_factory.mktemp("fim"), marks_of(QWEN)))
    yield started
    started.stop()


def test_a_suffix_is_put_where_the_model_looks_for_it(filling: ServerProcess) -> None:
    with filling.client() as http:
        asked = completion(temperature=0, max_tokens=8, ignore_eos=True)
        filled = http.post(COMPLETIONS, json=asked | {"prompt": "a", "suffix": "b"}).json()
        written = "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
        same = http.post(COMPLETIONS, json=asked | {"prompt": written}).json()
        assert filled["choices"][0]["text"] == same["choices"][0]["text"]
        assert filled["usage"]["prompt_tokens"] == 5
        several = http.post(COMPLETIONS, json=asked | {"prompt": ["a", "c"], "suffix": "b", "n": 2}).json()
        assert len(several["choices"]) == 4
        assert several["choices"][0]["text"] == filled["choices"][0]["text"]
        lines = http.post(COMPLETIONS, json=asked | {"prompt": "a", "suffix": "b", "stream": True}).text.splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == filled["choices"][0]["text"]
        echoed = http.post(COMPLETIONS, json=asked | {"suffix": "b", "echo": True})
        assert (echoed.status_code, echoed.json()["error"]["param"]) == (400, "echo")
        long = http.post(COMPLETIONS, json=asked | {"suffix": "b" * 2000})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_model_without_marks_says_so(http: httpx.Client) -> None:
    error = http.post(COMPLETIONS, json=completion(suffix="b")).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported", "suffix")
    assert "no marks" in error["message"]
