"""The engine in its own process: many callers, callers who leave, and a process that dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.tiny import make_folder

from common_platform.errors import ArtifactMissing, EngineDead, RequestError
from servekit import LLM, AsyncEngine, EngineConfig, SamplingParams
from servekit.engine.messages import Answer
from servekit.engine.supervisor import RestartPolicy

PROMPTS = [f"number {i} is" for i in range(12)]
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("async") / "tiny")


def config(folder: Path, **more) -> EngineConfig:
    return EngineConfig(model=str(folder), kv_cache_memory_bytes=4 << 20, max_num_seqs=4, num_threads=1, **more)


def run(work, folder, **more) -> None:
    async def main() -> None:
        engine = await AsyncEngine.from_config(config(folder, **more))
        try:
            await asyncio.wait_for(work(engine), 120)
        finally:
            await engine.shutdown()

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    asyncio.run(main())
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


async def answer(engine: AsyncEngine, name: str, prompt, params=GREEDY, **about) -> tuple[str, list[int], str]:
    text, tokens, reason = "", [], ""
    async for output in await engine.add_request(name, prompt, params, **about):
        text += output.outputs[0].delta_text
        tokens += output.outputs[0].delta_token_ids
        reason = output.outputs[0].finish_reason or reason
    return text, tokens, reason


async def settled(engine: AsyncEngine) -> None:
    """Nothing runs, nothing waits and no block is held, within two seconds."""
    for _ in range(100):
        stats = await engine.stats()
        if stats.num_running == stats.num_waiting == 0 and stats.kv_usage == 0:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(stats)


def test_many_at_once_equal_each_alone_in_process(folder):
    with LLM(folder, kv_cache_memory_bytes=4 << 20) as llm:
        expected = [o.outputs[0] for o in llm.generate(PROMPTS, GREEDY)]

    async def work(engine: AsyncEngine) -> None:
        found = await asyncio.gather(*(answer(engine, str(i), p) for i, p in enumerate(PROMPTS)))
        assert [(text, tokens) for text, tokens, _ in found] == [(o.text, o.token_ids) for o in expected]
        assert (await engine.stats()).finished == {"length": len(PROMPTS)}
        assert await engine.reset_prefix_cache()
        await settled(engine)

    run(work, folder)


def test_callers_who_leave_free_everything_and_change_nobody(folder):
    async def work(engine: AsyncEngine) -> None:
        quiet = await answer(engine, "quiet", "the survivor says")

        async def leaves(i: int) -> None:
            params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
            stream = await engine.add_request(f"gone{i}", PROMPTS[i], params)
            for _ in range(i % 4):
                await anext(stream, None)  # whoever reads late gets several steps as one output
            await stream.aclose()

        survivor, *_ = await asyncio.gather(answer(engine, "s", "the survivor says"), *(leaves(i) for i in range(12)))
        assert survivor == quiet
        await settled(engine)
        assert engine.num_requests == 0

    run(work, folder)


def test_deadlines_and_refusals(folder):
    async def work(engine: AsyncEngine) -> None:
        long = SamplingParams(max_tokens=240, temperature=0, ignore_eos=True)
        assert (await answer(engine, "late", "x", long, timeout_s=0.05))[2] == "timeout"
        with pytest.raises(RequestError, match="at least one"):
            await engine.add_request("r", "", GREEDY)
        stream = await engine.add_request("same", "x", long)
        with pytest.raises(RequestError, match="in use"):
            await engine.add_request("same", "x", GREEDY)
        await stream.aclose()
        await settled(engine)

    run(work, folder)


def test_a_killed_engine_is_known_at_once_by_everybody(folder):
    async def work(engine: AsyncEngine) -> None:
        long = SamplingParams(max_tokens=240, temperature=0, ignore_eos=True)
        streams = [await engine.add_request(str(i), "x", long) for i in range(3)]
        await anext(streams[0])
        os.kill(engine._process.pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDead):
                async with asyncio.timeout(2):
                    async for _ in stream:
                        pass
        assert not engine.is_ready
        with pytest.raises(EngineDead):
            await engine.add_request("after", "x", GREEDY)
        with pytest.raises(EngineDead):
            await engine.stats()

    run(work, folder)


def test_an_engine_that_cannot_start_says_why_and_leaves_nothing(folder, tmp_path):
    async def main() -> None:
        with pytest.raises(ArtifactMissing, match="config"):
            await AsyncEngine.from_config(config(tmp_path))

    before = set(Path("/tmp").glob("servekit-*"))
    asyncio.run(main())
    assert set(Path("/tmp").glob("servekit-*")) <= before


def test_a_process_that_dies_before_a_word_is_an_error_and_not_a_wait(folder, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")

    async def main() -> None:
        async with asyncio.timeout(20):
            with pytest.raises(EngineDead, match="status 1"):
                await AsyncEngine.from_config(config(folder))

    asyncio.run(main())


def test_the_engine_dies_with_its_parent(folder):
    code = (
        "import asyncio, sys, time\n"
        "from servekit import AsyncEngine, EngineConfig\n"
        "async def main():\n"
        "    engine = await AsyncEngine.from_config(EngineConfig(model=sys.argv[1], kv_cache_memory_bytes=4 << 20))\n"
        "    print(engine._process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    _gone, alive = psutil.wait_procs([child], timeout=5)
    assert not alive


def test_a_question_can_be_cancelled_the_moment_that_it_is_answered(folder) -> None:
    """Else whoever cancels it and waits for its end waits for ever."""

    async def work(engine: AsyncEngine) -> None:
        asked = asyncio.create_task(engine.stats())
        while not engine._answers:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        next(iter(engine._answers.values())).set_result(Answer(0))
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    run(work, folder)


@pytest.mark.parametrize("how", ["break", "cancel", "raise"])
def test_leaving_the_loop_of_generate_ends_the_request(folder, how):
    """By ``break``, by cancelling the task that reads, or by an error of the reader's own."""

    async def work(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)
        has_begun = asyncio.Event()

        async def read() -> None:
            async for output in engine.generate("once upon a time", params, "mine"):
                assert output.outputs[0].num_tokens == len(output.outputs[0].token_ids) > 0
                has_begun.set()
                if how == "break":
                    break
                if how == "raise":
                    raise KeyError("the reader's")

        task = asyncio.create_task(read())
        await asyncio.wait_for(has_begun.wait(), 30)
        if how == "cancel":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await settled(engine)
        assert engine.num_requests == 0
        assert await answer(engine, "next", "one") == await answer(engine, "again", "one")

    run(work, folder)


def test_generate_gives_what_add_request_gives_whole_and_in_order(folder):
    async def work(engine: AsyncEngine) -> None:
        text, tokens, reason = await answer(engine, "a", "one two three")
        deltas, last = "", None
        async for output in engine.generate("one two three", GREEDY, "b"):
            answered = output.outputs[0]
            deltas += answered.delta_text
            assert answered.text == deltas
            assert answered.token_ids == tokens[: answered.num_tokens]
            last = output
        assert last is not None
        assert last.finished
        assert (last.outputs[0].text, last.outputs[0].token_ids, last.outputs[0].finish_reason) == (
            text,
            tokens,
            reason,
        )

    run(work, folder)


@pytest.mark.parametrize("state", ["running", "waiting"])
def test_who_reads_a_request_that_somebody_else_aborts_is_told(folder, state):
    async def work(engine: AsyncEngine) -> None:
        long = SamplingParams(max_tokens=240, temperature=0, ignore_eos=True)
        others = [await engine.add_request(f"o{i}", "x", long) for i in range(4 if state == "waiting" else 0)]
        stream = await engine.add_request("mine", "x", long)
        reader = asyncio.create_task(_last_of(stream))
        if state == "running":
            await asyncio.sleep(0.05)
        await engine.abort("mine")
        last = await asyncio.wait_for(reader, 10)
        assert last.finished
        assert last.outputs[0].finish_reason in ("abort", "length")  # it may have ended by itself
        for other in others:
            await other.aclose()
        await settled(engine)

    run(work, folder)


async def _last_of(stream):
    last = None
    async for output in stream:
        last = output
    return last


def test_a_listener_that_raises_ends_its_own_request_and_no_other(folder, caplog):
    told: list[object] = []

    def raises(news) -> None:
        told.append(news)
        raise ValueError("a listener's own fault")

    async def work(engine: AsyncEngine) -> None:
        wanted = await answer(engine, "alone", PROMPTS[0])
        reader = asyncio.create_task(answer(engine, "good", PROMPTS[0]))
        await engine.add_request("bad", PROMPTS[1], GREEDY, listener=raises)
        assert await reader == wanted
        await settled(engine)
        assert engine.num_requests == 0
        assert [getattr(news, "code", "") for news in told] == ["", "internal_error"]
        assert await answer(engine, "after", PROMPTS[0]) == wanted

    run(work, folder)
    assert "listener of request bad raised" in caplog.text


def test_an_engine_whose_words_nobody_understands_is_begun_again(folder, monkeypatch):
    async def work(engine: AsyncEngine) -> None:
        wanted = await answer(engine, "before", PROMPTS[0])
        process = engine._outputs.process

        def once(updates):
            monkeypatch.setattr(engine._outputs, "process", process)
            raise ValueError("what is this?")

        monkeypatch.setattr(engine._outputs, "process", once)
        assert await answer(engine, "again", PROMPTS[0]) == wanted
        assert engine.num_restarts == 1

    async def main() -> None:
        engine = await AsyncEngine.from_config(config(folder), RestartPolicy(2))
        try:
            await asyncio.wait_for(work(engine), 120)
        finally:
            await engine.shutdown()

    asyncio.run(main())
