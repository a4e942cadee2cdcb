"""Prototype sums against a loop over voxels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sslfast.ops import class_prototypes
from sslfast.ops.class_prototypes import unit
from sslfast.ops.flags import RELIABLE


def random_case(classes: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = torch.randn(2, width, 3, 4, 2, dtype=torch.float64)
    label = torch.randint(0, classes, (2, 3, 4, 2))
    reliable = torch.rand(2, 3, 4, 2) < 0.5
    return features, label, reliable, (label + RELIABLE * reliable).to(torch.uint8)


@pytest.mark.parametrize(("classes", "width"), [(2, 1), (3, 16), (14, 5), (32, 3)])
def test_equals_a_loop_over_voxels(classes: int, width: int) -> None:
    features, label, reliable, flags = random_case(classes, width)
    features[0, :, 0, 0, 0] = 0  # it has no direction
    sums, counts = class_prototypes(features.requires_grad_(), flags, classes)
    expected = torch.zeros(classes, width, dtype=torch.float64)
    members = [0] * classes
    for n, x, y, z in reliable.nonzero().tolist():
        f = features.detach()[n, :, x, y, z]
        expected[label[n, x, y, z]] += f / f.norm().clamp_min(1e-12)
        members[label[n, x, y, z]] += 1
    assert torch.allclose(sums, expected, rtol=1e-10)
    assert counts.tolist() == members
    assert not sums.requires_grad


def test_unit_vectors() -> None:
    vectors = torch.randn(5, 7, dtype=torch.float64)
    assert torch.allclose(unit(vectors, 1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    nothing = torch.zeros(3, 2, requires_grad=True)
    assert not unit(nothing, 1).any()
    unit(nothing, 1).sum().backward()
    assert not nothing.grad.any()


def test_nothing_reliable_gives_zero() -> None:
    features, _, _, flags = random_case(2, 4)
    sums, counts = class_prototypes(features, flags & ~RELIABLE, 2)
    assert not sums.any()
    assert not counts.any()


def test_refusals_name_the_argument() -> None:
    features, _, _, flags = random_case(2, 4)
    with pytest.raises(ValueError, match="flags has shape"):
        class_prototypes(features, flags[:, :2], 2)
    with pytest.raises(ValueError, match="num_classes is 1"):
        class_prototypes(features, flags, 1)
    with pytest.raises(TypeError, match="features has dtype"):
        class_prototypes(features.long(), flags, 2)
    with pytest.raises(ValueError, match="other and second go together"):
        class_prototypes(features, flags, 2, other=features)
