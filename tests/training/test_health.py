"""What a run says about itself: the progress bar and the warnings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sslfast.training.health import Health

CLASSES = {0: "background", 1: "thalamus", 2: "amygdala"}


def watched(semi_supervised: bool = True, contrast: bool = True) -> Health:
    return Health(CLASSES, 800, semi_supervised=semi_supervised, contrast=contrast)


def rows(every: int = 10, **columns: float) -> Iterator[tuple[int, dict[str, float]]]:
    """Rows of some of 800 steps, in which class 1 is found."""
    for step in range(0, 800, every):
        yield step, {"loss_a": 1.0, "loss_b": 0.5, "class_dice_1": 0.8, **columns}


def test_a_class_that_vanishes_is_named_once_and_again_if_it_returns_and_vanishes() -> None:
    health = watched()
    said = {}
    for step, row in rows():
        predicted = step < 50 or step == 300
        said[step] = health.add(step, {**row, "class_dice_2": 0.5 if predicted else 0.001})
    steps = [step for step, warnings in said.items() if warnings]
    assert len(steps) == 2
    assert steps[0] == 200
    assert 400 <= steps[1] <= 420
    assert said[200] == health.findings
    assert "both networks have stopped predicting amygdala" in said[200][0]
    assert "--baseline" in said[200][0]
    assert "not predicted: amygdala" in health.summary()


@pytest.mark.parametrize(("every", "each"), [(10, 40), (50, 50), (10, 10)], ids=["rare", "seldom logged", "always"])
def test_a_class_that_was_never_learned_is_named_once_however_seldom_it_is_seen(every: int, each: int) -> None:
    """At first, Dice of random networks is above what counts as not predicted."""
    health = watched()
    said = []
    for step, row in rows(every):
        own = {} if step % each else {"class_dice_2": 0.05 if step == 0 else 0.001}
        said += health.add(step, {**row, **own})
    assert len(said) == 1
    assert "neither network predicts amygdala" in said[0]


def test_what_recovers_is_no_finding_at_the_end() -> None:
    health = watched()
    for step, row in rows():
        health.add(step, {**row, "class_dice_2": 0.5 if step > 600 else 0.001})
    assert health.findings == []


def test_a_class_that_is_in_no_label_is_not_missed() -> None:
    health = watched()
    assert not any(health.add(step, row) for step, row in rows())
    assert "not predicted" not in health.summary()


@pytest.mark.parametrize("semi_supervised", [True, False])
def test_a_lasting_fall_of_the_validation_dice_is_said_with_both_values(semi_supervised: bool) -> None:
    health = watched(semi_supervised)
    said = [
        health.add(step, {"validation_dice": dice}) for step, dice in zip((100, 200, 300, 400), (0.7, 0.6, 0.72, 0.6))
    ]
    assert not any(said)
    (warning,) = health.add(500, {"validation_dice": 0.5})
    assert "validation Dice was 0.720 after step 300 and is 0.500" in warning
    assert ("--baseline" in warning) == semi_supervised
    assert not health.add(600, {"validation_dice": 0.4})


@pytest.mark.parametrize(("contrast", "reliable", "said"), [(True, 0, 1), (False, 0, 0), (True, 3, 0)])
def test_a_contrast_without_reliable_foreground_is_said(contrast: bool, reliable: float, said: int) -> None:
    health = watched(contrast=contrast)
    warnings = [
        text
        for step, row in rows(contrast=0.0, reliable_0=5, reliable_2=0)
        for text in health.add(step, {**row, "reliable_1": reliable * (step % 90 == 0)})
    ]
    assert len(warnings) == said
    assert all("the contrastive loss does nothing" in text for text in warnings)


@pytest.mark.parametrize(("dice", "found", "said"), [(0.8, 0.05, 1), (0.8, 0.5, 0), (0.3, 0.05, 0)])
def test_a_known_class_that_unlabelled_volumes_seem_to_lack_is_named(dice: float, found: float, said: int) -> None:
    health = watched()
    new = [warning for step, row in rows(running_dice_2=dice, found_2=found) for warning in health.add(step, row)]
    assert len(new) == said
    assert all("amygdala: known from labels, but hardly found on unlabelled volumes" in warning for warning in new)


def test_the_progress_bar_has_the_share_of_the_foreground_and_the_classes_with_reliable_voxels() -> None:
    health = watched()
    counts = {"reliable_0": 9.0, "reliable_1": 1.0, "reliable_2": 0.0}
    health.add(0, {"loss_a": 1, "loss_b": 0.25, "foreground": 0.031, "kept_fraction": 0.2, **counts})
    health.add(0, {"validation_dice": 0.5})
    assert health.summary() == "loss 1.000 0.250, foreground 3.1 %, reliable 20 % in 2 of 3 classes"
