"""The doctor: what runs here, and why not the rest."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from helpers.models import make_model
from sslfast import convolution_check, doctor, kernel_library
from sslfast.doctor import main
from sslfast.options import LAST
from sslfast.training.checkpoint import save_checkpoint

SMALL = ["--patch", "8", "8", "8", "--width", "2", "--depth", "3"]


@pytest.fixture(autouse=True)
def bfloat16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_check, "autocast_dtype", lambda precision, device: torch.bfloat16)


def test_doctor_says_which_backend_runs_and_why_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["--no-convolutions"]) == 0
    report = capsys.readouterr().out
    lines = {line.split()[0]: line for line in report.splitlines() if line.startswith("  ")}
    for backend in ("cpu", "reference"):
        assert lines[backend].split()[1] == "available"
    assert "no: no CUDA device" in lines["cuda"]
    assert "no: no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly" in lines["triton"]
    assert "vectors of" in lines["kernels"]
    assert "2." in lines["torch"]
    assert "monai" in lines
    assert "bf16 convolutions" not in report


def test_doctor_ends_with_the_convolutions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    report = capsys.readouterr().out
    title, *found = report[report.index("bf16 convolutions") :].splitlines()
    assert title == "bf16 convolutions, vnet and resvnet, patch 8 8 8, width 2, depth 3"
    assert found[0].startswith("  CPU            12 shapes agree with float32 (largest error 0.")
    assert found[1] == " " * 17 + "guarded, computed in float32: 3x3x3, 8 to 8 channels, input 4x8x2x2x2"


def test_a_run_is_compared_at_its_own_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path / LAST, {"model": make_model().state()})
    assert main(["--run", str(tmp_path)]) == 0
    assert "vnet and resvnet, patch 8 8 8, width 2, depth 2\n" in capsys.readouterr().out
    assert main(["--run", str(tmp_path / LAST), "--patch", "4", "6", "8"]) == 0
    assert "vnet and resvnet, patch 4 6 8, width 2, depth 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--run absent", "there is no checkpoint absent"),
        ("--patch 20 16 16", "patch 20 16 16, width 16, depth 5: each axis of a patch must be a multiple of 16"),
        ("--patch 0 16 16", "--patch 0 16 16: it must be 1 to 4,096"),
        ("--depth 9", "--depth 9: it must be 2 to 6"),
        ("--width 0", "--width 0: it must be 1 to 256"),
    ],
)
def test_shapes_that_no_run_can_have_are_an_error(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags.split()) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_bfloat16_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(convolution_check, "autocast_dtype", lambda precision, device: None)
    monkeypatch.setattr(convolution_check, "compare", None)
    assert main(SMALL) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "  CPU            bf16 is not used here: --precision auto means fp32"


def test_a_clone_that_is_not_installed_names_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", fails)
    monkeypatch.setattr(doctor, "version", fails)
    assert main(["--no-convolutions"]) == 0
    packages = capsys.readouterr().out.partition("packages\n")[2].partition("\n\n")[0]
    assert packages.splitlines() == [f"  {name:<14} not installed" for name in ("torch", "numpy", "ninja", "triton")]


def test_kernels_that_cannot_be_compiled_or_round_otherwise_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host = kernel_library.host_module()
    facts = {**host.build_facts(), "contracts": True}
    with monkeypatch.context() as changed:
        changed.setattr(host, "build_facts", lambda: facts)
        changed.setattr(kernel_library, "host_module", lambda: host)
        assert main(["--no-convolutions"]) == 0
    assert "with flags that fuse a * b + c: the last bits differ" in capsys.readouterr().out
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert main(["--no-convolutions"]) == 0
    assert f"  kernels        cannot be compiled here: {tmp_path} has no Python.h" in capsys.readouterr().out
