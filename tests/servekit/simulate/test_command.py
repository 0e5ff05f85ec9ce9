"""`servekit simulate` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.tiny import make_folder

from common_platform.errors import ConfigError, ResourceError
from servekit.cli import cli

COST = '{"step_s": 0.005, "token_s": 2e-5, "row_s": 1e-5, "context_s": 1e-8}'
SMALL = ("--num-requests", "40", "--output-tokens", "uniform:5:40")


def simulate(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["simulate", *arguments], catch_exceptions=True)


def test_a_table_says_what_happened() -> None:
    told = simulate("--cost", COST, *SMALL, "--num-replicas", "2", "--router", "least_loaded")
    assert (told.exit_code, told.stderr) == (0, "")
    assert "40 ended, 0 refused" in told.stdout
    assert all(word in told.stdout for word in ("time to first token", "between tokens", "in queue", "preemptions"))


def test_json_and_plot_from_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"arrival": i / 4, "prompt_tokens": 50, "output_tokens": 20} for i in range(30)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    files = ("--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"))
    told = simulate("--cost", COST, "--trace", str(trace), *files)
    assert (told.exit_code, told.output) == (0, "")
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["finished"], report["prompt_tokens"], report["output_tokens"]) == (30, 1500, 600)
    assert report["ttft_s"]["p50"] >= 0.006
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_slow_way_says_the_same(tmp_path: Path) -> None:
    options = ("--cost", COST, *SMALL, "--num-prefix-groups", "3", "--prefix-tokens", "64", "--num-turns", "2")
    for name, flags in {"fast": (), "slow": ("--step-by-step",)}.items():
        assert simulate(*options, *flags, "--json", str(tmp_path / name)).exit_code == 0
    assert (tmp_path / "fast").read_bytes() == (tmp_path / "slow").read_bytes()


def test_from_a_model_to_a_forecast(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    profile, cost = str(tmp_path / "profile.jsonl"), str(tmp_path / "cost.json")
    grid = ("--grid-rows", "1,2", "--grid-prompt-tokens", "1,24", "--num-repeats", "1", "--max-model-len", "64")
    measured = simulate("measure", str(folder), "--out", profile, *grid)
    assert measured.exit_code == 0, measured.output
    fitted = simulate("fit", profile, "--out", cost)
    assert fitted.exit_code == 0, fitted.output
    said = json.loads(fitted.stdout)
    assert said["shapes"] > 4
    assert said["median_error"] <= said["p95_error"]
    assert simulate("--cost", cost, *SMALL).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["cost", "--cost"]),
        (("--cost", "{}"), ["--cost"]),
        (("--cost", COST, "--num-replicas", "0"), ["num_replicas", "0", "--num-replicas"]),
        (("--cost", COST, "--router", "x"), ["router", "x", "prefix_aware"]),
        (("--cost", COST, "--block-size", "24"), ["block_size", "24", "(8, 16, 32, 64)"]),
        (("--cost", COST, "--prompt-tokens", "many"), ["prompt_tokens", "many", "--prompt-tokens"]),
        (("--cost", COST, "--trace", "no-such-file"), ["trace", "no-such-file"]),
        (("fit", "no-such-file"), ["profile", "no-such-file"]),
        (("measure", "M", "--out", "o", "--grid-rows", "1;2"), ["grid_rows", "1;2", "--grid-rows"]),
    ],
)
def test_a_wrong_setting_is_refused_and_named(arguments: tuple[str, ...], words: list[str]) -> None:
    told = simulate(*arguments)
    assert isinstance(told.exception, ConfigError)
    assert all(word in str(told.exception) for word in words), str(told.exception)


def test_an_error_is_one_line_and_status_3() -> None:
    command = [sys.executable, "-m", "servekit.cli", "simulate", "--cost", '{"step_s": -1}']
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (3, "")
    assert (
        ended.stderr
        == "error: cost.step_s: got -1.0; allowed a finite number of seconds, 0 or more; change with --cost\n"
    )


def test_without_matplotlib_a_plot_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    told = simulate("--cost", COST, *SMALL, "--plot", str(tmp_path / "out.png"))
    assert isinstance(told.exception, ResourceError)
    assert "servekit[plot]" in str(told.exception)


@pytest.mark.parametrize(
    ("flag", "file"), [("--json", "none/out.json"), ("--plot", "none/out.png"), ("--plot", "a.xyz")]
)
def test_a_file_that_cannot_be_written_is_told(tmp_path: Path, flag: str, file: str) -> None:
    told = simulate("--cost", COST, *SMALL, flag, str(tmp_path / file))
    assert isinstance(told.exception, ResourceError)
    assert flag in str(told.exception)


def test_simulating_imports_no_torch() -> None:
    code = "import sys, servekit.simulate.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
