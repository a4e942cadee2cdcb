"""The study's arithmetic, on results that are known."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.accuracy.runs import (
    PROVENANCE,
    VARIANTS,
    Result,
    Trial,
    case_dice,
    fingerprint,
    read_rows,
    read_run,
    run,
    settings_of,
    write_rows,
)
from benchmarks.accuracy.study import BENCHMARKS, AccuracyConfig, study
from benchmarks.accuracy.tables import (
    ALL_LABELS,
    Scores,
    ablation_table,
    collect,
    draw_curves,
    interval,
    methods_table,
    p_value,
)
from benchmarks.report import RESULTS
from sslfast import UserError
from sslfast.data.demo.cohorts import COHORTS

METHODS: tuple[str, ...] = ("supervised", "cps", "as-released")
DICE = {
    ("supervised", 2): 0.4,
    ("supervised", 4): 0.5,
    ("supervised", ALL_LABELS): 0.9,
    ("cps", 2): 0.6,
    ("cps", 4): 0.7,
}


SETTINGS = {method: fingerprint(method, {"data": "nowhere"}) for method in METHODS}


@pytest.fixture
def finished(tmp_path: Path) -> tuple[list[Trial], Path]:
    """Two seeds of runs. Test cases differ by 0.01, the two classes by 0.2; the best checkpoint is 0.05 better."""
    trials = []
    for method, labeled in (*((m, n) for n in (2, 4) for m in METHODS), ("supervised", ALL_LABELS)):
        for seed in (1, 2):
            trial = Trial("demo", method, labeled, seed)
            trials.append(trial)
            mean = DICE.get((method, labeled), 0.3)
            for folder, more in (("test", 0.0), ("test_best", 0.05)):
                rows = [
                    {"case": f"case_{i}", "class": c, "dice": mean + more + 0.01 * (i - 3.5) + 0.1 * side}
                    for i in range(8)
                    for c, side in ((1, -1), (2, 1))
                ]
                path = trial.folder(tmp_path, SETTINGS[trial.method]) / folder / "metrics.json"
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps({"rows": rows}))
            (trial.folder(tmp_path, SETTINGS[trial.method]) / PROVENANCE).write_text("yesterday")
    return trials, tmp_path


@pytest.fixture
def results(finished: tuple[list[Trial], Path]) -> dict[Trial, Result]:
    trials, output = finished
    return {trial: read_run(trial.folder(output, SETTINGS[trial.method]), SETTINGS[trial.method]) for trial in trials}


def test_the_table(results: dict[Trial, Result]) -> None:
    scores = {key[1:]: value for key, value in collect(results).items()}
    assert scores["cps", 4].last.shape == (2, 8)
    assert scores["cps", 4].last[0, 0] == pytest.approx(0.665)
    assert results[Trial("demo", "cps", 4, 1)].best == pytest.approx(0.75)
    head, _, *rows = methods_table(scores, METHODS, (2, 4))
    columns = [c.strip() for c in head.strip("| ").split("|")]
    cells = {row.split("|")[1].strip(): [c.strip() for c in row.strip("| ").split("|")] for row in rows}
    cps = dict(zip(columns, cells["`cps`"], strict=True))
    assert cps["2 labels"].startswith("0.600 [")
    assert cps["4 labels, validation-best"] == "0.750"
    assert cps["gain over supervised-4"] == "+0.200 [+0.200, +0.200]"
    assert cps["share of the gap"] == "50%"
    assert float(cps["p against as-released"]) < 0.05
    assert cells["`supervised`"][-1].startswith("0.0")


def test_the_table_of_the_ablation() -> None:
    dice = np.linspace(0.5, 0.6, 24).reshape(3, 8)
    names = [name for method, variants in VARIANTS.items() for name in (method, *variants)]
    rows = {(name, 4): Scores(dice - 0.01 * i, dice.mean(1)) for i, name in enumerate(names)}
    assert len(rows) == len(names), "two settings have one name"
    lines = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in ablation_table(rows, VARIANTS)[2:]]
    assert [cells[0] for cells in lines] == names
    assert lines[0][2:] == ["–", "–"]
    assert lines[3][2].startswith("-0.030 [-0.030")
    assert lines[-1][2].startswith("-0.010 [-0.010"), "against its own method"
    best = names[5]
    rows[best, 4] = rows[best, 4]._replace(last=dice + 0.1)
    found = ablation_table(rows, VARIANTS)
    assert found[2].startswith("| `ssl-contrastive` |"), "what the variants change comes first"
    assert found[3].startswith(f"| {best} |"), "then the best"


def test_the_committed_tables_are_those_of_the_committed_runs(tmp_path: Path) -> None:
    shutil.copyfile(RESULTS / "accuracy.csv", tmp_path / "accuracy.csv")
    for name, ablation in (("accuracy.md", False), ("accuracy-ablation.md", True)):
        study(AccuracyConfig(ablation=ablation, name=str(tmp_path / "accuracy"), tables_only=True))
        made, committed = (
            [line for line in (folder / name).read_text().splitlines() if line.startswith("|")]
            for folder in (tmp_path, RESULTS)
        )
        assert made == committed


def test_a_variant_changes_its_own_settings() -> None:
    own = {"demo": {"data": "demo"}}
    of = {v: settings_of(Trial("demo", "ssl-contrastive", 4, 1, v), own) for v in ("", *VARIANTS["ssl-contrastive"])}
    assert of[""] == own["demo"]
    assert of["no contrast"] == {**own["demo"], "contrast_weight": 0.0}
    assert of["percentile 80"] == {**own["demo"], "percentile": [80, 80]}


def test_the_ablation_never_sees_the_test_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[Trial, dict[str, object]] = {}

    def stop(trials: dict[Trial, dict[str, object]], *_: object) -> None:
        asked.update(trials)
        raise UserError("enough")

    monkeypatch.setattr(sys.modules[study.__module__], "run", stop)
    with pytest.raises(UserError, match="enough"):
        study(AccuracyConfig(ablation=True, augment="affine", steps=7))
    assert {(t.cohort, own["data"]) for t, own in asked.items()} == {
        (name, name) for name in ("demo-tuning", "demo-brain-tuning")
    }
    assert {(own["augment"], own["steps"]) for own in asked.values()} == {("affine", 7)}
    assert {t.variant for t in asked if t.method == "ssl-contrastive"} == {"", *VARIANTS["ssl-contrastive"]}
    asked.clear()
    with pytest.raises(UserError, match="enough"):
        study(AccuracyConfig(ablation=True, variants=("no views",)))
    assert {(t.method, t.variant) for t in asked} == {("ssl-contrastive", ""), ("ssl-contrastive", "no views")}


def test_a_fingerprint_tells_settings_and_cohorts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint("cps", {"data": "demo"})
    assert first == fingerprint("cps", {"data": "demo"})
    assert first != fingerprint("cps", {"data": "demo", "steps": 1})
    cohort = COHORTS["demo"]
    monkeypatch.setitem(COHORTS, "demo", replace(cohort, parameters=replace(cohort.parameters, test=1)))
    assert first != fingerprint("cps", {"data": "demo"})


def test_a_class_that_a_case_lacks_is_left_out(tmp_path: Path) -> None:
    rows = [{"case": "a", "class": 1, "dice": 0.5}, {"case": "a", "class": 2, "dice": float("nan")}]
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": rows}))
    assert case_dice(tmp_path) == {"a": 0.5}


def test_interval_and_p() -> None:
    random = np.random.default_rng(1)
    dice = random.normal(0.8, 0.05, (3, 200))
    low, high = interval(dice)
    assert low < dice.mean() < high
    assert 0.004 < high - low < 0.05
    assert p_value(dice, dice) == 1
    assert p_value(dice, dice + 0.1) < 1e-10


def test_rows_and_curves(results: dict[Trial, Result], tmp_path: Path) -> None:
    write_rows(results, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results)
    last = [float(rows[0][f"case {i + 1}"]) for i in range(8)]
    assert float(rows[0]["best"]) == pytest.approx(np.mean(last) + 0.05)
    assert rows[0]["made"] == "yesterday"
    again = read_rows(tmp_path / "rows.csv")
    assert {t: r.settings for t, r in again.items()} == {t: r.settings for t, r in results.items()}
    for key, scores in collect(again).items():
        for one, two in zip(scores, collect(results)[key], strict=True):
            np.testing.assert_allclose(np.sort(one, 0), np.sort(two, 0), atol=1e-5)
    draw_curves(collect(results), METHODS, (2, 4), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_that_extends_runs_what_the_csv_lacks(
    results: dict[Trial, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[study.__module__]
    missing: list[Trial] = []
    monkeypatch.setattr(module, "run", lambda trials, *_: missing.extend(trials))
    methods, labeled, seeds = METHODS, (2, 4), (1, 2)
    output = tmp_path / "none"
    name = str(tmp_path / "study")
    settings_file = BENCHMARKS / "demo.yaml"
    config = AccuracyConfig(
        (settings_file,), methods, labeled, seeds, scale="as-is", output=output, name=name, extend=True
    )
    settings = {"demo": yaml.safe_load(settings_file.read_text())}
    own = {t: r._replace(settings=fingerprint(t.method, settings_of(t, settings))) for t, r in results.items()}
    stranger = Trial("elsewhere", "cps", 4, 1)
    write_rows({**own, stranger: next(iter(own.values()))}, tmp_path / "study.csv")
    study(config)
    assert not missing
    assert "50%" in (tmp_path / "study.md").read_text()
    assert stranger in read_rows(tmp_path / "study.csv")
    stale = Trial("demo", "cps", 4, 1)
    write_rows({**own, stale: own[stale]._replace(settings="of old")}, tmp_path / "study.csv")
    with pytest.raises(FileNotFoundError):  # run is not the real one
        study(config)
    assert missing == [stale]
    missing.clear()
    page = (tmp_path / "study.md").read_text()
    (tmp_path / "study.md").unlink()
    study(replace(config, tables_only=True))
    assert not missing
    assert (tmp_path / "study.md").read_text() == page
    assert page.endswith("Seeds 1 2. yesterday.\n")
    with pytest.raises(UserError, match="lacks runs"):
        study(replace(config, tables_only=True, seeds=(1, 2, 3)))
    with pytest.raises(FileNotFoundError):
        study(replace(config, extend=False))
    assert set(missing) == set(own), "what is not asked to extend measures anew"


def test_finished_runs_are_not_repeated_and_a_failing_one_is_named(finished: tuple[list[Trial], Path]) -> None:
    trials, output = finished
    run({trial: {"data": "nowhere"} for trial in trials}, output, 2)
    with pytest.raises(UserError, match=rf"cps-4-9-{SETTINGS['cps']}/output\.txt"):
        run({Trial("demo", "cps", 4, 9): {"data": "nowhere"}}, output, 2)
    assert "nowhere" in (output / "demo" / f"cps-4-9-{SETTINGS['cps']}" / "output.txt").read_text()
    with pytest.raises(UserError):  # other settings: not the run that is finished
        run({trials[0]: {"data": "nowhere", "steps": 1}}, output, 2)
