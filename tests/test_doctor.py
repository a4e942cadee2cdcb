"""The doctor: what runs here, and why not the rest."""

from __future__ import annotations

import pytest

from sslfast.doctor import main


def test_doctor_says_which_backend_runs_and_why_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main([]) == 0
    report = capsys.readouterr().out
    lines = {line.split()[0]: line for line in report.splitlines() if line.startswith("  ")}
    for backend in ("cpu", "reference"):
        assert lines[backend].split()[1] == "available"
    assert "no: no CUDA device" in lines["cuda"]
    assert "no: no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly" in lines["triton"]
    assert "vectors of" in lines["kernels"]
    assert "2." in lines["torch"]
    assert "monai" in lines
