"""`sslfast COMMAND`: what it runs, what it says to a wrong name and without the trainer's packages, how soon --help is there."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

import sslfast
from sslfast.__main__ import COMMANDS, main


def test_every_command_has_a_module_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        assert any(line.split()[:1] == [name] for line in lines)
        result = subprocess.run([sys.executable, "-m", "sslfast", name, "--help"], capture_output=True, text=True)
        assert result.returncode == 0
        assert f"python -m sslfast.{name}" in result.stdout


def test_flags_and_exit_status_are_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "nowhere", "--output", "run"]) == 2
    assert "--data nowhere is not a folder" in capsys.readouterr().err


def test_a_wrong_name_gets_the_nearest_and_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "there is no command 'trian'. Did you mean train?" in error
    assert "prepare" in error
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sslfast {sslfast.__version__}\n"


def test_without_the_trainers_packages_the_remedy_is_named() -> None:
    code = "import sys; sys.modules['tyro'] = None; from sslfast.__main__ import main; sys.exit(main(['train']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "error: sslfast train: tyro is not installed; the trainer and its commands need: pip install 'sslfast[train]'\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_takes_less_than_a_second_of_the_processor(command: str) -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, "-m", f"sslfast.{command}", "--help"], capture_output=True, check=True)
    assert spent() - before < 1


def test_an_old_name_is_answered_with_the_new_one() -> None:
    with pytest.raises(AttributeError, match=r"sslfast\.taught_view is called sslfast\.teacher_view"):
        sslfast.taught_view  # noqa: B018
