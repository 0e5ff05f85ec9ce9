"""Every family against Transformers on the same weights: alone, batched, chunked, cached, and in shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tests.tiny import CONFIGS, make_model

from common_platform import errors
from common_platform.artifact import open_model_folder
from servekit.core.config import CacheConfig, SchedulerConfig
from servekit.core.request import Request
from servekit.core.scheduler import Scheduler
from servekit.execution.choices import ExecutorConfig
from servekit.execution.executor import InProcessExecutor
from servekit.kernels.native import Format, Pool, native_library
from servekit.layers.weights import Weights
from servekit.models.llama import Llama
from servekit.models.native_llama import NativeLlama
from servekit.sampling.parameters import SamplingParams


def folder_of(tmp_path_factory, kind: str) -> Path:
    path = tmp_path_factory.mktemp("models") / kind
    make_model(kind).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(request, tmp_path_factory):
    return folder_of(tmp_path_factory, request.param)


def prompts(count: int, vocab_size: int = 300) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(3, vocab_size, (40,), generator=generator).tolist()
    found = []
    for i in range(count):
        own = torch.randint(3, vocab_size, (3 + 7 * i,), generator=generator).tolist()
        found.append(shared + own if i % 2 else own)
    return found


def run(executor, all_prompts, max_tokens, scheduler_config, *, block_size=16, together=True):
    """Greedy tokens and logprobs of each prompt, driven through the real scheduler."""
    cache = CacheConfig(num_blocks=128, block_size=block_size)
    executor.start(cache, scheduler_config)
    scheduler = Scheduler(scheduler_config, cache, executor.kv_groups)
    found: dict[str, list] = {str(i): [] for i in range(len(all_prompts))}
    for i, prompt in enumerate(all_prompts):
        params = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=1, ignore_eos=True)
        scheduler.add(Request(str(i), prompt, params))
        while scheduler.has_work and (not together or i == len(all_prompts) - 1):
            plan = scheduler.plan_step()
            scheduler.finish_step(plan, executor.execute(plan))
            for update in scheduler.take_updates():
                found[update.request_id] += update.logprobs
    return [found[str(i)] for i in range(len(all_prompts))], scheduler.stats()


def assert_is_greedy(model, prompt, entries, tolerance):
    """One forward pass of Transformers over prompt and answer: each token was the most likely, with this logprob."""
    ids = prompt + [entry.token_id for entry in entries]
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    for row, entry in zip(logprobs, entries, strict=True):
        assert row.max() - row[entry.token_id] < tolerance, "another token was more likely"
        assert abs(float(row[entry.token_id]) - entry.logprob) < tolerance


@pytest.mark.parametrize("kernels", ["reference", "native"])
@pytest.mark.parametrize(
    ("budget", "together", "block_size"), [(2048, False, 16), (2048, True, 8), (7, True, 16), (16, False, 32)]
)
def test_tokens_and_logprobs_equal_transformers(tiny, budget, together, block_size, kernels):
    executor = InProcessExecutor(tiny, ExecutorConfig(kernels=kernels))
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=budget, max_model_len=256)
    asked = prompts(6)
    found, stats = run(executor, asked, 12, config, block_size=block_size, together=together)
    executor.stop()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    for prompt, entries in zip(asked, found, strict=True):
        assert len(entries) == 12
        assert_is_greedy(model, prompt, entries, 1e-4)
    assert stats.prefix_hit_tokens > 0 or together


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_score_equals_transformers(tiny, kernels):
    executor = InProcessExecutor(tiny, ExecutorConfig(kernels=kernels))
    prompt = prompts(4)[3]
    found = executor.score(prompt)
    executor.stop()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-4)


class Rank:
    """One of two ranks whose collectives meet in ``shared``: the ranks run one after the other, layer by layer."""

    world_size = 2

    def __init__(self, rank: int, exchange) -> None:
        self.rank = rank
        self._exchange = exchange

    def all_reduce(self, tensor):
        return sum(self._exchange(self.rank, tensor))

    def all_gather(self, tensor, dim):
        return torch.cat(self._exchange(self.rank, tensor), dim=dim)


@pytest.mark.parametrize("kernels", ["reference", "native"])
def test_two_ranks_together_are_the_model(tmp_path_factory, kernels):
    import threading

    library = native_library()
    if kernels == "native" and library is None:
        pytest.skip("the CPU kernels were not built")

    path = folder_of(tmp_path_factory, "llama-bias")
    barrier = threading.Barrier(2, timeout=60)
    slots: list = [None, None]

    def exchange(rank, tensor):
        slots[rank] = tensor.clone()  # the model may write to its own once this returns
        barrier.wait()
        both = list(slots)
        barrier.wait()
        return both

    whole = InProcessExecutor(path, ExecutorConfig(kernels="reference"))
    expected = whole.score(list(range(3, 40)))
    whole.stop()
    found: list = [None, None]

    def work(rank: int) -> None:
        from servekit.execution.model_runner import score

        folder = open_model_folder(path)
        weights = Weights(folder, torch.float32, torch.device("cpu"), Rank(rank, exchange))
        if kernels == "native":
            model = NativeLlama(weights, 64, library, Pool(library, 1), Format.F32)
        else:
            model = Llama(weights, 64)
            assert model.layers[0].gate_up.out_features == 96
        assert model.attentions[0].heads == 2
        found[rank] = score(model, list(range(3, 40)), 16, torch.device("cpu"))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1]
    allowed = 1e-5 if kernels == "reference" else 1e-4
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected), rtol=0, atol=allowed)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"architectures": ["NopeForCausalLM"]}, errors.ArtifactConfigError, "LlamaForCausalLM"),
        ({"num_hidden_layers": 3}, errors.ArtifactMissing, "layers.2"),
        ({"hidden_size": 65}, errors.ArtifactShapeError, "config.json implies"),
        ({"num_key_value_heads": 3}, errors.ArtifactConfigError, "num_key_value_heads"),
        ({"rms_norm_eps": -1}, errors.ArtifactConfigError, "rms_norm_eps"),
        ({"vocab_size": "many"}, errors.ArtifactConfigError, "vocab_size"),
        ({"rope_parameters": {"rope_type": "spiral"}}, errors.ArtifactConfigError, "rope_type"),
        ({"eos_token_id": 99999}, errors.ArtifactConfigError, "eos_token_id"),
    ],
)
def test_an_impossible_config_is_refused_by_key(tmp_path_factory, change, error, says):
    import json

    path = folder_of(tmp_path_factory, "llama")
    (path / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(error, match=says):
        InProcessExecutor(path, ExecutorConfig())
