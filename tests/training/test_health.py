"""What a run says about itself: the progress bar and the warnings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sslfast.training.health import Health

CLASSES = {0: "background", 1: "thalamus", 2: "amygdala"}


def rows(**columns: float) -> Iterator[tuple[int, dict[str, float]]]:
    """Rows of every tenth of 800 steps."""
    for step in range(0, 800, 10):
        yield step, {"loss_a": 1.0, "loss_b": 0.5, "class_dice_1": 0.8, **columns}


def test_a_class_that_vanishes_is_named_once_and_again_if_it_returns_and_vanishes() -> None:
    health = Health(CLASSES, 800, "ssl-contrastive")
    said = {}
    for step, row in rows():
        predicted = step < 50 or step == 300
        said[step] = health.add(step, {**row, "class_dice_2": 0.5 if predicted else 0.001})
    steps = [step for step, warnings in said.items() if warnings]
    assert len(steps) == 2
    assert 200 <= steps[0] <= 250
    assert steps[1] >= 500
    assert "both networks have stopped predicting amygdala" in said[steps[0]][0]
    assert "--baseline" in said[steps[0]][0]
    assert "not predicted: amygdala" in health.summary()
    assert [finding.split(":")[0] for finding in health.findings] == [f"step {step}" for step in steps]


def test_a_class_that_is_in_no_label_is_not_missed() -> None:
    health = Health(CLASSES, 800, "ssl-contrastive")
    assert not any(health.add(step, row) for step, row in rows())
    assert "not predicted" not in health.summary()


@pytest.mark.parametrize("method", ["ssl-contrastive", "supervised"])
def test_a_lasting_fall_of_the_validation_dice_is_said_with_both_values(method: str) -> None:
    health = Health(CLASSES, 800, method)
    said = [
        health.add(step, {"validation_dice": dice}) for step, dice in zip((100, 200, 300, 400), (0.7, 0.6, 0.72, 0.6))
    ]
    assert not any(said)
    (warning,) = health.add(500, {"validation_dice": 0.5})
    assert "validation Dice was 0.720 after step 300 and is 0.500" in warning
    assert ("--baseline" in warning) == (method != "supervised")


def test_an_idle_contrast_is_said() -> None:
    idle, working = Health(CLASSES, 800, "x"), Health(CLASSES, 800, "x")
    assert any("contrastive loss is 0" in text for step, row in rows(contrast=0.0) for text in idle.add(step, row))
    assert not any(working.add(step, {**row, "contrast": float(step % 90 == 0)}) for step, row in rows())


def test_the_progress_bar_has_the_share_of_the_foreground_and_the_classes_with_reliable_voxels() -> None:
    health = Health(CLASSES, 800, "x")
    counts = {"reliable_0": 9.0, "reliable_1": 1.0, "reliable_2": 0.0}
    health.add(0, {"loss_a": 1, "loss_b": 0.25, "foreground": 0.031, "kept_fraction": 0.2, **counts})
    assert health.summary() == "loss 1.000 0.250, foreground 3.1 %, reliable 20 % in 2 of 3 classes"
