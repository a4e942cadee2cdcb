"""Config files of the commands: what they may hold, and files that would take a parser all memory or time."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.options import SEED
from helpers.training import SMALL
from helpers.volumes import write_cases
from sslfast import UserError, predict
from sslfast.cli import read_config
from sslfast.train import main

NESTED = "a config file has no alias, no tag, and no list in a list"
ALIASES = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
VALID = "data: d\nsteps: 4\npatch: [8, 8, 8]\nlearning_rate: 0.001\nspacing: null\nresume: false\n"


def test_a_config_file_holds_numbers_words_and_lists_of_them(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(VALID)
    expected = {"data": "d", "steps": 4, "patch": [8, 8, 8], "learning_rate": 0.001, "spacing": None, "resume": False}
    assert read_config(path) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("a: " + "[" * 20_000, NESTED, id="deep nesting"),
        pytest.param(ALIASES, f'{NESTED} in "<byte string>", line 2', id="aliases of aliases"),
        pytest.param("a: 1\nb: !!int ''", NESTED, id="a tag"),
        pytest.param("a: 2001-99-99", "month must be in 1..12", id="no date"),
        pytest.param("a: " + "1" * 5000, "Exceeds the limit", id="a number of 5,000 digits"),
        pytest.param("a: x\n" * 20_000, "more than 65,536 bytes", id="a long file"),
        pytest.param('a: "x\\0y"', "'a' must have a number, a word, or a list of them", id="NUL"),
        pytest.param("a: {b: c}", "'a' must have a number, a word, or a list of them", id="a mapping in the mapping"),
        pytest.param("\x00\x01", "special characters are not allowed", id="bytes"),
        pytest.param("a: 1\na: 2", "'a' is there twice", id="a name twice"),
        pytest.param("help: true", "'help' belongs on the command line", id="help"),
        pytest.param("config: other.yaml", "'config' belongs on the command line", id="another file"),
        pytest.param("", "must consist of `flag: value` lines", id="empty"),
    ],
)
def test_a_file_that_is_no_config_is_refused_at_once(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as raised:
        read_config(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("flag", ["--probabilities", "--largest-component"])
def test_a_flag_without_its_values_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--checkpoint", "a", "--images", "b", "--output", "c"]
    assert predict.main([*wanted, flag]) == predict.main([*wanted[:4], flag, *wanted[4:]]) == 2
    assert capsys.readouterr().err.count(f"error: {flag} has no value; add one or more, or leave it out") == 2


def test_no_value_replaces_the_values_of_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {tmp_path}/nowhere\nclasses: [liver=1]\n")
    assert main(["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run"), "--classes"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_list_in_a_config_file_may_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {tmp_path}/nowhere\nclasses: []\n")
    assert main(["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [".inf", ".nan", "-1"])
def test_a_rate_that_cannot_be_is_refused_before_the_folder_is_made(
    tmp_path: Path, rate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {tmp_path}\nlearning_rate: {rate}\n")
    assert main(["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run"), *SMALL]) == 2
    assert "--learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_mutated_config_files_are_read_or_refused(tmp_path: Path) -> None:
    path, choice, refused = tmp_path / "config.yaml", random.Random(SEED), []
    for _ in range(200):
        content = bytearray(VALID.encode())
        for _ in range(choice.randint(1, 4)):
            place = choice.randrange(len(content))
            content[place : place + choice.randrange(3)] = choice.choice(
                [b"*", b"[", b"&a", b"!", b"\0", b": ", b"\xff"]
            )
        path.write_bytes(content)
        try:
            assert all(isinstance(name, str) for name in read_config(path))
        except UserError as error:
            refused.append(str(error))
    assert 100 < len(refused) < 200
    assert all(str(path) in message for message in refused)


def test_a_terminal_that_lacks_a_character_shows_another(tmp_path: Path) -> None:
    """The table of `prepare` has a multiplication sign, and names of cases may have any letter."""
    data = write_cases(tmp_path / "data", cases=1, labelled=1)
    (data / "images/case_0.nii.gz").rename(data / "images/\u4e2d.nii.gz")
    (data / "labels/case_0.nii.gz").rename(data / "labels/\u4e2d.nii.gz")
    command = [sys.executable, "-m", "sslfast.prepare", "--data", str(data)]
    result = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert f"{'?':<24} training" in result.stdout.decode("ascii")
