"""`sslfast COMMAND`: what it runs, what it says to wrong names and missing packages, and how fast --help is."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

import sslfast
from sslfast.__main__ import COMMANDS, main
from sslfast.errors import UserError, exit_status
from sslfast.methods.cps import CPS
from sslfast.train import config_class


def test_every_command_has_a_module_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in COMMANDS:
        assert any(line.split()[:1] == [name] for line in lines)
        result = subprocess.run([sys.executable, "-m", "sslfast", name, "--help"], capture_output=True, text=True)
        assert result.returncode == 0
        assert f"python -m sslfast.{name}" in result.stdout


def test_an_error_is_printed_when_the_progress_bar_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        for _ in tqdm(range(2), leave=False):
            raise UserError("what was wrong")

    assert exit_status(command) == 2
    bar, cleared, message = capsys.readouterr().err.rsplit("\r", 2)
    assert "0/2" in bar
    assert cleared.isspace()
    assert message == "error: what was wrong\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/scans"), "error: /scans cannot be used: Permission denied"),
        (
            UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates"),
            "error: 'caf\\udce9' has a character",
        ),
    ],
)
def test_what_the_system_refuses_is_named(error: Exception, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise error

    assert exit_status(command) == 2
    assert capsys.readouterr().err.startswith(message)


def test_an_error_of_no_file_keeps_its_traceback() -> None:
    def command() -> None:
        raise OSError(12, "Cannot allocate memory")

    with pytest.raises(OSError, match="Cannot allocate memory"):
        exit_status(command)


def test_sigterm_clears_away_what_the_command_began(capsys: pytest.CaptureFixture[str]) -> None:
    cleared = []

    def command() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleared.append("the part of a file")

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # other tests leave handlers of their libraries
    try:
        assert exit_status(command) == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cleared == ["the part of a file"]
    assert capsys.readouterr().err == "terminated\n"


def test_flags_and_exit_status_are_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "nowhere", "--output", "run"]) == 2
    assert "--data nowhere is not a folder" in capsys.readouterr().err


def test_an_option_of_another_method_is_named_with_its_owners(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["train", "--data", "nowhere", "--output", str(tmp_path / "run"), "--method", "cps"]
    assert main([*flags, "--temperature", "1"]) == 2
    error = "--temperature is an option of ssl-contrastive, dual-networks, not of --method cps; remove it"
    assert error in capsys.readouterr().err
    (tmp_path / "old.yaml").write_text("memory: 30000\n")
    assert main([*flags, "--config", str(tmp_path / "old.yaml")]) == 2
    assert "--memory is an option of u2pl, not of --method cps" in capsys.readouterr().err


def test_the_config_of_a_run_serves_another_method_without_its_options() -> None:
    values = {"method": "ssl-contrastive", "ramp": 1.0, "anchors": 9, "steps": 7}
    chosen, kept = config_class(values, ["--method", "cps"])
    assert kept == {"method": "ssl-contrastive", "steps": 7}  # the flag wins
    assert chosen("demo", Path("run")).options == CPS.Options(ramp=0.6)
    assert config_class(values, [])[1] == values


def test_without_a_flag_the_missing_ones_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "--output" in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", [":X", ".m:X", "m:"])
def test_a_method_without_module_or_class_gets_the_list(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", "nowhere", "--output", str(tmp_path / "run"), "--method", name]) == 2
    assert f"--method {name}: choose one of supervised," in capsys.readouterr().err


def test_help_lists_the_options_of_the_method_that_is_named_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for method in (None, "cps", "u2pl"):
        for flags in [["--method", method], [f"--method={method}"]] if method else [[]]:
            with pytest.raises(SystemExit):
                main(["train", "--help", *flags])
            shown[method] = capsys.readouterr().out
            assert ("--consistency-weight" in shown[method]) == (method == "cps")
    assert "--consistency-weight" in shown["cps"]
    assert "--memory " in shown["u2pl"]
    assert "--consistency-weight" not in shown["u2pl"] + shown[None]
    assert "--memory " not in shown["cps"] + shown[None]


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
