"""The sampler: right distributions, in any company, and one bad row is one bad row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common_platform.errors import RequestError
from servekit.execution import logits_processors, sampling_ops, token_masks
from servekit.execution.sampler import NO_TOKEN, Sampler
from servekit.sampling.parameters import SamplingParams

VOCABULARY = 20


def logits_of(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def expected_distribution(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """The probabilities by the definitions, token by token, in float64 and without any of the sampler's code."""
    p = torch.softmax(logits.double() / params.temperature, dim=-1).numpy()
    keep = np.ones(len(p), bool)
    if params.min_p:
        keep &= p >= params.min_p * p.max()
    order = np.argsort(-p, kind="stable")
    if params.top_k > 0:
        kept = [i for i in order if keep[i]][: params.top_k]
        keep = np.isin(np.arange(len(p)), kept)
    if params.top_p < 1:
        q = np.where(keep, p, 0) / p[keep].sum()
        kept, total = [], 0.0
        for i in np.argsort(-q, kind="stable"):
            if total >= params.top_p:
                break
            kept.append(i)
            total += q[i]
        keep &= np.isin(np.arange(len(p)), kept)
    if params.typical_p < 1:
        q = np.where(keep, p, 0) / p[keep].sum()
        inside = np.flatnonzero(q)
        surprise = -np.log(q[inside])
        entropy = (q[inside] * surprise).sum()
        kept, total = [], 0.0
        for i in inside[np.argsort(np.abs(surprise - entropy), kind="stable")]:
            if total >= params.typical_p:
                break
            kept.append(i)
            total += q[i]
        keep &= np.isin(np.arange(len(p)), kept)
    return np.where(keep, p, 0) / p[keep].sum()


def assert_fits(counted: np.ndarray, expected: np.ndarray) -> None:
    """Chi-square, the cells where little is expected taken together; the limit is beyond the 1e-6 quantile."""
    often = expected >= 5
    counts = [*counted[often], counted[~often].sum()]
    wanted = [*expected[often], expected[~often].sum()]
    statistic = sum((c - w) ** 2 / w for c, w in zip(counts, wanted, strict=True) if w > 0.5)
    freedom = max(len(counts) - 1, 1)
    assert statistic < freedom + 4.75 * math.sqrt(2 * freedom) + 20


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"typical_p": 0.6},
        {"top_k": 8, "top_p": 0.8, "temperature": 1.3},
        {"min_p": 0.02, "top_k": 5, "typical_p": 0.8},
    ],
)
def test_tokens_follow_the_distribution(settings_):
    """Chi-square over many draws, each row a request with a seed of its own; chance of a false alarm 1e-6."""
    draws = 4000
    params = SamplingParams(**settings_)
    logits = logits_of(1, seed=4)
    sampler = Sampler(VOCABULARY, draws)
    for slot in range(draws):
        sampler.add_row(slot, SamplingParams(seed=slot, **settings_), [1], [], [])
    tokens = sampler.sample(logits.expand(draws, -1), list(range(draws))).token_ids
    expected = expected_distribution(logits[0], params) * draws
    counted = np.bincount(tokens, minlength=VOCABULARY)
    assert (counted[expected == 0] == 0).all()
    assert_fits(counted, expected)


def test_consecutive_tokens_of_one_request_follow_it_too():
    sampler = Sampler(VOCABULARY, 1)
    sampler.add_row(0, SamplingParams(seed=7), [1], [], [])
    logits = logits_of(1, seed=4)
    tokens = [sampler.sample(logits, [0]).token_ids[0] for _ in range(4000)]
    expected = expected_distribution(logits[0], SamplingParams()) * 4000
    assert_fits(np.bincount(tokens, minlength=VOCABULARY), expected)


parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([-1, 1, 4]),
    top_p=st.sampled_from([1.0, 0.5]),
    min_p=st.sampled_from([0.0, 0.05]),
    typical_p=st.sampled_from([1.0, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([None, {3: 4.0}]),
    logprobs=st.sampled_from([None, 2]),
    seed=st.integers(-5, 5),
)


@settings(max_examples=80, deadline=None)
@given(params=st.lists(parameters, min_size=1, max_size=6), data=st.data())
def test_a_request_gets_the_same_tokens_in_any_company_and_after_a_preemption(params, data):
    logits = logits_of(len(params), seed=9)
    alone = []
    for index, one in enumerate(params):
        sampler = Sampler(VOCABULARY, 8)
        sampler.add_row(5, one, [1, 2], [], [])
        alone.append([sampler.sample(logits[index : index + 1], [5]).token_ids[0] for _ in range(4)])
    order = data.draw(st.permutations(range(len(params))))
    sampler = Sampler(VOCABULARY, 8)
    for slot, index in enumerate(order):
        sampler.add_row(slot, params[index], [1, 2], [], [])
    slots = list(range(len(order)))
    steps = []
    for step in range(4):
        if step == 2:  # the first row is preempted and comes back in another slot
            sampler.remove_row(slots[0])
            slots[0] = 7
            sampler.add_row(7, params[order[0]], [1, 2], [tokens[0] for tokens in steps], [])
        steps.append(sampler.sample(logits[list(order)], slots).token_ids)
    for place, index in enumerate(order):
        assert [tokens[place] for tokens in steps] == alone[index]


SMALLEST = 5e-324  # a float64 above 0, and no float32


@pytest.mark.parametrize("given", [{"top_p": SMALLEST}, {"typical_p": SMALLEST}, {"temperature": SMALLEST}])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 50_000])
def test_what_is_less_than_float32_can_say_still_leaves_a_token(given: dict[str, float], vocabulary: int) -> None:
    sampler = Sampler(vocabulary, 2)
    logits = logits_of(2, vocabulary=vocabulary)
    sampler.add_row(0, SamplingParams(**given), [1], [], [])
    sampler.add_row(1, SamplingParams(), [1], [], [])
    output = sampler.sample(logits, [0, 1])
    assert not output.errors
    assert all(0 <= token < vocabulary for token in output.token_ids)
    if "typical_p" not in given:
        assert output.token_ids[0] == int(logits[0].argmax())


def test_a_draw_that_finds_nothing_ends_its_own_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a number where a probability should be: as any method that comes later might leave it."""
    monkeypatch.setattr(sampling_ops, "keep_typical", lambda logits, typical_p: logits / 0 * (typical_p < 1))
    sampler = Sampler(VOCABULARY, 2)
    sampler.add_row(0, SamplingParams(typical_p=0.5), [1], [], [])
    sampler.add_row(1, SamplingParams(temperature=0.0), [1], [], [])
    output = sampler.sample(logits_of(2), [0, 1])
    assert list(output.errors) == [0]
    assert output.token_ids[0] == NO_TOKEN


def test_top_p_over_a_large_vocabulary_is_exact_with_and_without_the_full_sort():
    generator = torch.Generator().manual_seed(0)
    for spread in (0.01, 5.0):  # flat: needs the full sort; peaked: does not
        logits = torch.randn(2, 5000, generator=generator) * spread
        top_k, top_p = torch.tensor([5000, 5000]), torch.tensor([[0.9], [0.3]])
        fast = sampling_ops.keep_top(logits, top_k, top_p)
        for row in range(2):
            exact = expected_distribution(logits[row], SamplingParams(top_p=float(top_p[row])))
            kept = torch.isfinite(fast[row]).numpy()
            assert abs(kept.sum() - (exact > 0).sum()) <= 1  # a tie at the edge in float32
            assert exact[kept].sum() > 0.999


def test_penalties_by_their_definitions():
    prompt, output = [3, 3, 4], [5, 5, 6]
    params = SamplingParams(
        temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.5, logprobs=0
    )
    logits = logits_of(1, seed=1)
    expected = logits[0].clone()
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token in set(output):
        expected[token] -= 0.5 + 0.25 * output.count(token)
    sampler = Sampler(VOCABULARY, 1)
    sampler.add_row(0, params, prompt, output, [])
    row = sampler._rows[0]
    penalised = sampler._edited(logits, [0], [row], {})
    torch.testing.assert_close(penalised[0], expected)
    assert sampler.sample(logits, [0]).token_ids == [int(expected.argmax())]
    assert int(sampler._penalties.counts[row.penalties].sum()) == 4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=40))
def test_each_request_with_penalties_counts_its_own_tokens(slots):
    """Requests come and go, in more slots than the table has had rows; none finds what another left behind."""
    sampler = Sampler(VOCABULARY, 8)
    outputs: dict[int, list[int]] = {}
    for step, slot in enumerate(slots):
        if slot in outputs and step % 3 == 0:
            sampler.remove_row(slot)
            del outputs[slot]
        elif slot not in outputs:
            sampler.add_row(slot, SamplingParams(frequency_penalty=1.0, seed=slot), [slot, slot], [1], [])
            outputs[slot] = [1]
        if outputs:
            here = sorted(outputs)
            for at, token in zip(here, sampler.sample(logits_of(len(here), step), here).token_ids, strict=True):
                outputs[at].append(token)
    for slot, tokens in outputs.items():
        place = sampler._rows[slot].penalties
        counted = sampler._penalties.counts[place].tolist()
        assert counted == np.bincount(tokens, minlength=VOCABULARY).tolist()
        assert sampler._penalties.in_prompt[place].nonzero().flatten().tolist() == [slot]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.data())
def test_masks_are_the_sets_that_they_stand_for(vocab, data):
    some = st.lists(st.integers(0, vocab - 1), max_size=20)
    kept, left_out = data.draw(some), data.draw(some)
    for words, expected in (
        (token_masks.every_token(vocab), set(range(vocab))),
        (token_masks.without(token_masks.every_token(vocab), left_out), set(range(vocab)) - set(left_out)),
        (token_masks.without(token_masks.these(kept, vocab), left_out), set(kept) - set(left_out)),
    ):
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits).tolist()) == expected


def test_masks_and_biases():
    logits = logits_of(1, seed=2)
    best = int(logits.argmax())
    second = int(logits[0].topk(2).indices[1])

    def first(params: SamplingParams, output=(), eos=()) -> int:
        sampler = Sampler(VOCABULARY, 1)
        sampler.add_row(0, params, [1], list(output), list(eos))
        return sampler.sample(logits, [0]).token_ids[0]

    assert first(SamplingParams(temperature=0)) == best
    assert first(SamplingParams(temperature=0, logit_bias={best: -100})) == second
    assert first(SamplingParams(temperature=0, allowed_token_ids=[second, 0])) in (second, 0)
    assert first(SamplingParams(temperature=0, min_tokens=1), eos=[best]) == second
    assert first(SamplingParams(temperature=0, min_tokens=1), output=[0], eos=[best]) == best
    assert first(SamplingParams(temperature=0, min_tokens=1, ignore_eos=True), eos=[best]) == best
    assert first(SamplingParams(temperature=0, bad_words_token_ids=[[best]])) == second
    assert first(SamplingParams(temperature=0, bad_words_token_ids=[[7, best]])) == best
    assert first(SamplingParams(temperature=0, bad_words_token_ids=[[7, best]]), output=[7]) == second


def test_logprobs_are_of_the_models_own_distribution():
    logits = logits_of(2, seed=3)
    sampler = Sampler(VOCABULARY, 2)
    sampler.add_row(0, SamplingParams(temperature=0.3, logprobs=3, logit_bias={2: 50.0}), [1], [], [])
    sampler.add_row(1, SamplingParams(temperature=0), [1], [], [])
    output = sampler.sample(logits, [0, 1])
    assert output.token_ids[0] == 2
    entry = output.logprobs[0]
    exact = logits[0].double().log_softmax(-1)
    assert entry.logprob == pytest.approx(float(exact[2]), abs=1e-5)
    assert entry.rank == int((exact > exact[2]).sum()) + 1
    assert [token for token, _ in entry.top] == exact.topk(3).indices.tolist()
    assert 1 not in output.logprobs


def test_a_row_that_is_not_a_number_fails_alone():
    logits = logits_of(3, seed=5)
    sampler = Sampler(VOCABULARY, 3)
    for slot in range(3):
        sampler.add_row(slot, SamplingParams(seed=1), [1], [], [])
    alone = sampler.sample(logits, [0, 1, 2]).token_ids
    sampler = Sampler(VOCABULARY, 3)
    for slot in range(3):
        sampler.add_row(slot, SamplingParams(seed=1), [1], [], [])
    logits[1, 4] = float("nan")
    output = sampler.sample(logits, [0, 1, 2])
    assert list(output.errors) == [1]
    assert output.token_ids == [alone[0], NO_TOKEN, alone[2]]


def test_a_custom_processor_by_name_and_one_that_raises():
    class Only:
        def __init__(self, params):
            self.token = (params.extra_args or {})["token"]

        def __call__(self, prompt_ids, output_ids, logits):
            if self.token is None:
                raise KeyError("no token")
            return torch.full_like(logits, -1e9).index_fill(0, torch.tensor([self.token]), 0.0)

    logits_processors.register("only", Only)
    sampler = Sampler(VOCABULARY, 3)
    sampler.add_row(0, SamplingParams(logits_processors=["only"], extra_args={"token": 11}), [1], [], [])
    sampler.add_row(1, SamplingParams(logits_processors=["only"], extra_args={"token": None}), [1], [], [])
    sampler.add_row(2, SamplingParams(temperature=0), [1], [], [])
    logits = logits_of(3)
    output = sampler.sample(logits, [0, 1, 2])
    assert output.token_ids[0] == 11
    assert list(output.errors) == [1]
    assert output.token_ids[2] == int(logits[2].argmax())
    with pytest.raises(RequestError, match="only"):
        sampler.add_row(1, SamplingParams(logits_processors=["nope"]), [1], [], [])


def mixed(z):
    """SplitMix64's step in whole numbers of Python."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10_000)), min_size=1, max_size=5))
def test_a_row_has_the_number_of_its_seed_and_position_whatever_is_beside_it(rows):
    seeds = np.asarray([sampling_ops.seed_of(seed) for seed, _ in rows], np.uint64)
    positions = np.asarray([position for _, position in rows])
    wanted = [
        mixed(mixed(int(seed)) ^ (position * 0x9E3779B97F4A7C15 % 2**64))
        for seed, (_, position) in zip(seeds, rows, strict=True)
    ]
    assert sampling_ops.counter_seeds(seeds, positions).tolist() == wanted
    numbers = sampling_ops.uniforms(seeds, positions)
    assert numbers.tolist() == [number / 2**64 for number in (one >> 11 << 11 for one in wanted)]
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert (numbers != sampling_ops.uniforms(seeds, positions + 1)).all()
    assert (numbers != sampling_ops.uniforms(seeds ^ np.uint64(1), positions)).all()


def test_draw_never_takes_an_impossible_token():
    logits = torch.full((3, 50), float("-inf"))
    logits[:, 17] = 0.0
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert sampling_ops.draw(logits, uniforms).tolist() == [17, 17, 17]
