"""Cost models from profiles: known coefficients come back, and a real engine gives finite ones."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from tests.tiny import make_folder

from common_platform.errors import ConfigError, ResourceError
from servekit.engine.config import EngineConfig
from servekit.simulate.cost import CostModel, row_pairs
from servekit.simulate.fit import fit
from servekit.simulate.measure import Grid, measure
from servekit.simulate.profile import MeasuredStep, read_profile, write_profile

TRUE = CostModel(step_s=0.004, token_s=2e-5, row_s=5e-5, context_s=3e-8, pair_s=4e-8)


def profile_of(cost: CostModel, *, noise: float = 0.0, repeats: int = 1) -> list[MeasuredStep]:
    chance = random.Random(2)
    shapes = []
    for rows in (1, 2, 4, 8, 16, 64):
        for end in (2, 16, 128, 1024):
            shapes.append((rows, rows, rows * end, 0))
            shapes.append((rows * end, rows, rows * end, rows * row_pairs(end, end)))
    return [
        MeasuredStep(
            tokens=shape[0],
            rows=shape[1],
            context=shape[2],
            pairs=shape[3],
            seconds=cost.seconds(*shape) * math.exp(chance.gauss(0, noise)),
        )
        for shape in shapes
        for _ in range(repeats)
    ]


@pytest.mark.parametrize(
    "true", [TRUE, CostModel(step_s=0.01), CostModel(token_s=1e-4), CostModel(step_s=1e-3, context_s=1e-7)]
)
def test_the_fit_finds_the_coefficients_that_made_the_profile(true: CostModel) -> None:
    found = fit(profile_of(true))
    for name in CostModel.__struct_fields__:
        assert getattr(found.cost, name) == pytest.approx(getattr(true, name), rel=1e-4, abs=1e-12)
    assert found.p95_error < 1e-6


def test_noise_shows_in_the_error_and_hardly_in_the_coefficients() -> None:
    found = fit(profile_of(TRUE, noise=0.1, repeats=15))
    assert found.cost.step_s == pytest.approx(TRUE.step_s, rel=0.1)
    assert found.cost.pair_s == pytest.approx(TRUE.pair_s, rel=0.3)
    assert 0.005 < found.median_error < found.p95_error < 0.2


def test_no_coefficient_is_below_zero_where_more_work_took_less_time() -> None:
    steps = [MeasuredStep(tokens=n, rows=1, context=n, seconds=1.0 / n) for n in (1, 2, 4, 8)]
    found = fit(steps)
    assert all(getattr(found.cost, name) >= 0 for name in CostModel.__struct_fields__)
    assert found.median_error > 0.1


def test_the_fit_is_the_best_of_all_that_are_not_negative() -> None:
    steps = profile_of(TRUE, noise=0.3)
    best = fit(steps).cost

    def error(cost: CostModel) -> float:
        return sum((cost.seconds(*step.shape) / step.seconds - 1) ** 2 for step in steps)

    for name in CostModel.__struct_fields__:
        for factor in (0.97, 1.03):
            values = {field: getattr(best, field) for field in CostModel.__struct_fields__}
            values[name] = values[name] * factor or 1e-3 * getattr(TRUE, name) * (factor > 1)
            assert error(CostModel(**values)) >= error(best)


def test_a_profile_and_a_cost_model_survive_their_files(tmp_path: Path) -> None:
    steps = profile_of(TRUE)
    write_profile(tmp_path / "profile.jsonl", steps)
    assert read_profile(tmp_path / "profile.jsonl") == steps
    TRUE.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == TRUE
    assert CostModel.load('{"step_s": 0.5}') == CostModel(step_s=0.5)


STEP = '{"tokens": 1, "rows": 1, "context": 1, "seconds": 0.5}'


@pytest.mark.parametrize(
    ("line", "param"),
    [
        ("{", "p.jsonl:2"),
        (STEP.replace("rows", "row"), "p.jsonl:2"),
        (STEP.replace("1,", '"1",', 1), "p.jsonl:2"),
        (STEP.replace('"tokens": 1', '"tokens": 0'), "p.jsonl:2.tokens"),
        (STEP.replace("0.5", "0"), "p.jsonl:2.seconds"),
        (STEP.replace("0.5", "-1"), "p.jsonl:2.seconds"),
    ],
)
def test_a_bad_line_of_a_profile_is_refused_by_name(tmp_path: Path, line: str, param: str) -> None:
    (tmp_path / "p.jsonl").write_text(f"{STEP}\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_profile(tmp_path / "p.jsonl")
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"step_s": -1}', "cost.step_s"),
        ('{"step_s": 0}', "takes time"),
        ('{"context_s": 1}', "takes time"),
        ('{"step": 1}', "step_s"),
        ('{"step_s": "1"}', "float"),
        ("{", "JSON"),
        ("no-such-file.json", "no-such-file.json"),
    ],
)
def test_a_bad_cost_model_is_refused(text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        CostModel.load(text)


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="--out"):
        TRUE.save(tmp_path / "none" / "cost.json")
    with pytest.raises(ResourceError, match="--out"):
        write_profile(tmp_path / "none" / "p.jsonl", [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tiny"))


def test_a_real_engine_is_measured_and_fitted(folder: Path) -> None:
    grid = Grid(num_rows=(1, 4), num_prompt_tokens=(1, 40), num_decodes=3, num_repeats=2)
    steps = measure(EngineConfig(model=str(folder), max_model_len=64, num_threads=1), grid)
    assert len(steps) == 2 * 4 * 4  # repeats, shapes, a prefill and three decodes
    shapes = {step.shape for step in steps}
    assert {(160, 4, 160, 4 * row_pairs(40, 40)), (4, 4, 4 * 42, 0), (1, 1, 2, 0)} <= shapes
    found = fit(steps)
    assert all(math.isfinite(getattr(found.cost, name)) for name in CostModel.__struct_fields__)
    assert all(found.cost.seconds(*shape) > 0 for shape in shapes)
    assert math.isfinite(found.p95_error)


def test_a_grid_of_which_nothing_fits_the_engine_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--max-num-seqs"):
        measure(EngineConfig(model=str(folder), max_num_seqs=2, max_model_len=64), Grid(num_rows=(4,)))
    with pytest.raises(ConfigError, match=r"grid\.num_rows"):
        Grid(num_rows=())
