"""Every command of the pages is run: here on a small dataset, by .ci/run, or by the test that is named."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.processes import run_command
from helpers.volumes import write_cases

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = "--steps 2 --save-every 1 --patch 16 16 16 --spacing 2 --depth 2 --width 2 --device cpu"
BY_CI = {  # a command, and what .ci/run says for it
    "python3.11 -m venv .venv": "python3 -m venv",
    ". .venv/bin/activate": "bin/activate",
    "pip install -c constraints.txt -e '.[train]'": "-e '.[dev]'",  # which has all of train and test
    "pip install -c constraints.txt -e '.[test]'": "-e '.[dev]'",
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
    "python -m monai.bundle run": "test_the_bundle_segments_as_predict_does",
    "python -m benchmarks.accuracy.real --hippocampus": "test_the_hippocampus_is_200_of_the_decathlons_cases",
    "python -m benchmarks --suite accuracy --real DIR": "test_a_study_that_extends_runs_what_the_csv_lacks",
    "export nnUNet_extTrainer": "test_the_nnunet_trainer_takes_ignored_patches_as_unlabelled",
    "nnUNetv2_train": "with nnU-Net only; a test has a stand-in",
    "python -m pytest --backend": "rehearsed by .ci/run",
}
INLINE = {  # the same, for commands inside of a sentence
    "python -m benchmarks --suite accuracy": "test_a_study_that_extends_runs_what_the_csv_lacks",
    "python -m benchmarks --suite inference": "test_the_inference_suite_compares_the_ways_to_segment_a_volume",
    "python -m benchmarks --suite norm_act": "test_the_norm_act_suite_compares_with_torch_and_a_copy",
    "python -m benchmarks --suite ops": "test_pytest_benchmark_times_the_ops",
    "python -m benchmarks --suite quality": "test_a_small_run_is_scored_once",
    "python -m benchmarks --suite rank": "test_labels_are_added_to_those_there_are",
    "python -m benchmarks --suite step": "test_the_step_suite_takes_a_step",
    "python -m benchmarks": "test_the_loss_suite_times_a_case",
    "python -m benchmarks.accuracy.nnunet": "test_a_finished_seed_of_nnunet_is_not_repeated",
    "python -m benchmarks.gpu --list": "test_the_page_tells_the_parts_and_their_limits",
    "python -m benchmarks.gpu": "rehearsed by .ci/run",
    "python -m pytest": "its tests are among those that .ci/run runs",
    "python -m sslfast.build": "test_prebuilt_libraries",
    "python -m sslfast.doctor": "test_doctor_says_which_backend_runs_and_why_no_other",
    "python -m sslfast.examples.monai_loop": "test_the_monai_loop_trains",
    "python -m sslfast.plan": "test_a_plan_is_a_run_and_train_makes_the_same",
    "python -m sslfast.predict": "test_the_commands_of_a_page_run_one_after_the_other",
    "python -m sslfast.prepare": "test_cases_sizes_and_axes_are_reported",
    "python -m sslfast.rank": "test_the_unlabelled_scans_of_a_run_are_segmented_once_and_ranked",
    "python -m sslfast.report": "test_the_command_writes_the_page_of_a_folder",
    "python -m sslfast.train": "test_the_commands_of_a_page_run_one_after_the_other",
    "python docs/api.py": "test_the_api_reference_is_that_of_the_docstrings",
    "pip install": "by .ci/run, and seen in a fresh environment",
    "pre-commit install": "it runs what make check runs",
    "make bench": "test_the_loss_suite_times_a_case",
    "make test bench docs": "test_the_loss_suite_times_a_case",
    "make check": "by .ci/run",
    "make fuzz": "test_ops_on_any_input_are_the_references_under_the_sanitizers",
    "make mutants": "test_a_run_tells_what_is_noticed",
    "sslfast train": "test_flags_and_exit_status_are_the_commands",
}
HERE = ("python -m sslfast.", "torchrun ")
RUN_HERE = ["README.md", "docs/first-run.md", "docs/plan.md", "docs/several-gpus.md"]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_inside_a_sentence_is_run_somewhere(page: Path) -> None:
    for command in re.findall(r"`((?:python|make|sslfast|pip|pre-commit|torchrun) [^`]+)`", page.read_text()):
        known = max((start for start in INLINE if f"{command} ".startswith(f"{start} ")), key=len, default=None)
        assert known or command == "python -m", f"nothing runs: {command}"


def test_the_tests_that_run_commands_are_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    tests = {value for value in (*ELSEWHERE.values(), *INLINE.values()) if value.startswith("test_")}
    assert not [test for test in tests if f"def {test}(" not in sources]


@pytest.mark.parametrize("page", RUN_HERE)
def test_the_commands_of_a_page_run_one_after_the_other(page: str, tmp_path: Path) -> None:
    data = write_cases(tmp_path / "DIR", cases=8, labelled=6)
    shutil.copytree(data / "images", tmp_path / "new")
    shutil.copytree(data / "labels", tmp_path / "references")
    for path in tmp_path.glob("new/case_[67]*"):  # those without a reference
        path.unlink()
    ran = [command for command in commands(ROOT / page) if command.startswith(HERE) and command not in BY_CI]
    assert ran
    if page != "README.md":  # whose program has names of the reader's
        programs = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
        ran += [shlex.join([sys.executable, "-c", program]) for program in programs]
    for command in ran:
        trains = "sslfast.train" in command
        small = command.replace("--nproc-per-node=4", "--nproc-per-node=2") + (f" {SMALL}" if trains else "")
        if small.startswith("python -m "):
            run_command(small, tmp_path, OMP_NUM_THREADS="1")
            continue
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
