"""Prototype sums against a loop over voxels."""

from __future__ import annotations

import pytest
import torch

from sslfast.ops import class_prototypes
from sslfast.ops.class_prototypes import unit
from sslfast.ops.state import RELIABLE


def random_case(classes: int, width: int):
    features = torch.randn(2, width, 3, 4, 2, dtype=torch.float64)
    label = torch.randint(0, classes, (2, 3, 4, 2))
    reliable = torch.rand(2, 3, 4, 2) < 0.5
    return features, label, reliable, (label + RELIABLE * reliable).to(torch.uint8)


@pytest.mark.parametrize(("classes", "width"), [(2, 1), (3, 16), (14, 5), (32, 3)])
def test_equals_a_loop_over_voxels(classes: int, width: int) -> None:
    features, label, reliable, state = random_case(classes, width)
    sums, counts = class_prototypes(features, state, classes)
    expected = torch.zeros(classes, width, dtype=torch.float64)
    members = [0] * classes
    for n, x, y, z in reliable.nonzero().tolist():
        f = features[n, :, x, y, z]
        expected[label[n, x, y, z]] += f / f.norm()
        members[label[n, x, y, z]] += 1
    assert torch.allclose(sums, expected, rtol=1e-10)
    assert counts.tolist() == members


def test_gradcheck() -> None:
    features, _, _, state = random_case(3, 4)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: class_prototypes(f, state, 3).sums, (features,))


def test_zero_feature_vectors_have_no_direction_and_no_gradient() -> None:
    features, _, _, state = random_case(2, 4)
    features[0] = 0
    features.requires_grad_()
    class_prototypes(features, state | RELIABLE, 2).sums.square().sum().backward()
    assert not features.grad[0].any()
    assert torch.isfinite(features.grad).all()
    assert features.grad[1].any()


def test_unit_vectors() -> None:
    vectors = torch.randn(5, 7, dtype=torch.float64)
    assert torch.allclose(unit(vectors, 1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert not unit(torch.zeros(3, 2), 1).any()


def test_nothing_reliable_gives_zero_attached() -> None:
    features, _, _, state = random_case(2, 4)
    features.requires_grad_()
    sums, counts = class_prototypes(features, state & ~RELIABLE, 2)
    assert not sums.any()
    assert not counts.any()
    sums.sum().backward()
    assert not features.grad.any()


def test_refusals_name_the_argument() -> None:
    features, _, _, state = random_case(2, 4)
    with pytest.raises(ValueError, match="state has shape"):
        class_prototypes(features, state[:, :2], 2)
    with pytest.raises(ValueError, match="num_classes is 1"):
        class_prototypes(features, state, 1)
    with pytest.raises(TypeError, match="features has dtype"):
        class_prototypes(features.long(), state, 2)
