"""The cases of tests/pins.json: their inputs, and what the loss gives of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import sslfast
from sslfast.methods.as_released import as_released_loss

PINS = Path(__file__).parents[1] / "pins.json"
LABELLED, UNLABELLED, CHANNELS = 2, 2, 8
STEP, RAMP_STEPS, ANCHORS, NEGATIVES = 3, 5, 9, 11
MAPS = ("logits_a", "logits_b", "features_a", "features_b")


class Inputs(NamedTuple):
    """One batch; the numbers have three decimals, so that float32 and float64 start from the same ones."""

    maps: dict[str, NDArray[np.float64]]  # logits_a, logits_b, features_a, features_b and teacher
    labels: NDArray[np.int64]

    def digest(self) -> str:
        digest = hashlib.sha256()
        for values in self.maps.values():
            digest.update(np.rint(1000 * values).astype("<i4").tobytes())
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


def make_inputs(classes: int, seed: int) -> Inputs:
    """Two networks and a teacher that agree in part, with sharp and blurred voxels; labels with ignored voxels."""
    random = np.random.RandomState(seed)  # its stream never changes
    volumes, size = LABELLED + UNLABELLED, (5, 6, 7) if classes == 14 else (7, 8, 9)
    truth = random.randint(0, classes, (volumes, *size))
    if classes > 2:
        truth[truth == 2] = 0  # a class without labels
    scale = random.choice([0.5, 1.0, 3.0], (volumes, 1, *size))
    common = random.randn(volumes, classes, *size)
    common += 1.5 * np.moveaxis(np.eye(classes)[truth], -1, 1)
    maps = {name: scale * (common + 0.6 * random.randn(*common.shape)) for name in MAPS[:2]}
    maps |= {name: random.randn(volumes, CHANNELS, *size) for name in MAPS[2:]}
    maps["teacher"] = (scale * (common + 0.4 * random.randn(*common.shape)))[LABELLED:]
    labels = np.where(random.rand(LABELLED, *size) < 0.1, -1, truth[:LABELLED])
    return Inputs({name: np.rint(1000 * values) / 1000 for name, values in maps.items()}, labels)


class Computed(NamedTuple):
    """What a case gives."""

    values: dict[str, Tensor]  # loss_a, loss_b and every term
    gradients: dict[str, Tensor]  # of the four maps


def compute(case: str, inputs: Inputs, dtype: torch.dtype, backend: str, device: str = "cpu") -> Computed:
    """The case, named preset-classes[-teacher]; as-released is no preset, but a function."""
    preset, classes, teacher = parse(case)
    leaves = [torch.tensor(inputs.maps[name], dtype=dtype, device=device, requires_grad=True) for name in MAPS]
    labels = torch.tensor(inputs.labels, device=device)
    teacher_map = torch.tensor(inputs.maps["teacher"], dtype=dtype, device=device) if teacher else None
    with sslfast.backend(backend):
        if preset == "as-released":
            a, b, f, g = leaves
            result = as_released_loss(a, b, f, g, labels, STEP, ramp_steps=RAMP_STEPS, anchors=ANCHORS)
        else:
            criterion = sslfast.DualContrastiveLoss(
                classes,
                preset=preset,  # type: ignore[arg-type]
                gate=(0, 0),
                contrast_weight=0.1,
                ramp_steps=RAMP_STEPS,
                anchors=ANCHORS,
                negatives=NEGATIVES,
            )
            result = criterion(*leaves, labels, step=STEP, teacher=teacher_map)
        grads = torch.autograd.grad(result.loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(m) if g is None else g for m, g in zip(leaves, grads)]
    values = {"loss_a": result.loss_a, "loss_b": result.loss_b, **result.terms}
    return Computed(
        {name: value.detach().cpu() for name, value in values.items()},
        {name: gradient.cpu() for name, gradient in zip(MAPS, gradients)},
    )


def parse(case: str) -> tuple[str, int, bool]:
    """Preset, number of classes and whether there is a teacher."""
    name = case.removesuffix("-teacher")
    preset, _, classes = name.rpartition("-")
    return preset, int(classes), name != case


def voxels_with_gradient(gradient: Tensor) -> int:
    return int((gradient != 0).any(1).sum())
