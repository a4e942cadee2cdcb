"""What an op's arguments must be, beyond the refusals that each op's own tests name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sslfast import ops
from sslfast.ops.check import check_map, check_step, too_many_classes
from sslfast.ops.dual_contrastive import Options
from sslfast.ops.linear_logits import LinearLogits, linear_logits

LOGITS, FEATURES = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 6, 4, 5, 6)
FLAGS, LABELS = torch.zeros(2, 4, 5, 6, dtype=torch.uint8), torch.zeros(2, 4, 5, 6, dtype=torch.int64)
ROWS, COUNTS = torch.randn(3, 2, 6), torch.ones(3, dtype=torch.int64)
OPTIONS = Options(True, "mask", False, (0.3, 0.7), -1, contrast=True, temperature=0.1, anchors=2, negatives=2, seed=1)
OPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # the arguments that are tensors, and the others
    "dual_supervised": (
        {"logits_a": LOGITS, "logits_b": LOGITS, "labels": LABELS},
        {"threshold": 0.6, "ignore_index": -1, "discrepancy_over": "mask", "smooth": 1e-5},
    ),
    "pseudo_supervised": ({"logits": LOGITS, "flags": FLAGS}, {"smooth": 1e-5}),
    "rectified_consistency": ({"student": LOGITS, "teacher": LOGITS, "flags": FLAGS}, {"smooth": 1e-5}),
    "masked_consistency": ({"student": LOGITS, "teacher": LOGITS}, {"temperature": 1.0, "max_entropy": 1.0}),
    "reliability": ({"logits": LOGITS}, {"percentile": 20.0}),
    "class_prototypes": (
        {"features": FEATURES, "flags": FLAGS, "other": FEATURES, "second": torch.tensor(0)},
        {"num_classes": 3},
    ),
    "sample_voxels": ({"flags": FLAGS}, {"quotas": [2, 2, 2], "seed": 1, "step": 1, "role": "anchors"}),
    "gather_voxels": ({"features": FEATURES, "indices": COUNTS}, {}),
    "voxel_infonce": (
        {
            **{"anchors": ROWS, "anchor_counts": COUNTS, "prototypes": ROWS[:, 0], "prototype_counts": COUNTS},
            **{"negatives": ROWS, "negative_counts": COUNTS},
        },
        {"temperature": 0.1},
    ),
    "norm_act": ({"x": FEATURES, "weight": torch.ones(6), "bias": torch.zeros(6)}, {"eps": 1e-5}),
    "dual_contrastive": (
        {**{"logits_a": LOGITS, "logits_b": LOGITS, "features_a": FEATURES, "features_b": FEATURES}, "labels": LABELS},
        {"options": OPTIONS, "weights": {}, "percentile": 20.0, "step": 1},
    ),
}
TENSORS = [(op, name) for op, (tensors, _) in OPS.items() for name in tensors]
NUMBERS = [(op, name) for op, (_, others) in OPS.items() for name in others if name not in ("options", "weights")]
TOGETHER = ("other", "second")  # None is allowed for both


def refusal(op: str, name: str, value: object) -> str:
    tensors, others = OPS[op]
    with pytest.raises(TypeError) as error:
        getattr(ops, op)(**{**tensors, **others, name: value})
    return str(error.value)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_what_is_no_tensor_is_named(op: str, name: str) -> None:
    if name not in TOGETHER:
        assert refusal(op, name, None) == f"{name} is None; it must be a torch.Tensor"
    assert refusal(op, name, [1.0, 2.0]) == f"{name} is a list; it must be a torch.Tensor"
    assert refusal(op, name, np.ones((2, 3))) == f"{name} is a NumPy array; it must be a torch.Tensor"


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_sparse_tensor_and_one_of_another_kind_of_number_are_named(op: str, name: str) -> None:
    good = OPS[op][0][name]
    assert refusal(op, name, good.to_sparse()) == f"{name} is a sparse_coo tensor; it must be dense, as of .to_dense()"
    other = good.double() if not good.is_floating_point() else good.long()
    assert refusal(op, name, other).startswith(f"{name} has dtype {other.dtype}; it must be ")
    assert refusal(op, name, good.bool()).startswith(f"{name} has dtype torch.bool; it must be ")


@pytest.mark.parametrize(("op", "name"), NUMBERS)
def test_a_number_or_word_of_the_wrong_kind_is_named(op: str, name: str) -> None:
    for value, shown in ((None, "None"), (np.ones(2), "a NumPy array"), ({}, "a dict"), (True, "True")):
        assert f"{name} is {shown}; it must be" in refusal(op, name, value)
    if isinstance(OPS[op][1][name], int):
        assert f"{name} is 1.5; it must be a whole number" in refusal(op, name, 1.5)


@pytest.mark.parametrize("op", [name for name in OPS if name != "gather_voxels"])
def test_a_process_group_in_place_of_a_reducer_is_named(op: str) -> None:
    assert refusal(op, "reducer", object()) == "reducer is an object; it must be a sslfast.ops.reduce.Reducer"


@pytest.mark.parametrize("op", ["pseudo_supervised", "reliability"])
def test_parts_of_linear_logits_are_named(op: str) -> None:
    weights = torch.randn(2, 3, 7)
    assert refusal(op, "logits", LinearLogits(None, weights)) == "logits.features is None; it must be a torch.Tensor"
    assert refusal(op, "logits", LinearLogits(FEATURES, [1])) == "logits.weights is a list; it must be a torch.Tensor"
    with pytest.raises(ValueError, match=r"logits.weights has shape \(2, 3, 6\); .* it must be \[2, C, 7\]"):
        check_map("logits", LinearLogits(FEATURES, weights[:, :, 1:]))
    for dtype in (torch.float64, torch.bfloat16):  # the kernels would read other numbers
        message = refusal(op, "logits", LinearLogits(FEATURES, weights.to(dtype)))
        assert message == f"logits.weights has dtype {dtype}; it must be float32"
    with pytest.raises(ValueError, match=r"logits.weights is on meta; it must be on the device of logits.features"):
        check_map("logits", LinearLogits(FEATURES, weights.to("meta")))
    with pytest.raises(ValueError, match=r"features has 6 channels \(dimension 1\); the classifier takes 5"):
        linear_logits(torch.nn.Conv3d(5, 3, 1), FEATURES)


@pytest.mark.parametrize("op", ["dual_supervised", "pseudo_supervised", "rectified_consistency", "masked_consistency"])
def test_more_classes_than_the_kernels_take_are_refused_in_one_sentence(op: str) -> None:
    many = torch.zeros(2, 33, 4, 5, 6)
    maps = {name: many for name in OPS[op][0] if name not in ("labels", "flags")}
    with pytest.raises(ValueError, match="merge classes in the label maps, or leave some of them out") as error:
        getattr(ops, op)(**{**OPS[op][0], **maps})
    assert str(error.value).endswith(f": {too_many_classes(33)}")
    assert too_many_classes(33).startswith("there are 33 classes, and sslfast takes at most 32, background included")


@pytest.mark.parametrize("op", ["class_prototypes", "gather_voxels", "norm_act"])
def test_a_map_without_channels_is_refused(op: str) -> None:
    tensors, others = OPS[op]
    name = "x" if op == "norm_act" else "features"
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 0, 4, 5, 6\); it must have at least one channel"):
        getattr(ops, op)(**{**tensors, **others, name: FEATURES[:, :0]})


def test_more_voxels_than_there_can_be_are_refused() -> None:
    with pytest.raises(ValueError, match="a number of quotas is 4611686018427387904; it must be from 0 to 2"):
        ops.sample_voxels(FLAGS, [2, 2**62], 1, 1)


@pytest.mark.parametrize(("step", "kind"), [(1.5, "1.5"), (True, "True"), (None, "None"), ([1], "a list")])
def test_a_step_that_is_no_whole_number_is_named(step: Any, kind: str) -> None:
    with pytest.raises(TypeError) as error:
        check_step(step, torch.device("cpu"))
    assert str(error.value) == f"step is {kind}; it must be a whole number, or an integer tensor []"
    check_step(np.int64(3), torch.device("cpu"))


@pytest.mark.parametrize(("op", "name"), [("reliability", "percentile"), ("class_prototypes", "second")])
def test_a_tensor_in_place_of_a_number_has_no_dimension(op: str, name: str) -> None:
    tensors, others = OPS[op]
    with pytest.raises(ValueError, match=rf"^{name} has shape \(1,\) on cpu; as a tensor it must be \[\] on cpu"):
        getattr(ops, op)(**{**tensors, **others, name: torch.tensor([1])})
    assert refusal(op, name, torch.tensor(1).to_sparse()).startswith(f"{name} is a sparse_coo tensor")


def test_a_capture_that_would_repeat_the_draw_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sslfast.ops.check._is_capturing", lambda device: True)
    check_step(5, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="step 5 would be part of it, so that every replay drew the same voxels"):
        check_step(5, torch.device("cuda"))
