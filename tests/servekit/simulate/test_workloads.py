"""Traces with every fault refused by name, and dice that fall as they were told."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import pytest

from common_platform.errors import ConfigError
from servekit.simulate.job import turns_of
from servekit.simulate.synthetic import Lengths, SyntheticWorkload
from servekit.simulate.trace import read_trace

GOOD = '{"arrival": 0, "prompt_tokens": 5, "output_tokens": 2}'


def write(path: Path, *lines: str) -> Path:
    file = path / "requests.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_trace_says_when_what_and_for_whom(tmp_path: Path) -> None:
    jobs = read_trace(
        write(
            tmp_path,
            '{"arrival": 0.5, "token_ids": [7, 8, 9], "output_tokens": 2, "priority": -3, "tenant": "a"}',
            "",
            '{"arrival": 1, "prompt_tokens": 20, "prefix_group": "g", "prefix_tokens": 16, "output_tokens": 4}',
            '{"arrival": 2, "prompt_tokens": 30, "prefix_group": "g", "prefix_tokens": 12, "output_tokens": 4}',
        )
    )
    assert [(job.arrival, job.num_prompt, len(job.output)) for job in jobs] == [(0.5, 3, 2), (1, 20, 4), (2, 30, 4)]
    assert jobs[0].prompt_token_ids() == [7, 8, 9]
    assert (jobs[0].priority, jobs[0].tenant) == (-3, "a")
    one, other = jobs[1].prompt_token_ids(), jobs[2].prompt_token_ids()
    assert one[:12] == other[:12]
    assert not set(one[12:]) & set(other[12:])
    assert not set(jobs[1].output) & set(jobs[2].output)


def test_lines_of_a_session_are_turns_with_all_that_was_said_before(tmp_path: Path) -> None:
    turn = '{"session": "s", "prompt_tokens": 3, "output_tokens": 2, "think_s": 1.5}'
    (first,) = read_trace(write(tmp_path, GOOD.replace("}", ', "session": "s"}'), turn, turn))
    turns = turns_of(first)
    assert [one.num_prompt for one in turns] == [5, 10, 15]
    assert turns[2].prompt_token_ids()[:12] == [*turns[1].prompt_token_ids(), *turns[1].output]
    assert [one.think_s for one in turns] == [1.5, 1.5, 0.0]


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        ("nonsense", "", ["nonsense", "JSON object"]),
        ("[1, 2]", "", ["JSON object"]),
        ('{"prompt_tokens": 5, "output_tokens": 2}', ".arrival", ["missing"]),
        ('{"arrival": -1, "prompt_tokens": 5, "output_tokens": 2}', ".arrival", ["-1", "0.."]),
        ('{"arrival": "0", "prompt_tokens": 5, "output_tokens": 2}', ".arrival", ["0.."]),
        ('{"arrival": true, "prompt_tokens": 5, "output_tokens": 2}', ".arrival", ["True"]),
        ('{"arrival": 0, "output_tokens": 2}', ".prompt_tokens", ["neither"]),
        ('{"arrival": 0, "prompt_tokens": 1, "token_ids": [1], "output_tokens": 2}', ".prompt_tokens", ["both"]),
        ('{"arrival": 0, "prompt_tokens": 0, "output_tokens": 2}', ".prompt_tokens", ["0", "1.."]),
        ('{"arrival": 0, "prompt_tokens": 1.5, "output_tokens": 2}', ".prompt_tokens", ["1.5", "integer"]),
        ('{"arrival": 0, "prompt_tokens": 5}', ".output_tokens", ["missing"]),
        ('{"arrival": 0, "prompt_tokens": 5, "output_tokens": 99999999}', ".output_tokens", ["99999999", "16777216"]),
        ('{"arrival": 0, "token_ids": [], "output_tokens": 2}', ".token_ids", ["0 tokens"]),
        ('{"arrival": 0, "token_ids": [1, -2], "output_tokens": 2}', ".token_ids[1]", ["-2", "2147483647"]),
        ('{"arrival": 0, "token_ids": "12", "output_tokens": 2}', ".token_ids", ["a list"]),
        (GOOD.replace("}", ', "prefix_group": "g"}'), ".prefix_group", ["prefix_tokens"]),
        (GOOD.replace("}", ', "prefix_group": "g", "prefix_tokens": 6}'), ".prefix_tokens", ["6", "1..5"]),
        (GOOD.replace("}", ', "priority": 1e3}'), ".priority", ["integer"]),
        (GOOD.replace("}", ', "tenant": 3}'), ".tenant", ["3", "characters"]),
        (GOOD.replace("}", ', "think_s": 3}'), ".think_s", ["second turn"]),
        (GOOD.replace("}", ', "prioriti": 3}'), ".prioriti", ["3", "priority"]),
    ],
)
def test_a_bad_line_is_refused_with_file_line_field_value_and_limit(
    tmp_path: Path, line: str, field: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_trace(write(tmp_path, GOOD, line))
    assert caught.value.param == f"requests.jsonl:2{field}"
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "empty.jsonl"])
def test_a_trace_without_requests_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match="--trace"):
        read_trace(tmp_path / name)


def drawn(text: str, count: int = 4000) -> list[int]:
    workload = SyntheticWorkload(num_requests=count, prompt_tokens=Lengths.parse(text, "prompt_tokens"), seed=5)
    return [job.num_prompt for job in workload.jobs()]


def test_lengths_follow_their_distribution(tmp_path: Path) -> None:
    assert set(drawn("fixed:17")) == {17}
    uniform = drawn("uniform:3:9")
    assert set(uniform) == set(range(3, 10))
    assert statistics.mean(uniform) == pytest.approx(6, rel=0.05)
    lognormal = drawn("lognormal:100:0.5")
    assert statistics.median(lognormal) == pytest.approx(100, rel=0.05)
    assert min(drawn("lognormal:1:3")) == 1
    seen = write(tmp_path, GOOD, GOOD.replace("5", "50"))
    assert set(drawn(f"trace:{seen}")) == {5, 50}


def arrivals(**settings: Any) -> list[float]:
    return [job.arrival for job in SyntheticWorkload(num_requests=4000, request_rate=8.0, **settings).jobs()]


def test_arrivals_come_at_their_rate() -> None:
    constant = arrivals(arrivals="constant")
    assert {round(b - a, 6) for a, b in itertools.pairwise(constant)} == {0.125}
    poisson = arrivals(arrivals="poisson")
    gaps = [b - a for a, b in itertools.pairwise(poisson)]
    assert statistics.mean(gaps) == pytest.approx(0.125, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.125, rel=0.1)
    burst = arrivals(arrivals="burst", burst_size=20)
    assert burst[:21] == [0.0] * 20 + [2.5]
    assert set(arrivals(arrivals="poisson", seed=1)) != set(poisson)


def test_prefix_groups_and_turns_share_what_they_should() -> None:
    workload = SyntheticWorkload(num_requests=60, num_prefix_groups=3, prefix_tokens=40, num_turns=3)
    sessions = [turns_of(job) for job in workload.jobs()]
    assert len({tuple(turns[0].prompt_token_ids()[:40]) for turns in sessions}) == 3
    assert len({tuple(turns[0].prompt_token_ids()[40:]) for turns in sessions}) == 60
    for turns in sessions:
        assert len(turns) == 3
        for before, after in itertools.pairwise(turns):
            said = [*before.prompt_token_ids(), *before.output]
            assert after.prompt_token_ids()[: len(said)] == said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "200",
        "fixed",
        "fixed:0",
        "fixed:1.5",
        "fixed:nan",
        "uniform:5",
        "uniform:9:3",
        "lognormal:10:-1",
        "zipf:1:2",
    ],
)
def test_a_distribution_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--output-tokens"):
        Lengths.parse(text, "output_tokens")


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"arrivals": "never"}, "--arrivals"),
        ({"num_requests": 0}, "--num-requests"),
        ({"request_rate": 0.0}, "--request-rate"),
        ({"request_rate": float("nan")}, "--request-rate"),
        ({"think_s": -1.0}, "--think-s"),
        ({"num_prefix_groups": 2}, "--num-prefix-groups"),
        ({"prefix_tokens": 1 << 25, "num_prefix_groups": 1}, "--prefix-tokens"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        SyntheticWorkload(**settings)
