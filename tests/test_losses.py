"""`DualContrastiveLoss`: what teaches whom, what reaches the gradient, and what an empty set does."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.maps import DTYPES
from sslfast import DualContrastiveLoss
from sslfast.losses import DualLoss
from sslfast.ops import dual_supervised, rectified_consistency, reliability
from sslfast.renamed import LOSS_OPTIONS

SIZE = (4, 6, 5)
INPUTS = ("logits_a", "logits_b", "features_a", "features_b")


def random_batch(
    volumes: int = 4, labelled: int = 2, classes: int = 3, width: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor]:
    logits = [2 * torch.randn(volumes, classes, *SIZE, dtype=dtype) for _ in range(2)]
    features = [torch.randn(volumes, width, *SIZE, dtype=dtype) for _ in range(2)]
    return [t.requires_grad_() for t in (*logits, *features)], torch.randint(0, classes, (labelled, *SIZE))


def gradients(result: DualLoss, inputs: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(t) if g is None else g
        for t, g in zip(inputs, torch.autograd.grad(result.loss, inputs, allow_unused=True))
    ]


def late(**options: Any) -> DualContrastiveLoss:
    """The paper's, with a ramp of one step, so that step 1 has full weights, and a split in two halves."""
    return DualContrastiveLoss(3, **{"preset": "paper", "percentile": 50, "ramp_steps": 1, **options})


def test_unlabelled_voxels_reach_the_losers_logits_and_features() -> None:
    inputs, labels = random_batch()
    result = late()(*inputs, labels, step=1)
    winner = int(result.terms["winner"])
    grads = dict(zip(INPUTS, gradients(result, inputs)))
    for name, grad in grads.items():
        assert torch.isfinite(grad).all()
        unlabelled = grad[2:]
        is_loser = name.endswith("ba"[winner])
        assert bool(unlabelled.any()) == is_loser, name
    loser = "ba"[winner]
    assert grads[f"features_{loser}"][:2].abs().max() == 0
    drawn = grads[f"features_{loser}"][2:].abs().sum(1).count_nonzero()
    assert 0 < drawn <= int(result.terms["anchors"].sum())


@pytest.mark.parametrize("with_teacher", [False, True], ids=["no teacher", "teacher"])
def test_rectified_pseudo_labels_are_those_of_the_op(with_teacher: bool) -> None:
    """Without a teacher, cosine and Dice belong to both networks, and count once."""
    inputs, labels = random_batch()
    teacher = torch.randn_like(inputs[0][2:]) if with_teacher else None
    weights = {"pseudo_weight": 0.7, "pseudo_dice_weight": 0.4, "contrast_weight": 0.0}
    result = DualContrastiveLoss(3, percentile=50.0, gate=(0, 0), ramp_steps=1, **weights)(*inputs, labels, 1, teacher)
    supervised = dual_supervised(*(t[:2] for t in inputs[:2]), labels, discrepancy_over="labelled")
    losses, unscaled = [], []
    for n, students in enumerate((inputs[:2], inputs[1::-1])):
        student, other = (t[2:] for t in students)
        pseudo = rectified_consistency(student, other if teacher is None else teacher, flags_of(other, teacher))
        factor = 0.5 if teacher is None else 1
        known = supervised.ce[n] + supervised.dice[n] + 0.5 * supervised.discrepancy[n]
        losses.append(known + 0.7 * (pseudo.rectified + factor * pseudo.cosine) + 0.4 * factor * pseudo.dice)
        unscaled.append(known + 0.7 * (pseudo.rectified + pseudo.cosine) + 0.4 * pseudo.dice)
    assert torch.stack((result.loss_a, result.loss_b)).tolist() == pytest.approx([x.item() for x in losses], rel=1e-12)
    for ours, plain in zip(gradients(result, inputs)[:2], torch.autograd.grad(sum(unscaled), inputs[:2])):
        torch.testing.assert_close(ours, plain)


def flags_of(other: Tensor, teacher: Tensor | None) -> Tensor:
    return reliability(other if teacher is None else teacher, 50).flags


def test_an_absent_class_leaves_everything_finite_and_the_others_learn() -> None:
    inputs, labels = random_batch()
    with torch.no_grad():
        for logits in inputs[:2]:
            logits[:, 2] = -1e3
    result = late()(*inputs, labels.clamp_max(1), step=1)
    assert int(result.terms["reliable"][2]) == 0
    assert int(result.terms["anchors"][2]) == 0
    grads = gradients(result, inputs)
    assert all(torch.isfinite(g).all() for g in grads)
    loser = 1 - int(result.terms["winner"])
    assert grads[loser][2:].any()
    assert grads[2 + loser][2:].any()


def test_without_a_reliable_voxel_pseudo_labels_and_contrast_are_zero() -> None:
    inputs, labels = random_batch()
    result = late(percentile=0)(*inputs, labels, step=1)
    assert result.terms["kept_fraction"] == 0
    assert result.terms["pseudo"].tolist() == [0, 0]
    assert result.terms["contrast"] == 0
    grads = gradients(result, inputs)
    assert all(torch.isfinite(g).all() for g in grads)
    assert grads[0][:2].any()
    assert not any(g[2:].any() for g in grads)


def test_nobody_sure_still_draws_the_networks_together() -> None:
    inputs, labels = random_batch()
    criterion = DualContrastiveLoss(3, percentile=0.0, gate=(0, 0), contrast_weight=0.1, ramp_steps=1)
    result = criterion(*inputs, labels, step=1)
    agreed = rectified_consistency(inputs[0][2:], inputs[1][2:], torch.zeros(2, *SIZE, dtype=torch.uint8))
    assert agreed.rectified.item() == 0
    assert result.terms["kept_fraction"] == result.terms["contrast"] == 0
    assert result.terms["pseudo"].tolist() == pytest.approx(2 * [float(agreed.cosine.detach()) / 2])
    grads = gradients(result, inputs)
    assert all(torch.isfinite(g).all() for g in grads)
    assert all(g[2:].any() for g in grads[:2])
    assert not any(g.any() for g in grads[2:])


def test_without_anchors_pseudo_labels_still_teach() -> None:
    inputs, labels = random_batch()
    result = late(anchors=0)(*inputs, labels, step=1)
    assert result.terms["contrast"] == 0
    grads = gradients(result, inputs)
    assert all(torch.isfinite(g).all() for g in grads)
    assert grads[1 - int(result.terms["winner"])][2:].any(), "pseudo-labels still teach"
    assert not grads[2].any()
    assert not grads[3].any()


@pytest.mark.parametrize(("preset", "weight"), [("recommended", 0.0), ("paper", 0.1)])
def test_only_the_paper_has_a_contrastive_loss_unless_it_is_given_a_weight(preset: Any, weight: float) -> None:
    inputs, labels = random_batch()
    terms = DualContrastiveLoss(3, preset=preset)(*inputs, labels).terms
    chosen = DualContrastiveLoss(3, preset=preset, contrast_weight=0.1)(*inputs, labels).terms
    assert ("contrast" in terms) == ("anchors" in terms) == (weight > 0)
    assert {"contrast", "anchors"} < chosen.keys()
    for name in terms:
        assert torch.equal(terms[name], chosen[name]), name  # reliable voxels are counted either way


def test_no_unlabelled_volume_is_the_supervised_loss() -> None:
    inputs, labels = random_batch(volumes=2)
    result = late()(*inputs, labels, step=1)
    terms = dual_supervised(*inputs[:2], labels)
    expected = terms.ce + terms.dice + 0.5 * terms.discrepancy
    assert torch.allclose(torch.stack([result.loss_a, result.loss_b]), expected)
    assert all(torch.isfinite(g).all() for g in gradients(result, inputs))


@pytest.mark.parametrize(
    ("options", "dice"),
    [({}, 1.0), ({"preset": "paper"}, 0.0), ({"preset": "paper", "pseudo_dice_weight": 0.4}, 0.4)],
)
@pytest.mark.parametrize(("step", "ramp"), [(0, math.exp(-5)), (4, math.exp(-5 * 0.6**2)), (10, 1.0), (25, 1.0)])
def test_the_loss_is_the_weighted_sum_of_its_terms(
    options: dict[str, Any], dice: float, step: int, ramp: float
) -> None:
    inputs, labels = random_batch()
    weights = {"discrepancy_weight": 0.3, "pseudo_weight": 0.7, "contrast_weight": 0.2}
    result = DualContrastiveLoss(3, percentile=50, gate=(0, 0), ramp_steps=10, **weights, **options)(
        *inputs, labels, step=step
    )
    t = result.terms
    for n, loss in enumerate((result.loss_a, result.loss_b)):
        expected = t["ce"][n] + t["dice"][n] + 0.3 * t["discrepancy"][n]
        loses = n != int(t["winner"])
        if loses or "preset" not in options:
            expected = expected + ramp * (0.7 * t["pseudo"][n] + dice * t["pseudo_dice"][n])
        if loses:
            expected = expected + ramp * 0.2 * t["contrast"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert result.loss.item() == pytest.approx((result.loss_a + result.loss_b).item())
    assert not any(value.requires_grad for value in t.values())


def test_the_winner_has_the_lower_dice() -> None:
    inputs, labels = random_batch()
    for _ in range(2):
        result = late()(*inputs, labels)
        dice = result.terms["dice"]
        assert int(result.terms["winner"]) == int(dice[1] < dice[0])
        inputs = [inputs[1], inputs[0], inputs[3], inputs[2]]


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_the_percentile_rises_over_the_ramp(preset: Any) -> None:
    inputs, labels = random_batch()
    criterion = DualContrastiveLoss(3, preset=preset, percentile=(20, 80), gate=(0, 0), ramp_steps=10)
    kept = [float(criterion(*inputs, labels, step=step).terms["kept_fraction"]) for step in (0, 5, 10, 50)]
    assert kept == pytest.approx([0.2, 0.5, 0.8, 0.8], abs=0.01)


def test_voxels_that_nobody_annotated_do_not_matter() -> None:
    inputs, labels = random_batch()
    labels[0, :2] = -1
    expected = late()(*inputs, labels, step=1).loss
    with torch.no_grad():
        inputs[0][0, :, :2] = 50.0
    assert torch.allclose(late()(*inputs, labels, step=1).loss, expected)


def test_the_sample_follows_seed_and_step() -> None:
    inputs, labels = random_batch()
    few = {"anchors": 5, "negatives": 3}
    first = late(**few)(*inputs, labels, step=7).terms["contrast"]
    assert torch.equal(first, late(**few)(*inputs, labels, step=7).terms["contrast"])
    assert not torch.equal(first, late(**few)(*inputs, labels, step=8).terms["contrast"])
    assert not torch.equal(first, late(**few, seed=1)(*inputs, labels, step=7).terms["contrast"])


@pytest.mark.parametrize("where", ["logits_a", "logits_b"])
@pytest.mark.parametrize("volume", [0, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_logits_are_not_hidden(where: str, volume: int, bad: float) -> None:
    inputs, labels = random_batch()
    with torch.no_grad():
        inputs[INPUTS.index(where)][volume, 1, 0, 0, 0] = bad
    assert late()(*inputs, labels, step=1).loss.isnan()


@pytest.mark.parametrize(
    ("preset", "with_teacher", "checked"),
    # a network that teaches the other is a constant there, and so are prototypes and negatives
    [("paper", False, 2), ("paper", True, 2), ("recommended", True, 2), ("recommended", False, 0)],
)
def test_gradients_are_those_of_finite_differences(preset: Any, with_teacher: bool, checked: int) -> None:
    logits = [2 * torch.randn(2, 2, 2, 3, 2, dtype=torch.float64) for _ in range(2)]
    features = [torch.randn(2, 3, 2, 3, 2, dtype=torch.float64) for _ in range(2)]
    labels, teacher = torch.randint(0, 2, (1, 2, 3, 2)), torch.randn(1, 2, 2, 3, 2, dtype=torch.float64)
    options = {"percentile": 50, "ramp_steps": 1, "anchors": 2, "negatives": 3, "temperature": 0.5}
    options |= {"pseudo_dice_weight": 0.4, "gate": (0, 0)}
    criterion = DualContrastiveLoss(2, preset=preset, **options if checked else {**options, "pseudo_weight": 0.0})
    maps = [*logits, *features]
    free = [t.requires_grad_() for t in maps[: checked or 2]]
    given = teacher if with_teacher else None
    assert torch.autograd.gradcheck(
        lambda *t: criterion(*t, *maps[len(free) :], labels, step=1, teacher=given).loss, free
    )


@pytest.mark.parametrize("classes", [2, 4, 14])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_maps_are_computed_in_float32(classes: int, dtype: torch.dtype) -> None:
    inputs, labels = random_batch(classes=classes, dtype=dtype)
    result = DualContrastiveLoss(classes, percentile=60, gate=(0, 0), ramp_steps=1)(*inputs, labels, step=1)
    assert result.loss.dtype == torch.float32
    exact = DualContrastiveLoss(classes, percentile=60, gate=(0, 0), ramp_steps=1)(
        *(t.detach().double() for t in inputs), labels, step=1
    )
    assert result.terms["ce"].tolist() == pytest.approx(exact.terms["ce"].tolist(), rel=1e-4)
    grads = gradients(result, inputs)
    assert all(torch.isfinite(g).all() for g in grads)
    assert any(g[2:].any() for g in grads[:2])


def test_a_surrounding_autocast_changes_nothing() -> None:
    inputs, labels = random_batch(dtype=torch.float32)
    expected = late()(*inputs, labels, step=1)
    with torch.autocast("cpu", torch.bfloat16):
        result = late()(*inputs, labels, step=1)
    assert result.loss.dtype == torch.float32
    for name, value in expected.terms.items():
        assert torch.equal(result.terms[name], value), name


@pytest.mark.parametrize(
    "options",
    [
        {"percentile": 120},
        {"percentile": (10, 20, 30)},
        {"gate": (0.7, 0.3)},
        {"gate": (0.3, 1.1)},
        {"temperature": 0},
        {"anchors": -1},
        {"preset": "fast"},
        {"ramp_steps": 0},
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DualContrastiveLoss(2, **options)


@pytest.mark.parametrize("name", LOSS_OPTIONS)
def test_an_option_of_an_earlier_version_names_what_took_its_place(name: str) -> None:
    with pytest.raises(TypeError, match=rf"has no option '{name}' any more: {re.escape(LOSS_OPTIONS[name])}"):
        DualContrastiveLoss(2, **{name: 1})


def test_an_unknown_option_and_an_earlier_preset_are_named() -> None:
    with pytest.raises(TypeError, match=r"has no option 'wheels'$"):
        DualContrastiveLoss(2, wheels=4)
    with pytest.raises(ValueError, match=r"preset is 'corrected'.*'paper'"):
        DualContrastiveLoss(2, preset="corrected")
    with pytest.raises(ValueError, match=r"preset is 'as-released'.*as_released_loss"):
        DualContrastiveLoss(2, preset="as-released")


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        pytest.param(torch.tensor([1, 2]), ValueError, r"step has shape \(2,\) on cpu", id="two numbers"),
        pytest.param(torch.tensor(1.0), TypeError, "step has dtype torch.float32", id="float"),
        pytest.param(torch.tensor(-1), ValueError, "step is -1; it must be from 0", id="negative"),
        pytest.param(
            torch.tensor(3, device="meta"), ValueError, r"step has shape \(\) on meta", id="on another device"
        ),
    ],
)
def test_a_step_that_cannot_be_one_is_refused(step: Tensor, error: type[Exception], message: str) -> None:
    inputs, labels = random_batch()
    with pytest.raises(error, match=message):
        late()(*inputs, labels, step=step)


def test_sixteen_options_are_enough() -> None:
    parameters = inspect.signature(DualContrastiveLoss).parameters.values()
    assert sum(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters) <= 16


def test_refusals_name_the_argument() -> None:
    (za, zb, fa, fb), labels = random_batch()
    criterion = late()
    with pytest.raises(ValueError, match="made for 3"):
        criterion(za[:, :2], zb[:, :2], fa, fb, labels)
    with pytest.raises(ValueError, match="features_b has shape"):
        criterion(za, zb, fa, fb[:, :2], labels)
    with pytest.raises(ValueError, match="features_a has shape"):
        criterion(za, zb, fa[:3], fb[:3], labels)
    with pytest.raises(ValueError, match="1 to 4 labelled volumes"):
        criterion(za, zb, fa, fb, labels[:0])
    with pytest.raises(ValueError, match="1 to 4 labelled volumes"):
        criterion(za, zb, fa, fb, labels.repeat(3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"outside 0..2"):
        criterion(za, zb, fa, fb, labels + 1)
