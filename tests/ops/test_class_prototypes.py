"""Prototype sums against a loop over voxels, and the kernels against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from helpers.compare import assert_as_good_as_eager
from helpers.maps import DTYPES, random_flags, random_map
from helpers.options import kernels_and_reference, on_every_backend, some
from sslfast.ops import class_prototypes
from sslfast.ops.backend import backend
from sslfast.ops.class_prototypes import unit
from sslfast.ops.flags import RELIABLE


def random_case(classes: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = torch.randn(2, width, 3, 4, 2, dtype=torch.float64)
    label = torch.randint(0, classes, (2, 3, 4, 2))
    reliable = torch.rand(2, 3, 4, 2) < 0.5
    return features, label, reliable, (label + RELIABLE * reliable).to(torch.uint8)


@pytest.mark.parametrize(("classes", "width"), [(2, 1), (3, 16), (14, 5), (32, 3)])
def test_sums_and_counts_are_those_of_a_loop_over_voxels(classes: int, width: int) -> None:
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


def test_a_unit_vector_has_length_one_and_a_zero_vector_stays_zero() -> None:
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


# The kernels


@on_every_backend
@pytest.mark.parametrize("dtype", some(DTYPES, 2))
@pytest.mark.parametrize(("classes", "width"), [(2, 5), (4, 33), (14, 16), (32, 2), (4, 256)])
def test_sums_are_as_good_as_eager_ones_and_have_no_gradient(classes: int, width: int, dtype: torch.dtype) -> None:
    sizes = some([(5, 6, 7), (33,), (1, 1, 1), (20, 21, 41)], 2)
    for size in sizes if width < 256 or dtype == torch.float32 else sizes[:3]:  # so many take seconds in emulation
        flags = random_flags(2, classes, size)
        assert_as_good_as_eager(
            lambda f, s=flags: list(class_prototypes(f, s, classes)), random_map(2, width, size, dtype)
        )


@on_every_backend
def test_a_feature_of_one_channel_is_its_sign_and_one_of_zeros_has_no_direction() -> None:
    sums, counts = class_prototypes(torch.full((1, 1, 5, 6), -2.0), torch.full((1, 5, 6), RELIABLE + 1).byte(), 2)
    assert sums[:, 0].tolist() == [0, -30]
    assert counts.tolist() == [0, 30]
    sums, counts = class_prototypes(torch.zeros(1, 4, 5, 6), torch.full((1, 5, 6), RELIABLE).byte(), 2)
    assert not sums.any()
    assert counts.tolist() == [30, 0]


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize(("length", "has_direction"), [(2e-12, True), (1e-9, True), (1e-6, True), (5e-13, False)])
def test_a_feature_that_is_longer_than_1e_12_has_a_direction(name: str, length: float, has_direction: bool) -> None:
    features, flags = random_map(2, 6, (7, 8, 9)), random_flags(2, 3, (7, 8, 9))
    features /= torch.linalg.vector_norm(features, dim=1, keepdim=True)
    with backend(name):
        expected, sums = (class_prototypes(f, flags, 3).sums for f in (features, length * features))
    torch.testing.assert_close(sums, expected if has_direction else torch.zeros_like(sums), rtol=1e-5, atol=1e-5)


@on_every_backend
@kernels_and_reference()
def test_the_host_need_not_know_whose_prototypes_they_are(name: str) -> None:
    a, b, flags = random_map(2, 6, (7, 8, 9)), random_map(2, 6, (7, 8, 9)), random_flags(2, 3, (7, 8, 9))
    for second, chosen in ((0, a), (1, b)):
        with backend(name):
            result = class_prototypes(a, flags, 3, other=b, second=torch.tensor(second))
            assert all(map(torch.equal, result, class_prototypes(chosen, flags, 3)))


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3])
def test_directions_that_cancel_out_leave_no_rounding(name: str, width: int, dtype: torch.dtype) -> None:
    half = random_map(1, width, (7, 9, 11), dtype)
    lengths = torch.rand(1, 1, 7, 9, 11).add(0.1).to(dtype)  # 1 / |f| times f is no exact 1
    features = torch.cat((half * lengths if width == 1 else half, -half))
    flags = torch.full((2, 7, 9, 11), RELIABLE, dtype=torch.uint8)
    flags[:, 3:] += 1
    flags[0, 6, 8, 10] = RELIABLE + 2  # this class and its opposite are unequal in number
    with backend(name):
        sums, counts = class_prototypes(features, flags, 3)
    assert counts.tolist() == [2 * 3 * 99, 2 * 4 * 99 - 1, 1]
    assert not sums[0].any()
    assert torch.linalg.vector_norm(sums[1:], dim=1).tolist() == pytest.approx([1, 1], rel=1e-3)


@on_every_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("reliable", [True, False])
def test_a_feature_that_is_not_finite_spoils_no_class_but_its_own(value: float, reliable: bool) -> None:
    features, flags = random_map(2, 5, (6, 7), torch.float32), random_flags(2, 3, (6, 7))
    features[1, 2, 3, 4] = value
    flags[1, 3, 4] = 1 + RELIABLE * reliable
    with backend("reference"):
        expected = class_prototypes(features, flags, 3).sums
    assert expected.isnan().any(1).tolist() == [False, reliable, False]
    torch.testing.assert_close(class_prototypes(features, flags, 3).sums, expected, equal_nan=True)
