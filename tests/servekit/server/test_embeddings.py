"""Vectors over HTTP are the vectors of ``LLM.embed``, whoever asks for them and how."""

from __future__ import annotations

import array
import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.servekit.server.processes import ServerProcess

from servekit import LLM
from servekit.server.embedding_model import embedding_model

TEXTS = ["the cat sat", "a dog ran off", "the cat sits"]
EMBEDDINGS = "/v1/embeddings"
HIDDEN = 64


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def offline(tiny_model: Path) -> tuple[list[list[float]], list[float]]:
    with LLM(tiny_model, dtype="float32", num_threads=1, max_num_seqs=32) as llm:
        vectors = [output.embedding for output in llm.embed(TEXTS, pooling="last")]
        return vectors, llm.score(TEXTS[0], TEXTS[1:])


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_the_official_client_gets_the_offline_vectors(
    client: openai.OpenAI, offline: tuple[list[list[float]], list[float]], form: Any
) -> None:
    more = {} if form is None else {"encoding_format": form}
    answer = client.embeddings.create(model="M", input=TEXTS, **more)
    assert [entry.index for entry in answer.data] == [0, 1, 2]
    for entry, wanted in zip(answer.data, offline[0], strict=True):
        found = entry.embedding
        if form == "base64":
            found = array.array("f", base64.b64decode(found)).tolist()
        assert found == pytest.approx(wanted, abs=1e-5)
    assert answer.usage.prompt_tokens == sum(map(len, TEXTS))


def test_token_ids_and_texts_give_the_same_and_fewer_dimensions_have_length_one(client: openai.OpenAI) -> None:
    text = client.embeddings.create(model="M", input="abc").data[0].embedding
    tokens = httpx.post(f"{str(client.base_url)[:-4]}/tokenize", json={"model": "M", "prompt": "abc"}).json()["tokens"]
    assert client.embeddings.create(model="M", input=tokens).data[0].embedding == pytest.approx(text, abs=1e-6)
    short = client.embeddings.create(model="M", input=[tokens], dimensions=5).data[0].embedding
    assert len(short) == 5
    assert math.fsum(x * x for x in short) == pytest.approx(1)
    length = math.sqrt(math.fsum(x * x for x in text[:5]))
    assert short == pytest.approx([x / length for x in text[:5]], abs=1e-6)


def test_more_inputs_than_fit_the_batch_come_in_order(client: openai.OpenAI) -> None:
    texts = [f"text {i}" for i in range(70)]
    together = client.embeddings.create(model="M", input=texts).data
    for index in (0, 33, 69):
        alone = client.embeddings.create(model="M", input=texts[index]).data[0].embedding
        assert together[index].embedding == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_are_the_offline_scores(
    http: httpx.Client, offline: tuple[list[list[float]], list[float]], path: str
) -> None:
    answer = http.post(path, json={"model": "M", "text_1": TEXTS[0], "text_2": TEXTS[1:]}).json()
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(offline[1], abs=1e-5)
    pairs = http.post(path, json={"model": "M", "text_1": TEXTS, "text_2": TEXTS}).json()["data"]
    assert [entry["score"] for entry in pairs] == pytest.approx([1.0] * 3, abs=1e-5)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_documents_come_most_like_the_query_first(
    http: httpx.Client, offline: tuple[list[list[float]], list[float]], path: str
) -> None:
    body = {"model": "M", "query": TEXTS[0], "documents": [TEXTS[1], {"text": TEXTS[2]}]}
    results = http.post(path, json=body).json()["results"]
    found = {entry["index"]: entry["relevance_score"] for entry in results}
    assert [found[0], found[1]] == pytest.approx(offline[1], abs=1e-5)
    assert results[0]["relevance_score"] >= results[1]["relevance_score"]
    assert results[0]["document"]["text"] == TEXTS[1:][results[0]["index"]]
    short = http.post(path, json=body | {"top_n": 1, "return_documents": False}).json()["results"]
    assert [(set(entry), entry["index"]) for entry in short] == [({"index", "relevance_score"}, results[0]["index"])]


def embedding(**changes: Any) -> dict[str, Any]:
    return {"model": "M", "input": "hi"} | changes


BAD = [
    ("srv-138", EMBEDDINGS, embedding(input=""), "empty_prompt", "input", ""),
    ("srv-139", EMBEDDINGS, embedding(input=[]), "empty_prompt", "input", ""),
    ("srv-140", EMBEDDINGS, embedding(input=["a"] * 2049), "out_of_range", "input", "2048"),
    ("srv-141", EMBEDDINGS, embedding(encoding_format="hex"), "unsupported", "encoding_format", "hex"),
    ("srv-142", EMBEDDINGS, embedding(dimensions=0), "out_of_range", "dimensions", "got 0"),
    ("srv-143", EMBEDDINGS, embedding(dimensions=HIDDEN + 1), "out_of_range", "dimensions", "hidden"),
    ("too-long", EMBEDDINGS, embedding(input=["a", "b" * 1025]), "context_length_exceeded", "input[1]", "1024"),
    ("no-query", "/v1/rerank", {"model": "M", "documents": ["a"]}, "missing_field", "query", ""),
    ("no-text", "/rerank", {"model": "M", "query": "a", "documents": [{}]}, "missing_field", "documents[0].text", ""),
    ("no-docs", "/rerank", {"model": "M", "query": "a", "documents": []}, "out_of_range", "documents", ""),
    ("pairs", "/score", {"model": "M", "text_1": ["a", "b"], "text_2": ["c"]}, "conflict", "text_1", "2 texts"),
    ("empty", "/score", {"model": "M", "text_1": "a", "text_2": ["c", ""]}, "empty_prompt", "text_2[1]", ""),
]


@pytest.mark.parametrize(("path", "body", "code", "param", "word"), [row[1:] for row in BAD], ids=[r[0] for r in BAD])
def test_bad_requests_are_named(
    http: httpx.Client, path: str, body: dict[str, Any], code: str, param: str, word: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert word in error["message"]
    assert http.post(EMBEDDINGS, json=embedding()).status_code == 200


def test_the_files_of_sentence_transformers_say_how_to_pool(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    assert embedding_model(tiny_model, "auto").pooling == ""
    assert embedding_model(tiny_model, "mean").pooling == "mean"
    assert embedding_model(tiny_model, "last").size == HIDDEN
    for mode, wanted in (("pooling_mode_mean_tokens", "mean"), ("pooling_mode_lasttoken", "last")):
        (tmp_path / "1_Pooling").mkdir(exist_ok=True)
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({mode: True}))
        assert embedding_model(tmp_path, "auto").pooling == wanted
