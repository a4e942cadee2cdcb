"""The benchmarks run, with the smallest inputs; what they measure is not judged."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from benchmarks import inference, loss, norm_act, step
from benchmarks.cases import HEAD, NORMS, OPS, STEP_WITH_TEACHER, Case
from benchmarks.report import RESULTS, write
from benchmarks.timing import Spread, for_seconds, take_turns
from sslfast.options import Norm

ROOT = Path(__file__).parents[2]
SMALL = "small,2,4,fp32"


def test_runs_take_turns_after_one_round_to_warm_up() -> None:
    order: list[str] = []

    def run(name: str, numbers: count[int]) -> int:
        order.append(name)
        return next(numbers)

    runs: dict[str, Callable[[], int]] = {name: partial(run, name, count()) for name in "ab"}
    assert take_turns(runs, range(2)) == {"a": [1, 2], "b": [1, 2]}
    assert order == [*"ababab"]
    assert list(for_seconds(0)) == [0, 1, 2]
    assert Spread.of([1, 2, 3, 4, 5]) == (3, 2)


def test_results_are_written_with_what_they_were_made_with(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Row:
        name: str
        peak_mb: float | None

    page = write(str(tmp_path / "results"), [Row("a|b", 1234.5), Row("c", None)], "A note.")
    assert page == (tmp_path / "results.md").read_text()
    head, _, first, second, _, note = page.splitlines()
    assert (head, first, second) == ("| name | peak MB |", "| a\\|b | 1234 |", "| c |  |")
    assert all(word in note for word in ("commit ", "threads", "torch 2.", "Python 3.", "A note."))
    with open(tmp_path / "results.csv", newline="") as file:
        assert [*csv.reader(file)] == [["name", "peak_mb"], ["a|b", "1234.5"], ["c", ""]]


def test_no_result_is_large() -> None:
    assert not [path.name for path in RESULTS.iterdir() if path.stat().st_size > 200_000]


def test_pytest_benchmark_times_the_ops(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "benchmarks", "--suite", "ops", "--case", SMALL, "--rounds", "1", "--no-memory"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [*command, "--name", tmp_path / "ops"], cwd=ROOT, env=alone, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "ops.md").read_text() in result.stdout
    with open(tmp_path / "ops.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert {(row["op"], row["implementation"]) for row in rows} >= {
        (op, of) for op in OPS for of in ("eager", "sslfast")
    }
    for row in rows:
        has_gradient = row["op"] not in ("reliability", "class_prototypes", "sample_voxels")
        assert float(row["forward_ms"]) > 0
        assert bool(row["backward_ms"]) == has_gradient


@pytest.mark.parametrize("op", [HEAD, STEP_WITH_TEACHER])
def test_the_loss_suite_times_a_case(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "in_own_process", lambda *_: 1.0)
    monkeypatch.setattr(
        loss, "implementations", lambda *of: {k: v for k, v in implementations(*of).items() if "compile" not in k}
    )
    implementations = sys.modules["benchmarks.cases"].implementations
    rows = loss.time_case(op, Case.parse(SMALL), "channels-last", 0, 1e10)
    assert rows[-1].implementation == "sslfast"
    assert rows[-1].times_slower == 1
    assert all(row.forward_ms > 0 and row.backward_ms > 0 for row in rows)


def test_the_inference_suite_compares_the_ways_to_segment_a_volume(tmp_path: Path) -> None:
    config = inference.InferenceConfig((32, 32, 24), (16, 16, 16), width=2, rounds=1, name=str(tmp_path / "inference"))
    inference.measure(config)
    published, fp32, bf16 = csv.DictReader((tmp_path / "inference.csv").open())
    assert float(published["percent_equal_argmax"]) == 100
    assert float(fp32["percent_equal_argmax"]) > 99.9
    assert float(bf16["percent_equal_argmax"]) > 90
    assert (tmp_path / "inference.md").read_text().count("sslfast, ") == 2


def test_the_norm_act_suite_compares_with_torch_and_a_copy(tmp_path: Path) -> None:
    config = norm_act.NormActConfig(0.0, ((2, 3, 4, 5, 6),), str(tmp_path / "norm_act"))
    norm_act.measure(config)
    rows = list(csv.DictReader((tmp_path / "norm_act.csv").open()))
    assert len(rows) == 6
    assert all(float(row["forward_percent_of_copy"]) > 0 and float(row["torch_backward_ms"]) > 0 for row in rows)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", step.IMPLEMENTATIONS)
def test_the_step_suite_takes_a_step(name: str, norm: Norm, tmp_path: Path) -> None:
    config = step.StepConfig(patch=(16, 16, 16), width=2, depth=2)
    parts = step.IMPLEMENTATIONS[name](config, tmp_path, norm)()
    assert parts.pop("seconds") == pytest.approx(sum(parts.values()))
    assert min(parts.values()) > 0
