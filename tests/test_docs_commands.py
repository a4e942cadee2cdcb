"""Every command of the pages is run: here on a small dataset, by .ci/run, or by the test that is named."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.volumes import write_cases

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = "--steps 2 --save-every 1 --patch 16 16 16 --spacing 2 --depth 2 --width 2 --device cpu"
BY_CI = {  # a command, and what .ci/run says for it
    "python3.11 -m venv .venv": "python3 -m venv",
    ". .venv/bin/activate": "bin/activate",
    "pip install -c constraints.txt -e '.[train]'": "-e '.[test]'",  # which has all of train
    "pip install -c constraints.txt -e '.[test]'": "pip install -q -c constraints.txt -e '.[test]'",
    "pip install -c constraints.txt -e '.[dev]'": "pip install -q -c constraints.txt -e '.[dev]'",
    "python -m pytest -n auto --dist loadfile": "python -m pytest -n auto --dist loadfile",
    "python -m benchmarks.gpu --rehearse": "python -m benchmarks.gpu --rehearse",
    "make check": "make check",
    "python -m sslfast.train --config benchmarks/demo.yaml --output runs/demo --baseline": "benchmarks/demo.yaml",
}
ELSEWHERE = {  # how a command begins, and what runs it
    "PYTHONPATH=. python -m sslfast.train": "test_the_method_that_the_page_shows_trains",
    "python -m sslfast.build --output build/prebuilt --cuda": "test_the_library_loads_without_a_gpu",
    "SSLFAST_PREBUILT=$PWD/build/prebuilt python3 -m benchmarks.gpu": "on a GPU only; rehearsed by .ci/run",
    "export nnUNet_extTrainer": "test_the_nnunet_trainer_takes_ignored_patches_as_unlabelled",
    "nnUNetv2_train": "with nnU-Net only; a test has a stand-in",
    "python -m pytest --backend": "rehearsed by .ci/run",
}
HERE = ("python -m sslfast.", "torchrun ")
RUN_HERE = ["README.md", "docs/first-run.md", "docs/several-gpus.md"]


def commands(page: Path) -> list[str]:
    """The commands of a page's bash blocks, one a string, without comments."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = re.sub(r"\\\n\s*|(?<=&&)\n", " ", "".join(blocks)).splitlines()
    parts = [part for line in lines for part in line.split("  #")[0].split("&&")]
    return [" ".join(part.split()) for part in parts if part.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_somewhere(page: Path) -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for command in commands(page):
        if command in BY_CI:
            assert BY_CI[command] in ci, command
        else:
            runs_here = HERE if str(page.relative_to(ROOT)) in RUN_HERE else ()
            assert command.startswith((*ELSEWHERE, *runs_here)), f"nothing runs: {command}"


def test_the_tests_that_run_commands_are_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [test for test in ELSEWHERE.values() if test.startswith("test_") and f"def {test}(" not in sources]


@pytest.mark.parametrize("page", RUN_HERE)
def test_the_commands_of_a_page_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    data = write_cases(tmp_path / "DIR", cases=8, labelled=6)
    shutil.copytree(data / "images", tmp_path / "new")
    shutil.copytree(data / "labels", tmp_path / "references")
    for path in tmp_path.glob("new/case_[67]*"):  # those without a reference
        path.unlink()
    ran = [command for command in commands(ROOT / page) if command.startswith(HERE) and command not in BY_CI]
    assert ran
    for command in ran:
        trains = "sslfast.train" in command
        small = command.replace("--nproc-per-node=4", "--nproc-per-node=2") + (f" {SMALL}" if trains else "")
        result = subprocess.run(
            small,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, f"{small}\n{result.stderr[-3000:]}"
