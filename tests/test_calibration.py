"""Estimates of Dice from validation cases, and what counts as unlike a run's scans."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from sslfast.calibration import FILE, Calibration, Estimator, geometry
from sslfast.data.nifti import Volume, digest_of
from sslfast.errors import UserError


def case(name: str, agreement: float, dice: float, of: str = "liver") -> dict[str, object]:
    return {"case": name, "class": of, "agreement": agreement, "dice": dice}


def label(name: str, volume: float, border: int = 0) -> dict[str, object]:
    return {"case": name, "class": "liver", "volume_ml": volume, "components": 1, "touches_border": border}


def scan(spacing: float, extent: float) -> dict[str, object]:
    return {"case": "s", "spacing": [spacing] * 3, "extent": [extent] * 3}


def test_the_estimate_lies_on_the_line_through_the_cases() -> None:
    rows = [case(str(i), agreement, 0.2 + 0.7 * agreement) for i, agreement in enumerate((0.5, 0.6, 0.8, 0.9))]
    estimator = Calibration(rows).estimator()
    assert estimator is not None
    assert estimator(0.7) == pytest.approx((0.69, 0.69, 0.69))
    assert estimator(2.0).dice == 1  # never above


def test_classes_of_a_case_count_together_and_missing_ones_do_not() -> None:
    rows = [case(str(i), 0.8, 0.8) for i in range(4)] + [case(str(i), math.nan, math.nan, "spleen") for i in range(4)]
    estimator = Calibration(rows).estimator()
    assert estimator is not None
    assert estimator.count == 4


def test_three_cases_are_too_few() -> None:
    rows = [case(str(i), i / 4, i / 4) for i in range(4)]
    few = Calibration(rows[:3])
    assert few.estimator() is None
    assert few.without_estimates() == "no estimates of Dice, which take 4 validation cases; the run had 3"
    assert not Calibration(rows).without_estimates()


def test_an_estimate_does_not_fall_while_the_networks_agree_more() -> None:
    scores = np.array([0.5, 0.6, 0.7, 0.8])
    assert Estimator.fit(scores, 1 - scores)(0.9).dice == pytest.approx(0.35)


def test_four_of_five_new_cases_lie_in_the_interval() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        scores = random.uniform(0.6, 0.9, 9)
        dice = scores - 0.1 + random.normal(0, 0.02, 9)
        estimate = Estimator.fit(scores[:8], dice[:8])(scores[8])
        inside += estimate.low <= dice[8] <= estimate.high
    assert 0.77 < inside / 2000 < 0.83


SEEN = Calibration(
    [case(str(i), agreement, 0.8) for i, agreement in enumerate((0.7, 0.8, 0.85, 0.9))],
    [label(str(i), volume) for i, volume in enumerate((80.0, 90.0, 100.0, 120.0))],
    [scan(1.0, 100.0), scan(1.5, 120.0)],
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, []),
        ({"volume_ml": 41.0}, []),
        ({"volume_ml": 0.0, "agreement": math.nan}, ["liver not found"]),
        ({"volume_ml": 250.0}, ["liver 250 mL, in labels 80 to 120 mL"]),
        ({"touches_border": 1}, ["liver cut off by the edge of the scan"]),
        ({"agreement": 0.59}, ["agreement on liver 0.59, on validation 0.7 to 0.9"]),
    ],
)
def test_a_segmentation_unlike_the_runs_is_flagged(changes: dict[str, float], reason: list[str]) -> None:
    quality = {"liver": {"volume_ml": 90.0, "agreement": 0.8, "components": 1, "touches_border": 0, **changes}}
    assert SEEN.odd({"spacing": [1.2] * 3, "extent": [110.0] * 3}, quality) == reason


@pytest.mark.parametrize(
    ("spacing", "extent", "reason"),
    [
        (1.75, 110.0, []),
        (3.0, 110.0, ["spacing 3 × 3 × 3 mm, in training 1 to 1.5 × 1 to 1.5 × 1 to 1.5"]),
        (1.2, 300.0, ["extent 300 × 300 × 300 mm, in training 100 to 120 × 100 to 120 × 100 to 120"]),
    ],
)
def test_a_scan_unlike_the_runs_is_flagged(spacing: float, extent: float, reason: list[str]) -> None:
    assert SEEN.odd({"spacing": [spacing] * 3, "extent": [extent] * 3}, {}) == reason


def test_geometry_is_along_the_bodys_axes() -> None:
    affine = np.array([[0, 0, 3.0, 0], [-1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])
    volume = Volume(np.zeros((1, 10, 20, 30), np.float32), affine, None)
    assert geometry(volume) == {"spacing": [3, 1, 2], "extent": [90, 10, 40]}


def test_a_calibration_comes_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint_last.pt"
    assert Calibration.read(checkpoint) is None
    Calibration([case("a", math.nan, 0.5)], SEEN.labels, SEEN.scans).write(tmp_path)
    read = Calibration.read(checkpoint)
    assert read is not None
    assert read.scans == SEEN.scans
    assert read.cases == [{**case("a", 0, 0.5), "agreement": None}]
    for content in ("{", "[]", '{"cases": [1], "labels": [], "scans": []}', '{"cases": []}'):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(UserError, match=f"{FILE} cannot be read"):
            Calibration.read(checkpoint)


def test_a_calibration_of_other_checkpoints_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, other = tmp_path / "checkpoint_last.pt", tmp_path / "other.pt"
    own.write_bytes(b"own")
    other.write_bytes(b"other")
    Calibration(scans=SEEN.scans, checkpoints=[digest_of(own, "")]).write(tmp_path)
    assert Calibration.read(own) is not None
    assert not capsys.readouterr().err
    assert Calibration.read(other) is None
    assert f"{FILE} is not of other.pt; there are no estimates and no flags" in capsys.readouterr().err
