"""Structured output through the whole engine: a random model can only say what its grammar allows."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from tests.tiny import make_folder

from common_platform.errors import RequestError
from servekit import LLM, AsyncEngine, EngineConfig, SamplingParams
from servekit.sampling.parameters import StructuredOutput

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("structured") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    with LLM(folder, kv_cache_memory_bytes=1 << 17, max_model_len=200, max_num_seqs=6) as made:
        yield made


def params(**spec) -> SamplingParams:
    return SamplingParams(max_tokens=150, seed=3, temperature=1.0, structured_outputs=StructuredOutput(**spec))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_kind_beside_free_requests_and_with_preemption(llm, temperature):
    kinds = {
        "json": {"json": json.dumps(SCHEMA)},
        "regex": {"regex": r"[0-9]{3}-[a-f]{4}"},
        "choice": {"choice": ["yes", "no", "maybe so"]},
        "grammar": {"grammar": 'start: "a" ("b" | "c")+ "d"\n'},
    }
    constrained = [
        SamplingParams(max_tokens=150, seed=i, temperature=temperature, structured_outputs=StructuredOutput(**spec))
        for i, spec in enumerate(kinds.values())
    ]
    free = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    alone = llm.generate("free", free)[0].outputs[0].token_ids
    outputs = llm.generate(["x"] * 4 + ["free"] * 4, [*constrained, *[free] * 4])
    assert all(output.outputs[0].token_ids == alone for output in outputs[4:])
    texts = dict(zip(kinds, (output.outputs[0] for output in outputs), strict=False))
    if texts["json"].finish_reason == "stop":
        found = json.loads(texts["json"].text)
        assert set(found) == {"name", "n"}
        assert 0 <= found["n"] <= 99
    assert re.fullmatch(r"[0-9]{3}-[a-f]{4}", texts["regex"].text)
    assert texts["choice"].text in ("yes", "no", "maybe so")
    assert re.match(r"a[bc]*", texts["grammar"].text)


def test_n_answers_of_one_grammar(llm):
    output = llm.generate("x", SamplingParams(
        n=4, seed=1, max_tokens=20, structured_outputs=StructuredOutput(regex=r"[a-z]{6}")))[0]  # fmt: skip
    assert all(re.fullmatch(r"[a-z]{6}", answer.text) for answer in output.outputs)
    assert len({answer.text for answer in output.outputs}) > 1


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ({"json": '{"type": "nonsense"}'}, "grammar_invalid"),
        ({"regex": "("}, "grammar_invalid"),
        ({"grammar": "start: nothing"}, "grammar_invalid"),
    ],
)
def test_what_cannot_be_followed_is_refused_and_the_engine_goes_on(llm, spec, code):
    with pytest.raises(RequestError) as raised:
        llm.generate("x", params(**spec))
    assert raised.value.code == code
    assert llm.generate("x", params(choice=["ok"]))[0].outputs[0].text == "ok"


def test_in_the_engines_own_process(folder):
    async def answer(engine: AsyncEngine, name: str, one: SamplingParams) -> str:
        text = ""
        async for output in await engine.add_request(name, "x", one):
            text += output.outputs[0].delta_text
        return text

    async def main() -> None:
        engine = await AsyncEngine.from_config(EngineConfig(model=str(folder), kv_cache_memory_bytes=4 << 20))
        try:
            found = await asyncio.gather(
                *(answer(engine, f"r{i}", params(regex=rf"item-{i}-[0-9]{{4}}")) for i in range(6))
            )
            assert all(re.fullmatch(rf"item-{i}-[0-9]{{4}}", text) for i, text in enumerate(found))
            with pytest.raises(RequestError, match="regex"):
                await engine.add_request("bad", "x", params(regex="("))
            stream = await engine.add_request("left", "x", params(regex=r"[a-z]{50}"))
            await stream.aclose()
            assert await answer(engine, "after", params(choice=["fine"])) == "fine"
            assert engine.num_requests == 0
        finally:
            await engine.shutdown()

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize("max_tokens", range(1, 48, 3))
def test_an_answer_told_as_it_comes_ends_at_its_length_behind_forced_text(llm, max_tokens):
    """The forced text is accepted at once, what follows comes token by token: all of it counts."""
    spec = StructuredOutput(regex="(a long text that is forced, )[a-z]{900}")
    told = SamplingParams(max_tokens=max_tokens, temperature=0.0, structured_outputs=spec, stop=["0"])  # not at the end
    whole = SamplingParams(max_tokens=max_tokens, temperature=0.0, structured_outputs=spec)
    first, second = llm.generate("x", told)[0].outputs[0], llm.generate("x", whole)[0].outputs[0]
    assert (first.finish_reason, len(first.token_ids)) == ("length", max_tokens)
    assert first.token_ids == second.token_ids
