"""The study's arithmetic, on results that are known."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy.cohorts import COHORTS as STUDIED
from benchmarks.accuracy.cohorts import STRESS, locate
from benchmarks.accuracy.runs import (
    PROVENANCE,
    SECONDS,
    VARIANTS,
    Result,
    Trial,
    case_dice,
    fingerprint,
    read_rows,
    read_run,
    run,
    settings_of,
    training_seconds,
    write_rows,
)
from benchmarks.accuracy.study import AccuracyConfig, cohort_settings, methods_trials, study
from benchmarks.accuracy.tables import (
    BASELINE,
    DEFAULT,
    Scores,
    ablation_table,
    collect,
    draw_curves,
    interval,
    methods_table,
    p_value,
)
from benchmarks.report import RESULTS
from helpers.volumes import write_cases
from sslfast import UserError
from sslfast.data.demo.cohorts import COHORTS
from sslfast.data.folder import open_dataset

METHODS: tuple[str, ...] = ("supervised", "cps", "ssl-contrastive")
ALL_LABELS = STUDIED["demo"].training
DICE = {
    ("supervised", 2): 0.4,
    ("supervised", 4): 0.5,
    ("supervised", ALL_LABELS): 0.9,
    ("cps", 2): 0.6,
    ("cps", 4): 0.7,
    ("ssl-contrastive", 4): 0.8,
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
            (trial.folder(tmp_path, SETTINGS[trial.method]) / SECONDS).write_text(str(60 * seed))
    return trials, tmp_path


@pytest.fixture
def results(finished: tuple[list[Trial], Path]) -> dict[Trial, Result]:
    trials, output = finished
    return {trial: read_run(trial.folder(output, SETTINGS[trial.method]), SETTINGS[trial.method]) for trial in trials}


def test_the_table(results: dict[Trial, Result]) -> None:
    results.pop(Trial("demo", "cps", 4, 1))  # the other methods have fewer seeds
    scores = collect(results)["demo"]
    assert scores["supervised", 4].last.shape == (2, 8)
    assert scores["cps", 4].last[0, 0] == pytest.approx(0.665)
    assert results[Trial("demo", "cps", 4, 2)].best == pytest.approx(0.75)
    head, _, *rows = methods_table(scores, (2, 4), ALL_LABELS)
    columns = [c.strip() for c in head.strip("| ").split("|")]
    table = [dict(zip(columns, (c.strip(" `") for c in row.strip("| ").split("|")), strict=True)) for row in rows]
    cells = {(int(row["labels"]), row["method"]): row for row in table}
    cps = cells[4, "cps"]
    assert cps["seeds"] == "1"
    assert cps["Dice"].startswith("0.700 [")
    assert cps["validation-best"] == "0.750"
    assert cps["gain over supervised"] == "+0.200 [+0.200, +0.200]"
    assert cps["worst seed's gain"] == cps["difficult third's gain"] == "+0.200"
    assert cps["share of the gap"] == "50%"
    assert float(cps["p against ssl-contrastive"]) < 0.05
    assert (cps["min a run"], cells[4, "supervised"]["min a run"]) == ("2.0", "1.0")
    assert [row["method"] for row in table if row["labels"] == "4"] == ["ssl-contrastive", "cps", "supervised"]
    assert cells[ALL_LABELS, "supervised"]["Dice"].startswith("0.900")


def test_the_table_says_what_the_difficult_cases_gain() -> None:
    few = Scores((1, 2), np.array([[0.2, 0.8, 0.3, 0.9, 0.9, 0.9]] * 2), np.array([0.6, 0.6]), 9)
    default = few._replace(last=few.last + np.array([0.1, 0.0, 0.3, 0.0, 0.0, 0.05]))
    rows = methods_table({(BASELINE, 4): few, (DEFAULT, 4): default}, (4,), 40)
    assert "| +0.200 |" in rows[2], "the mean of the cases of 0.2 and 0.3"


def test_the_time_of_a_training_holds_no_pause(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,seconds,validation_dice\n0,9.0,\n10,0.5,\n10,,0.7\n20,0.25,\n29,0.5,0.8\n")
    assert training_seconds(tmp_path) == 30 * 0.5


def test_the_table_of_the_ablation() -> None:
    dice = np.linspace(0.5, 0.6, 24).reshape(3, 8)
    names = [name for method, variants in VARIANTS.items() for name in (method, *variants)]
    rows = {(name, 4): Scores((1, 2, 3), dice - 0.01 * i, dice.mean(1), 9) for i, name in enumerate(names)}
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


@pytest.mark.parametrize("name", sorted({p.stem for p in RESULTS.glob("accuracy*.csv")} - {"accuracy-nnunet"}))
def test_the_committed_tables_are_those_of_the_committed_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.csv").write_text((RESULTS / f"{name}.csv").read_text())
    kind = {"stress": name == "accuracy-stress", "ablation": name not in ("accuracy", "accuracy-stress")}
    trials = read_rows(RESULTS / f"{name}.csv")
    if kind["ablation"]:
        kind |= {"variants": tuple({trial.variant for trial in trials} - {""})}
        kind |= {"labeled": tuple({trial.labeled for trial in trials})}
    cohorts = tuple(cohort for cohort in STUDIED if cohort in {trial.cohort for trial in trials})
    seeds = tuple(sorted({trial.seed for trial in trials}))
    few = len({trial.seed for trial in trials if (trial.variant or trial.method) not in (BASELINE, DEFAULT)})
    chosen = {"cohorts": cohorts, "seeds": seeds, "few_seeds": few}
    study(AccuracyConfig(**chosen, name=str(tmp_path / name), tables_only=True, **kind))
    made, committed = (
        [line for line in (folder / f"{name}.md").read_text().splitlines() if line.startswith("|")]
        for folder in (tmp_path, RESULTS)
    )
    assert made == committed


def test_a_variant_changes_its_own_settings() -> None:
    own = {"demo": {"data": "demo"}}
    of = {v: settings_of(Trial("demo", "ssl-contrastive", 4, 1, v), own) for v in ("", *VARIANTS["ssl-contrastive"])}
    assert of[""] == own["demo"]
    assert of["contrast"] == {**own["demo"], "contrast_weight": 0.1}
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
        (name, f"{name}-tuning") for name in ("demo", "demo-brain")
    }
    assert {(own["augment"], own["steps"]) for own in asked.values()} == {("affine", 7)}
    assert {t.variant for t in asked if t.method == "ssl-contrastive"} == {"", *VARIANTS["ssl-contrastive"]}
    asked.clear()
    with pytest.raises(UserError, match="enough"):
        study(AccuracyConfig(ablation=True, variants=("no views",)))
    assert {(t.method, t.variant) for t in asked} == {("ssl-contrastive", ""), ("ssl-contrastive", "no views")}


def test_a_real_cohort_is_tuned_without_its_test_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLFAST_CACHE", str(tmp_path / "cache"))
    root = write_cases(tmp_path / "la_1.25mm", cases=24, labelled=24)
    names = [path.name.removesuffix(".nii.gz") for path in sorted((root / "images").iterdir())]
    parts = {"training": names[:18], "validation": names[18:22], "test": names[22:]}
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "x"}, **parts}))
    assert locate("la_1.25mm", tmp_path) == str(root)
    tuned = open_dataset(Path(locate("la_1.25mm-tuning", tmp_path)))
    assert [case.name for case in tuned.training] == names[:4]
    assert sorted(case.name for case in (*tuned.validation, *tuned.test)) == names[4:22]
    with pytest.raises(UserError, match="--real DIR"):
        locate("hippocampus", tmp_path)
    with pytest.raises(UserError, match="--real DIR"):
        locate("hippocampus", None)


def test_every_method_has_the_seeds_and_labels_of_its_cohort() -> None:
    config = AccuracyConfig(cohorts=("la", "demo"), seeds=(1, 2, 3, 4), few_seeds=2)
    trials = methods_trials(config, cohort_settings(config))
    assert len(trials) == len({*trials})
    counts = {(t.cohort, t.variant or t.method): 0 for t in trials}
    for t in trials:
        counts[t.cohort, t.variant or t.method] += 1
    assert (counts["la", "supervised"], counts["la", "ssl-contrastive"], counts["la", "paper"]) == (16, 12, 6)
    assert (counts["demo", "supervised"], counts["demo", "cps"]) == (8, 2)
    stress = AccuracyConfig(stress=True)
    assert {t.cohort for t in methods_trials(stress, cohort_settings(stress))} == {*STRESS}
    with pytest.raises(UserError, match="--cohorts mars"):
        cohort_settings(AccuracyConfig(cohorts=("mars",)))


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
    for key, scores in collect(again)["demo"].items():
        for one, two in zip(scores, collect(results)["demo"][key], strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)
    draw_curves(collect(results), {"demo": ALL_LABELS}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_that_extends_runs_what_the_csv_lacks(
    results: dict[Trial, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[study.__module__]
    missing: list[Trial] = []
    monkeypatch.setattr(module, "run", lambda trials, *_: [missing.append(trial) or trial for trial in trials])
    chosen = {"cohorts": ("demo",), "methods": METHODS, "labeled": (2, 4), "seeds": (1, 2)}
    config = AccuracyConfig(**chosen, output=tmp_path / "none", name=str(tmp_path / "study"), extend=True)
    settings = cohort_settings(config)
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
    monkeypatch.setattr(module, "run", lambda *_: iter(()))
    with pytest.raises(UserError, match="1 of 14 runs are left after --minutes; continue with --extend"):
        study(config)
    monkeypatch.setattr(module, "run", lambda trials, *_: [missing.append(trial) or trial for trial in trials])
    missing.clear()
    page = (tmp_path / "study.md").read_text()
    (tmp_path / "study.md").unlink()
    study(replace(config, tables_only=True))
    assert not missing
    assert (tmp_path / "study.md").read_text() == page
    assert page.endswith("log is gone. yesterday.\n")
    with pytest.raises(UserError, match="lacks runs"):
        study(replace(config, tables_only=True, seeds=(1, 2, 3)))
    with pytest.raises(FileNotFoundError):
        study(replace(config, extend=False))
    assert set(missing) == set(own), "what is not asked to extend measures anew"


def test_finished_runs_are_not_repeated_and_a_failing_one_is_named(finished: tuple[list[Trial], Path]) -> None:
    trials, output = finished
    data = {"nowhere": "nowhere"}
    unfinished = {Trial("demo", "cps", 4, 9): {"data": "nowhere"}}
    known: dict[Trial, dict[str, object]] = {trial: {"data": "nowhere"} for trial in trials}
    assert list(run(known, output, 2, data)) == trials
    assert list(run({**known, **unfinished}, output, 2, data, seconds=0)) == trials
    with pytest.raises(UserError, match=rf"cps-4-9-{SETTINGS['cps']}/output\.txt"):
        list(run(unfinished, output, 2, data))
    assert "nowhere" in (output / "demo" / f"cps-4-9-{SETTINGS['cps']}" / "output.txt").read_text()
    with pytest.raises(UserError):  # other settings: not the run that is finished
        list(run({trials[0]: {"data": "nowhere", "steps": 1}}, output, 2, data))
