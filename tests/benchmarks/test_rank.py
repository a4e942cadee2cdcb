"""The benchmark of the ranking: which cases get labels, and a small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import rank
from benchmarks.accuracy import cohorts
from benchmarks.accuracy.runs import read_rows
from benchmarks.rank import RankBenchmarkConfig
from helpers.volumes import write_cases


def training_of(folder: Path) -> list[str]:
    names: list[str] = json.loads((folder / "dataset.json").read_text())["training"]
    return names


def test_labels_are_added_to_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_cases(tmp_path / "real" / "hippocampus", cases=10, labelled=10)
    names = [f"case_{i}" for i in range(10)]
    parts = {"training": names[:7], "validation": names[7:8], "test": names[8:]}
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "x"}, **parts}))
    small = cohorts.REAL["hippocampus"].settings | {"patch": [16, 16, 16], "depth": 2, "width": 2, "spacing": 2}
    monkeypatch.setitem(cohorts.COHORTS, "hippocampus", cohorts.REAL["hippocampus"]._replace(settings=small))
    config = RankBenchmarkConfig(
        tmp_path / "real", ("hippocampus",), (1, 2), (1,), 2, 1, tmp_path / "runs", str(tmp_path / "rank")
    )
    rank.simulate(config)

    runs = {(t.variant, t.labeled): r for t, r in read_rows(tmp_path / "rank.csv").items()}
    assert sorted(runs) == [("", 1), ("random", 2), ("ranked", 2)]
    text = (tmp_path / "rank.md").read_text()
    assert text.count("| ranked |") == text.count("| random |") == text.count("| first cases |") == 1
    made = tmp_path / "runs" / "small" / "hippocampus"
    first, ranked, random = (next(made.glob(f"ssl-contrastive-{of}-1-*")) for of in ("1", "ranked-2", "random-2"))
    chosen = (first / "unlabelled" / "rank.csv").read_text().splitlines()[1].split(",")[1]
    assert training_of(data_of(ranked))[:2] == [names[0], chosen]
    assert training_of(data_of(random))[0] == names[0]
    more = rank.add_labels(data_of(random), 2, 2, random, "random", 1, tmp_path / "more")
    assert training_of(more)[:2] == training_of(data_of(random))[:2]
    assert sorted(training_of(more)) == names[:7]

    written = {path: path.stat().st_mtime_ns for path in made.glob("*/checkpoint_last.pt")}
    rank.simulate(config)
    assert {path: path.stat().st_mtime_ns for path in made.glob("*/checkpoint_last.pt")} == written
    assert (tmp_path / "rank.md").read_text() == text


def data_of(run: Path) -> Path:
    """The --data of a run."""
    line = next(line for line in (run / "config.yaml").read_text().splitlines() if line.startswith("data: "))
    return Path(line.removeprefix("data: "))
