"""Embeddings in place of a prompt's tokens: those of the same tokens give the same answer, and the rest is refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save as save_numpy
from safetensors.torch import save
from tests.servekit.server.canary import Sight, canary
from tests.servekit.server.processes import ServerProcess
from tests.servekit.server.rows import COMPLETIONS, LENGTH, completion

from common_platform.errors import RequestError
from servekit import LLM, SamplingParams
from servekit.engine.beam_search import BeamSearchParams
from servekit.engine.prompt_embeds import read_prompt_embeds

HIDDEN = 64
WORDS = "a prompt that is longer than a block of sixteen tokens, and by far"


@pytest.fixture(scope="module")
def table(tiny_model: Path) -> torch.Tensor:
    with safe_open(tiny_model / "model.safetensors", "pt") as weights:
        return weights.get_tensor("model.embed_tokens.weight")


# Kernels that add in another order beside others get one sequence at a time, all of it computed.
KERNELS = {"reference": ("--deterministic",), "native": ("--no-prefix-caching", "--max-num-seqs", "1")}


@pytest.fixture(scope="module", params=KERNELS)
def open_door(tiny_model: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    flags = ("--enable-prompt-embeds", "--kernels", request.param, "--max-num-batched-tokens", "48")
    started = ServerProcess(tiny_model, *flags, *KERNELS[request.param])
    yield started
    started.stop()


@pytest.fixture
def embeds(open_door: ServerProcess) -> Iterator[httpx.Client]:
    with open_door.client() as client:
        yield client


@pytest.fixture(scope="module")
def before(open_door: ServerProcess) -> Sight:
    with open_door.client() as client:
        return canary(client)


def written(tensor: torch.Tensor, **more: torch.Tensor) -> str:
    return base64.b64encode(save({"prompt": tensor.contiguous(), **more})).decode()


def tokens_of(http: httpx.Client, text: str) -> list[int]:
    return http.post("/tokenize", json={"model": "M", "prompt": text}).json()["tokens"]


def asked(**changes: Any) -> dict[str, Any]:
    body = completion(temperature=0, max_tokens=12, ignore_eos=True, return_token_ids=True) | changes
    return {name: value for name, value in body.items() if value is not None}


def said(http: httpx.Client, **changes: Any) -> list[list[int]]:
    answer = http.post(COMPLETIONS, json=asked(**changes))
    assert answer.status_code == 200, answer.text
    return [choice["token_ids"] for choice in answer.json()["choices"]]


@pytest.mark.parametrize("length", [1, 15, 16, 17, len(WORDS)])
def test_embeddings_of_tokens_say_what_the_tokens_say(embeds: httpx.Client, table: torch.Tensor, length: int) -> None:
    """Prompts of several steps, 48 tokens each, and twice: the second time out of the prefix cache."""
    tokens = tokens_of(embeds, WORDS[:length])
    wanted = said(embeds, prompt=tokens)
    rows = written(table[tokens])
    for _ in range(2):
        assert said(embeds, prompt=None, prompt_embeds=rows) == wanted
    assert said(embeds, prompt="", prompt_embeds=[rows, rows]) == wanted * 2
    assert said(embeds, prompt=[tokens], prompt_embeds=rows) == wanted * 2, "embeddings first, then prompts"
    sampled: dict[str, Any] = {"n": 3, "temperature": 0.9, "seed": 5}
    assert said(embeds, prompt=None, prompt_embeds=rows, **sampled) == said(embeds, prompt=tokens, **sampled)


@pytest.mark.parametrize("open_door", ["reference"], indirect=True)
def test_equal_embeddings_share_the_cache_and_others_do_not(embeds: httpx.Client, table: torch.Tensor) -> None:
    tokens = tokens_of(embeds, WORDS)

    def cached(**changes: Any) -> int:
        usage = embeds.post(COMPLETIONS, json=asked(**changes)).json()["usage"]
        assert usage["prompt_tokens"] == len(tokens)
        return usage["prompt_tokens_details"]["cached_tokens"]

    rows = table[tokens] * 1.5
    assert cached(prompt=None, prompt_embeds=written(rows)) == 0
    assert cached(prompt=None, prompt_embeds=written(rows)) > 0
    assert cached(prompt=None, prompt_embeds=written(rows), cache_salt="mine") == 0
    rows[-1] *= 2
    assert cached(prompt=None, prompt_embeds=written(rows)) == 0
    assert cached(prompt=[0] * len(tokens)) == 0, "the ids that stand in their place are no tokens"
    assert said(embeds, prompt=None, prompt_embeds=written(rows)) != said(embeds, prompt=[0] * len(tokens))


def test_they_are_streamed_and_half_as_wide_too(open_door: ServerProcess, table: torch.Tensor) -> None:
    """As vLLM's users write it: OpenAI's client, an empty prompt, and the embeddings beside."""
    rows = table[[5, 9, 77, 31, 8]].bfloat16()
    with openai.OpenAI(base_url=f"{open_door.url}/v1", api_key="unused", max_retries=0) as client:
        whole = [
            client.completions.create(
                model="M", prompt="", max_tokens=9, temperature=0, extra_body={"prompt_embeds": written(each)}
            )
            for each in (rows, rows.float())
        ]
        stream = client.completions.create(
            model="M", prompt="", max_tokens=9, temperature=0, stream=True, extra_body={"prompt_embeds": written(rows)}
        )
        text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == whole[0].choices[0].text == whole[1].choices[0].text


def test_a_row_that_gave_its_blocks_back_begins_again_with_its_embeddings(
    tiny_model: Path, table: torch.Tensor
) -> None:
    num_blocks, block_bytes = 8, 2 * 2 * 2 * 16 * 16 * 4
    flags = ("--kv-cache-memory-bytes", str(num_blocks * block_bytes), "--max-model-len", "96", "--deterministic")
    server = ServerProcess(tiny_model, "--enable-prompt-embeds", "--no-prefix-caching", *flags)
    try:
        with server.client() as http:
            tokens = [tokens_of(http, WORDS[start : start + 20]) for start in range(4)]
            rows = [written(table[each]) for each in tokens]
            wanted = [said(http, prompt=each, max_tokens=60)[0] for each in tokens]
            assert said(http, prompt=None, prompt_embeds=rows, max_tokens=60) == wanted
            metrics = http.get("/metrics").text
        preempted = next(line for line in metrics.splitlines() if line.startswith("servekit:num_preemptions_total{"))
        assert float(preempted.split()[-1]) > 0
    finally:
        server.stop()


def test_offline_they_say_the_same(tiny_model: Path, table: torch.Tensor) -> None:
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
    with LLM(tiny_model, dtype="float32", num_threads=1, deterministic=True) as llm:
        tokens = llm.tokenizer.encode(WORDS, add_special_tokens=False)
        wide, narrow = table[tokens], table[tokens].bfloat16()
        prompts: list[Any] = [
            tokens,
            *({"prompt_embeds": rows} for rows in (wide, wide.numpy(), narrow, narrow.float())),
        ]
        said = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        assert said[0] == said[1] == said[2]
        assert said[3] == said[4]
        for rows, code in ((wide[:, 1:], "invalid_shape"), (wide[0], "invalid_shape"), (wide * np.inf, "not_finite")):
            with pytest.raises(RequestError) as raised:
                llm.generate({"prompt_embeds": rows}, params)
            assert raised.value.code == code
        with pytest.raises(RequestError, match="beam search"):
            llm.beam_search({"prompt_embeds": wide}, BeamSearchParams(beam_width=2, max_tokens=3))


GOOD = torch.full((4, HIDDEN), 0.25)
BEYOND = torch.tensor([[9], [99]])  # of a sparse tensor's size
SPARSE = torch.sparse_coo_tensor(BEYOND, torch.tensor([1.0]), (4, HIDDEN), check_invariants=False)


def pickled(tensor: torch.Tensor, tmp_path: Path) -> str:
    torch.save(tensor, tmp_path / "prompt.pt")
    return base64.b64encode((tmp_path / "prompt.pt").read_bytes()).decode()


def test_what_is_no_safetensors_is_not_opened(embeds: httpx.Client, before: Sight, tmp_path: Path) -> None:
    """srv-059: torch's own form."""
    for tensor in (SPARSE, GOOD):
        error = embeds.post(COMPLETIONS, json=asked(prompt_embeds=pickled(tensor, tmp_path))).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_format", "prompt_embeds")
        assert "safetensors" in error["message"]
    assert canary(embeds) == before


NOT_FINITE = torch.full((4, HIDDEN), float("nan"))
BAD: list[tuple[str, Any, str, str, tuple[str, ...]]] = [
    ("srv-060", written(GOOD[:, :-1]), "invalid_shape", "prompt_embeds", ("[4,63]", "[*,64]")),
    ("srv-061", written(NOT_FINITE), "not_finite", "prompt_embeds", ()),
    ("infinite", written(torch.full((1, HIDDEN), float("inf")).half()), "not_finite", "prompt_embeds", ()),
    ("narrow", written(NOT_FINITE.bfloat16()), "not_finite", "prompt_embeds", ()),
    ("one-dim", written(torch.zeros(HIDDEN)), "invalid_shape", "prompt_embeds", ("[64]",)),
    ("two-tensors", written(GOOD, other=GOOD + 1), "invalid_format", "prompt_embeds", ("2 tensors",)),
    ("integers", written(torch.zeros(4, HIDDEN, dtype=torch.int64)), "invalid_format", "prompt_embeds", ("I64",)),
    ("none", written(torch.zeros(0, HIDDEN)), "empty_prompt", "prompt_embeds", ()),
    ("long", written(torch.zeros(LENGTH + 1, HIDDEN)), "context_length_exceeded", "prompt_embeds", (str(LENGTH),)),
    ("full", written(torch.zeros(LENGTH, HIDDEN)), "context_length_exceeded", "prompt_embeds", ("max_tokens",)),
    ("base64", "@@@@", "invalid_base64", "prompt_embeds", ()),
    ("empty", "", "invalid_format", "prompt_embeds", ()),
    ("kind", [written(GOOD), 5], "invalid_type", "prompt_embeds[1]", ()),
    ("no-list", [], "out_of_range", "prompt_embeds", ("256",)),
    ("many", [written(GOOD)] * 257, "out_of_range", "prompt_embeds", ("257", "--max-prompts")),
]


@pytest.mark.parametrize(("value", "code", "param", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_embeddings_are_named(
    embeds: httpx.Client, before: Sight, value: Any, code: str, param: str, words: tuple[str, ...]
) -> None:
    answer = embeds.post(COMPLETIONS, json=asked(prompt=None, prompt_embeds=value))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, code, param), error
    assert all(word in error["message"] for word in words), error
    assert canary(embeds) == before


@pytest.mark.parametrize(
    ("more", "param"),
    [({"echo": True}, "echo"), ({"prompt_logprobs": 1}, "prompt_logprobs"), ({"suffix": "b"}, "suffix")],
)
def test_what_is_about_the_prompts_tokens_does_not_go_with_them(
    embeds: httpx.Client, more: dict[str, Any], param: str
) -> None:
    answer = embeds.post(COMPLETIONS, json=asked(prompt=None, prompt_embeds=written(GOOD), **more))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_nothing_at_all_is_no_prompt(embeds: httpx.Client) -> None:
    for value in (None, ""):
        error = embeds.post(COMPLETIONS, json={"model": "M", "prompt": value, "prompt_embeds": None}).json()["error"]
        assert error["code"] in ("missing_field", "empty_prompt", "invalid_type")


@given(st.binary(max_size=200), st.integers(0, 300))
def test_whatever_the_bytes_are_there_is_an_answer(noise: bytes, at: int) -> None:
    good = save_numpy({"x": np.zeros((2, 8), np.float32)})
    for content in (noise, good[:at], good[:at] + noise, good[: at % 60] + noise + good[at % 60 + len(noise) :]):
        try:
            found = read_prompt_embeds(content, "x", hidden_size=8, max_tokens=9)
        except RequestError as error:
            assert error.param == "x"
        else:
            assert len(found.data) == found.num_tokens * 8 * (4 if found.dtype == "float32" else 2)
