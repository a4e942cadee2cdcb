"""`DualContrastiveLoss`, its head and its options: arguments of the wrong kind, too many classes, unequal features."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sslfast import DualContrastiveHead, DualContrastiveLoss
from sslfast.ops.check import too_many_classes

SIZE = (4, 5, 6)
MAPS = ("logits_a", "logits_b", "features_a", "features_b", "labels", "teacher")
IN_CONTRAST = {"preset": "paper", "ramp_steps": 1}


def batch(**other: Any) -> dict[str, Any]:
    """Two labelled and two unlabelled volumes of three classes."""
    logits = {name: torch.randn(4, 3, *SIZE) for name in MAPS[:2]}
    features = {name: torch.randn(4, 6, *SIZE) for name in MAPS[2:4]}
    labels, teacher = torch.randint(0, 3, (2, *SIZE)), torch.randn(2, 3, *SIZE)
    return {**logits, **features, "labels": labels, "teacher": teacher, "step": 1, **other}


def wrong_tensors(good: Tensor) -> list[tuple[Any, str]]:
    other = good.long() if good.is_floating_point() else good.float()
    return [
        ([1.0], "is a list; it must be a torch.Tensor"),
        (good.numpy(), "is a NumPy array; it must be a torch.Tensor"),
        (good.to_sparse(), "is a sparse_coo tensor; it must be dense, as of .to_dense()"),
        (torch.nested.nested_tensor([good[0], good[1]]), "is a nested tensor; it must be dense, as of .to_dense()"),
        (other, f"has dtype {other.dtype}; it must be "),
    ]


@pytest.mark.parametrize("name", MAPS)
def test_the_loss_names_what_is_no_dense_tensor_of_the_right_dtype(name: str) -> None:
    criterion, given = DualContrastiveLoss(3), batch()
    wrong = wrong_tensors(given[name])
    if name != "teacher":  # None: there is none
        wrong.append((None, "is None; it must be a torch.Tensor"))
    for value, message in wrong:
        with pytest.raises(TypeError, match=rf"^{name} {re.escape(message)}"):
            criterion(**{**given, name: value})


@pytest.mark.parametrize("name", ["features_a", "features_b", "labels", "teacher"])
def test_the_head_names_them_too(name: str) -> None:
    given = batch()
    del given["logits_a"], given["logits_b"]
    for value, message in wrong_tensors(given[name]):
        with pytest.raises(TypeError, match=rf"^{name} {re.escape(message)}"):
            DualContrastiveHead(3, 6)(**{**given, name: value})


@pytest.mark.parametrize("step", [0.5, True, None, np.ones(1)])
def test_a_step_of_the_wrong_kind_is_named(step: Any) -> None:
    shown = "a NumPy array" if isinstance(step, np.ndarray) else step
    with pytest.raises(TypeError) as error:
        DualContrastiveLoss(3)(**batch(step=step))
    assert str(error.value) == f"step is {shown}; it must be a whole number, or an integer tensor []"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2.0}, "num_classes is 2.0; it must be a whole number"),
        ({"num_classes": None}, "num_classes is None; it must be a whole number"),
        ({"preset": ["paper"]}, "preset is a list; it must be 'recommended' or 'paper'"),
        ({"percentile": "20"}, "percentile is '20'; it must be a number"),
        ({"percentile": np.array([20, 80])}, "percentile is a NumPy array; it must be a number"),
        ({"discrepancy_weight": None}, "discrepancy_weight is None; it must be a number"),
        ({"pseudo_weight": "1"}, "pseudo_weight is '1'; it must be a number"),
        ({"pseudo_dice_weight": [1]}, "pseudo_dice_weight is a list; it must be a number"),
        ({"contrast_weight": torch.tensor(0.1)}, "contrast_weight is a Tensor; it must be a number"),
        ({"gate": 0.3}, "gate is 0.3; it must be a pair (low, high)"),
        ({"gate": (None, 0.7)}, "the first number of gate is None; it must be a number"),
        ({"ramp_steps": "6000"}, "ramp_steps is '6000'; it must be a number"),
        ({"temperature": True}, "temperature is True; it must be a number"),
        ({"anchors": 25.5}, "anchors is 25.5; it must be a whole number"),
        ({"negatives": None}, "negatives is None; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"ignore_index": None}, "ignore_index is None; it must be a whole number"),
        ({"class_balance": "off"}, "class_balance is 'off'; it must be True, False or None"),
        ({"class_balance": np.ones(2)}, "class_balance is a NumPy array; it must be True, False or None"),
        ({"group": "WORLD"}, "group is 'WORLD'; it must be a torch.distributed.ProcessGroup or None"),
    ],
)
def test_an_option_of_the_wrong_kind_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        DualContrastiveLoss(**{"num_classes": 2, **options})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_weight_is_a_finite_number_from_0(value: float) -> None:
    with pytest.raises(ValueError, match=f"^discrepancy_weight is {value}; it must be from 0 to 1e\\+06$"):
        DualContrastiveLoss(2, discrepancy_weight=value)


def test_options_of_the_head_are_named() -> None:
    with pytest.raises(TypeError, match=r"^channels is 16\.0; it must be a whole number$"):
        DualContrastiveHead(2, 16.0)
    with pytest.raises(TypeError, match=r"^dropout is None; it must be a number$"):
        DualContrastiveHead(2, 16, dropout=None)
    with pytest.raises(ValueError, match=r"^dropout is 1\.5; it must be from 0 to 1$"):
        DualContrastiveHead(2, 16, dropout=1.5)
    with pytest.raises(ValueError, match=r"^features has 6 channels \(dimension 1\); the classifier takes 5$"):
        DualContrastiveHead(3, 5)(*(batch()[name] for name in ("features_a", "features_b", "labels")))


def test_more_than_32_classes_are_refused_in_one_sentence() -> None:
    assert too_many_classes(40) == (
        "there are 40 classes, and sslfast takes at most 32, background included; "
        "merge classes in the label maps, or leave some of them out; the commands do both by --classes"
    )
    for make in (lambda: DualContrastiveLoss(40), lambda: DualContrastiveHead(40, 16)):
        with pytest.raises(ValueError, match=f"^num_classes: {re.escape(too_many_classes(40))}$"):
            make()
    assert DualContrastiveLoss(32).num_classes == 32


def test_features_of_another_width_matter_only_to_the_contrastive_loss() -> None:
    given = batch(features_b=torch.randn(4, 2, *SIZE))
    same = DualContrastiveLoss(3)(**{**given, "features_b": given["features_a"]}).loss
    assert torch.equal(DualContrastiveLoss(3)(**given).loss, same)
    with pytest.raises(ValueError, match=r"same number of channels.*nn\.Conv3d\(2, 6, 1\), or set contrast_weight=0$"):
        DualContrastiveLoss(3, **IN_CONTRAST)(**given)


def test_the_projection_that_the_message_names_trains_the_narrower_network() -> None:
    narrow, projection = torch.randn(4, 2, *SIZE, requires_grad=True), nn.Conv3d(2, 6, 1)
    given = batch(teacher=None)
    criterion = DualContrastiveLoss(3, percentile=50, **IN_CONTRAST)
    loser = "ba"[int(criterion(**given).terms["winner"])]
    criterion(**{**given, f"features_{loser}": projection(narrow)}).loss.backward()
    assert narrow.grad is not None
    assert narrow.grad.any()
