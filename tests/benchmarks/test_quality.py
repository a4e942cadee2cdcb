"""The benchmark of the scores: its arithmetic, and a small run of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import quality
from benchmarks.accuracy import cohorts
from benchmarks.quality import QualityConfig, Scored, area, compared, estimated, orders, page, read
from helpers.volumes import write_cases
from sslfast.quality import SCORES


def case(name: str, dice: float, agreement: float, part: str = "test") -> Scored:
    return Scored("la", "supervised", 2, 1, "0", part, name, dice, agreement, 1 - agreement, agreement)


def test_the_area_is_the_mean_risk_of_what_is_trusted_most() -> None:
    true = np.array([0.9, 0.5, 0.7])
    assert area(np.array([3, 1, 2]), true) == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert area(np.array([1, 3, 2]), true) == pytest.approx((0.5 + 0.4 + 0.3) / 3)


def test_a_score_that_orders_by_dice_is_the_best_possible() -> None:
    found = orders([case(str(i), dice, dice / 2) for i, dice in enumerate((0.9, 0.5, 0.7, 0.8))])
    assert found["agreement"] == found["entropy"] == pytest.approx(found["Dice itself: least possible"])
    assert found["mutual_information"][0] == pytest.approx(-1)
    assert found["mutual_information"][1] > found["chance"][1] > found["agreement"][1]


def test_an_estimate_on_the_line_has_no_error() -> None:
    validation = [case(str(i), 0.1 + 0.8 * x, x, "validation") for i, x in enumerate((0.2, 0.4, 0.6, 0.8))]
    error, control, inside, width = estimated(validation, [case("a", 0.42, 0.4), case("b", 0.58, 0.6)])
    assert (error, width) == pytest.approx((0, 0), abs=1e-6)
    assert control == pytest.approx(0.08)
    assert 0 <= inside <= 1


def test_scores_are_compared_over_runs_by_the_same_resamples() -> None:
    random = np.random.default_rng(1)
    rows = [
        case(f"{i:02}", dice, dice + random.normal() / 20, part)._replace(seed=seed)
        for seed in (1, 2)
        for part in ("validation", "test")
        for i, dice in enumerate(random.uniform(0.4, 0.9, 12))
    ]
    agreement, entropy, information, ranks = compared(rows)
    assert [row[0] for row in (agreement, entropy, information, ranks)] == [*SCORES, "mean rank"]
    assert agreement[2::2] == ["", ""]
    assert ranks[3:] == ["", ""]
    nothing = "+0.0000 [+0.0000, +0.0000]"
    of_entropy = [cell.replace("-0.0000", "+0.0000") for cell in entropy[1:]]  # it is 1 - agreement, but for rounding
    assert of_entropy == [agreement[1], nothing, agreement[3], nothing]
    for cell in information[2::2]:  # it is the agreement with the wrong sign
        difference, low, high = map(float, re.findall(r"[-+][.\d]+", cell))
        assert low < difference < high < 0
    areas = [orders([row for row in rows if (row.seed, row.part) == (seed, "test")])["agreement"][1] for seed in (1, 2)]
    assert float(agreement[1]) == pytest.approx(sum(areas) / 2, abs=1e-4)


def test_a_small_run_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_cases(tmp_path / "real" / "hippocampus", cases=10, labelled=10)
    names = sorted(path.name.removesuffix(".nii.gz") for path in (data / "images").iterdir())
    parts = {"training": names[:3], "validation": names[3:7], "test": names[7:]}
    (data / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "x"}, **parts}))
    small = cohorts.REAL["hippocampus"].settings | {"patch": [16, 16, 16], "depth": 2, "width": 2, "spacing": 2}
    monkeypatch.setitem(cohorts.COHORTS, "hippocampus", cohorts.REAL["hippocampus"]._replace(settings=small))
    config = QualityConfig(
        tmp_path / "real", ("hippocampus",), (2,), (1,), 2, 1, tmp_path / "runs", str(tmp_path / "quality")
    )
    quality.quality(config)
    rows = read(tmp_path / "quality.csv")
    assert [row.part for row in rows] == [*["test"] * 3, *["validation"] * 4] * 2
    text = (tmp_path / "quality.md").read_text()
    assert "| hippocampus | 2 | `ssl-contrastive` | agreement |" in text
    assert "| hippocampus | 2 | `supervised` | 4 |" in text
    assert page(rows)[:5] == text.splitlines()[:5]
    quality.quality(replace(config, output=tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
