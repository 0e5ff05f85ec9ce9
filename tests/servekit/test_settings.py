"""Flags from a file and from the environment: strict, and named where they are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from common_platform.errors import ConfigError
from servekit.cli import _run, cli, serve
from servekit.settings import defaults_of

COST = '{"step_s": 0.005, "token_s": 2e-5, "row_s": 1e-5, "context_s": 1e-8}'


def written(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


def test_the_file_is_read_and_the_environment_goes_before_it(tmp_path: Path) -> None:
    path = written(
        tmp_path, "max-num-seqs: 8\nmax_n: 2\nbody_timeout_s: 5\nserved-model-name: [a, b]\ndeterministic: true\n"
    )
    found = defaults_of(serve, path, {"SERVEKIT_MAX_N": "3", "SERVEKIT_SERVED_MODEL_NAME": "c,d", "OTHER": "x"})
    assert found == {
        "max_num_seqs": 8,
        "max_n": 3,
        "body_timeout_s": 5,
        "served_model_name": ["c", "d"],
        "deterministic": True,
    }
    assert defaults_of(serve, written(tmp_path, ""), {}) == {}


BAD: list[tuple[str, str, list[str]]] = [
    ("cfg-001", "max_model_len: 5\nmax_model_len: 6\n", ["max_model_len", "twice"]),
    ("cfg-002", "max_modellen: 5\n", ["max_modellen", "max_model_len"]),
    ("cfg-003", "max_num_seqs: '64'\n", ["max_num_seqs", "string", "integer"]),
    ("cfg-004", "max_num_seqs: true\n", ["max_num_seqs", "boolean"]),
    ("float", "max_num_seqs: 1.5\n", ["max_num_seqs", "number", "integer"]),
    ("list", "- 5\n", ["config", "list"]),
    ("tag", "host: !!python/object/apply:os.system ['true']\n", ["python/object/apply:os.system"]),
    ("alias", "host: &a x\ndtype: *a\n", ["alias"]),
    ("many", "served_model_name: one\n", ["served_model_name", "list of strings"]),
    ("not-yaml", "a: [\n", ["plain YAML"]),
]


@pytest.mark.parametrize(("text", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        defaults_of(serve, path, {})
    assert all(word in str(raised.value) for word in words), raised.value
    assert _run(["serve", "no-such-model", "--config", str(path)]) == 3
    assert capsys.readouterr().err.startswith("error: ")


def test_all_hosts_at_once_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, "allowed_media_domains: ['*']\n")  # cfg-007
    assert _run(["serve", "no-such-model", "--config", str(path)]) == 3
    told = capsys.readouterr().err
    assert "allowed_media_domains" in told
    assert "*" in told


def test_a_file_that_is_too_large_is_not_parsed(tmp_path: Path) -> None:  # cfg-011
    bomb = "a: &a [x, x, x, x]\n" + "".join(f"b{i}: [*a, *a, *a, *a]\n" for i in range(100_000))
    for text in (bomb, bomb[:1000]):
        with pytest.raises(ConfigError, match=r"config: got (more than|an alias)"):
            defaults_of(serve, written(tmp_path, text), {})


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SERVEKIT_MAX_N", "abc")  # cfg-012
    assert _run(["serve", "no-such-model"]) == 3
    told = capsys.readouterr().err
    assert "SERVEKIT_MAX_N" in told
    assert "abc" in told


@pytest.mark.parametrize("value", [0, -16, 7, 2**31])
def test_values_are_checked_as_flags_are(tmp_path: Path, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, f"block_size: {value}\n")  # cfg-005
    assert _run(["serve", "no-such-model", "--config", str(path)]) == 3
    assert f"block_size: got {value}; allowed one of" in capsys.readouterr().err


def test_the_command_line_goes_before_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVEKIT_BLOCK_SIZE", "7")
    path = written(tmp_path, "block_size: 9\nmax_n: 99\n")
    assert (
        _run(["serve", "no-such-model", "--port", "0", "--config", str(path), "--block-size", "16", "--max-n", "1"])
        != 3
    )


def test_every_command_with_flags_reads_a_file() -> None:
    def flags_of(command: click.Command) -> set[str]:
        return {option.name or "" for option in command.params if isinstance(option, click.Option)}

    commands = list(cli.commands.values())
    for command in commands:
        commands += command.commands.values() if isinstance(command, click.Group) else ()
        flags = flags_of(command)
        assert ("config" in flags) is bool(flags), command.name
    assert len(commands) > 12


def test_commands_below_others_read_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line goes before the variable, and that before the file."""
    path = written(tmp_path, "out: cost.json\nno-such: 1\n")
    assert _run(["simulate", "fit", "no-such-profile", "--config", str(path)]) == 3
    figures = tmp_path / "figures.json"

    def num_requests(*more: str) -> int:
        path = written(tmp_path, "num_requests: 3\nrequest-rate: 2.0\n")
        told = ["simulate", "--cost", COST, "--json", str(figures), "--config", str(path), *more]
        assert _run(told) == 0
        return json.loads(figures.read_text())["finished"]

    assert num_requests() == 3
    monkeypatch.setenv("SERVEKIT_NUM_REQUESTS", "5")
    assert num_requests() == 5
    assert num_requests("--num-requests", "4") == 4


def test_keys_of_no_file_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        defaults_of(serve, tmp_path / "nowhere.yaml", {})
