"""Which scans to label next: the order, and the command on a small run."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from helpers.training import train
from helpers.volumes import write_cases, write_volume
from sslfast.rank import main
from sslfast.ranking import TABLE, rank_scans

NAN = math.nan


def rows(**agreement: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """Of each case the agreement on the classes a, b, …"""
    return {case: {f"agreement {of}": value for of, value in zip("abc", of)} for case, of in agreement.items()}


def test_without_chance_the_least_agreement_comes_first() -> None:
    ranked = rank_scans(rows(w=(0.9,), x=(0.2,), y=(0.5,), z=(0.95,)), ["a"], math.inf)
    assert [one.case for one in ranked] == ["x", "y", "w", "z"]
    assert ranked[0] == ("x", "a", 0.2)


def test_classes_take_turns_and_the_hardest_begins() -> None:
    given = rows(w=(0.9, 0.3), x=(0.5, 0.2), y=(0.6, 0.1), z=(0.95, 0.25))
    ranked = rank_scans(given, ["a", "b"], math.inf)
    assert [(one.case, one.class_name) for one in ranked] == [("y", "b"), ("x", "a"), ("z", "b"), ("w", "a")]


def test_what_is_drawn_follows_the_scores_to_the_power_of_beta() -> None:
    agreement = np.array([0.2, 0.4, 0.6, 0.8])
    given = rows(**{name: (value,) for name, value in zip("wxyz", agreement.tolist())})
    z = np.log(1 - agreement)
    z = (z - z.mean()) / z.std()
    for beta in (0.0, 1.5):
        first = [rank_scans(given, ["a"], beta, seed)[0].case for seed in range(4000)]
        expected = np.exp(beta * z) / np.exp(beta * z).sum()
        assert [first.count(case) / 4000 for case in "wxyz"] == pytest.approx(expected, abs=0.03)


def test_a_structure_that_both_miss_is_the_hardest_if_every_scan_has_it_and_else_the_easiest() -> None:
    given = rows(w=(0.9,), x=(NAN,), y=(0.5,))
    assert [one.case for one in rank_scans(given, ["a"], math.inf, expected=["a"])] == ["x", "y", "w"]
    assert rank_scans(given, ["a"], math.inf)[0].case == "y"
    assert {rank_scans(given, ["a"], 0, seed)[0].case for seed in range(30)} == {"w", "x", "y"}
    nothing = rank_scans(rows(w=(NAN, 0.1), x=(NAN, 0.2)), ["a", "b"], 2)
    assert [one.class_name for one in nothing] == ["b", "a"]
    assert math.isnan(nothing[1].agreement)
    assert rank_scans({}, ["a"], 2) == []


def test_the_order_depends_on_the_seed_alone() -> None:
    random = np.random.default_rng(1)
    given = rows(**{f"case{i}": (value,) for i, value in enumerate(random.uniform(size=20).tolist())})
    backwards = dict(reversed(given.items()))
    assert rank_scans(given, ["a"], 1, 3) == rank_scans(backwards, ["a"], 1, 3) != rank_scans(given, ["a"], 1, 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two labelled and three unlabelled cases, in the folder of its data."""
    folder = tmp_path_factory.mktemp("rank")
    data = write_cases(folder / "data", cases=5, labelled=2)
    assert train(data, folder / "run", "--steps", 2) == 0
    return folder


def test_the_unlabelled_scans_of_a_run_are_segmented_once_and_ranked(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained / "run"), "--count", "2"]) == 0
    said = capsys.readouterr().out.splitlines()
    folder = trained / "run" / "unlabelled"
    with open(folder / TABLE, newline="") as file:
        table = [*csv.DictReader(file)]
    assert sorted(row["case"] for row in table) == ["case_2", "case_3", "case_4"]
    assert {Path(row["image"]).parent for row in table} == {trained / "data" / "images"}
    assert all((folder / f"{row['case']}.nii.gz").exists() for row in table)
    assert said[:2] == [f"3 segmentations in {folder}", str(folder / TABLE)]
    assert len(said) == 4
    assert said[2].split()[:2] == ["1", f"{table[0]['case']}:"]
    assert main([str(trained / "run"), "--count", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"3 of 3 segmentations are in {folder} already"
    assert main([str(trained / "run"), "--beta", "0", "--seed", "5"]) == 0


def test_a_scan_that_has_a_label_by_now_is_not_ranked(trained: Path, tmp_path: Path) -> None:
    for name in ("data", "run"):
        shutil.copytree(trained / name, tmp_path / name, ignore=shutil.ignore_patterns("unlabelled"))
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace(str(trained / "data"), str(tmp_path / "data")))
    write_volume(tmp_path / "data" / "labels" / "case_3.nii.gz", np.ones((20, 18, 16), np.uint8))
    (tmp_path / "data" / "labels" / "case_1.nii.gz").unlink()  # it was in training
    assert main([str(tmp_path / "run")]) == 0
    with open(tmp_path / "run" / "unlabelled" / TABLE, newline="") as file:
        assert sorted(row["case"] for row in csv.DictReader(file)) == ["case_2", "case_4"]


def test_other_scans_are_ranked_where_the_data_is_gone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("unlabelled"))
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace(str(trained / "data"), "/nowhere"))
    write_cases(tmp_path / "new", cases=2, labelled=0)
    (tmp_path / "new" / "images" / "broken.nii.gz").write_bytes(b"no volume")
    assert main([str(tmp_path / "run"), "--images", str(tmp_path / "new" / "images")]) == 2
    printed = capsys.readouterr()
    assert "broken.nii.gz" in printed.err
    assert "1 of 3 volumes could not be segmented" in printed.err
    assert "case_1: the networks agree to" in printed.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{run}/nothing"], "does not say how many scans were labelled"),
        (["{run}/nothing", "--beta", "1"], "there is no checkpoint"),
        (["{run}", "--images", "{data}/images", "--output", "{data}/images"], "is a folder of the dataset"),
        (["{run}", "--output", "{data}/images"], "is a folder of the dataset"),
        (["{run}", "--images", "{data}/nothing"], "is no volume that can be read"),
        (["{run}", "--beta", "-1"], "--beta"),
        (["{run}", "--output", "{data}/labels"], "is a folder of the dataset"),
        (["{run}", "--output", "{foreign}"], "rank.csv is not of this command, and would be replaced"),
        (["{all}"], "{all} has no unlabelled scan; give --images DIR"),
    ],
)
def test_what_cannot_be_ranked_is_answered(
    trained: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {name: str(trained / name) for name in ("run", "data", "all", "foreign")}
    (trained / "foreign").mkdir(exist_ok=True)
    (trained / "foreign" / "rank.csv").write_text("mine")
    if "{all}" in flags and not (trained / "all").exists():
        assert train(write_cases(trained / "few", cases=2, labelled=2), trained / "all", "--steps", 1) == 0
    assert main([flag.format(**words) for flag in flags]) == 2
    assert message.format(**words) in capsys.readouterr().err


def test_a_checkpoint_alone_does_not_say_what_is_unlabelled(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = trained / "run" / "checkpoint_last.pt"
    assert main([str(checkpoint), "--beta", "1"]) == 2
    assert f"{checkpoint} holds no run, for it has no config.yaml" in capsys.readouterr().err
