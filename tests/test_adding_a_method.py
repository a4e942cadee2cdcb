"""docs/adding-a-method.md: the method that it shows is short and trains."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from helpers.options import ROOT
from helpers.processes import run_python
from helpers.training import SMALL, log_rows
from helpers.volumes import write_cases


def test_the_method_that_the_page_shows_trains(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adding-a-method.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 45
    data = write_cases(tmp_path / "data", cases=6, labelled=4)
    (tmp_path / "my_method.py").write_text(code)
    command = ["-m", "sslfast.train", "--method", "my_method:EntropyMinimisation", "--steps", "3"]
    command += ["--entropy-weight", "0.2", "--data", str(data), "--output", str(tmp_path / "run"), *SMALL]
    run_python(*command, cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["entropy_weight"] == 0.2
    assert all(0 < float(row["entropy_a"]) < 0.7 for row in log_rows(tmp_path / "run"))
