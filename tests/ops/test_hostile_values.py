"""Values that no caller should pass: what is refused, what counts nowhere, and what reads and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from helpers.maps import DTYPES, random_flags, random_map
from helpers.options import TARGET, kernels_and_reference, on_every_backend
from sslfast.ops import (
    dual_supervised,
    gather_voxels,
    masked_consistency,
    pseudo_supervised,
    rectified_consistency,
    voxel_infonce,
)
from sslfast.ops.backend import backend, ops_for
from sslfast.ops.flags import RELIABLE
from sslfast.ops.voxel_infonce import voxel_infonce_ref

SIZE = (5, 6, 7)
BAD = [torch.nan, torch.inf, -torch.inf]
OUTSIDE = [2 * 5 * 6 * 7, 2**40, 2**62, -2, -(2**62)]


def inner(padded: Tensor) -> Tensor:
    """The middle volumes of a map, whose outer ones show what was read or written beyond."""
    return padded[1:3]


@on_every_backend
@kernels_and_reference()
def test_an_index_out_of_range_is_refused(name: str) -> None:
    features = random_map(2, 3, SIZE)
    for index in OUTSIDE:
        indices = torch.tensor([[0, -1], [419, index], [index, 0]])
        with backend(name):
            if TARGET.device == "cuda":
                assert gather_voxels(features, indices)[1, 1].isnan().all()
                continue
            with pytest.raises(ValueError, match=rf"indices holds {index} at \(1, 1\); it must be from -1 to 419"):
                gather_voxels(features, indices)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", OUTSIDE)
def test_the_kernels_neither_read_nor_write_out_of_range(index: int, dtype: torch.dtype) -> None:
    features, grad = random_map(4, 3, SIZE, dtype), random_map(4, 3, SIZE, dtype)
    before, indices = grad.clone(), torch.tensor([3, index, 3, -1, 419])
    rows = ops_for(features).gather_voxels(inner(features), indices)
    assert rows[1].isnan().all()
    assert not rows[3].any()
    assert torch.equal(rows[0], inner(features)[0, :, 0, 0, 3].float())
    ops_for(features).gather_voxels_backward(torch.ones(5, 3), indices, inner(grad))
    changed = (grad != before).any(1).flatten(1).nonzero().tolist()
    assert changed == [[1, 3], [2, 209]]


@kernels_and_reference()
def test_no_map_has_no_voxel(name: str) -> None:
    with backend(name):
        assert not gather_voxels(torch.zeros(0, 3, *SIZE), torch.tensor([-1, -1])).any()
        with pytest.raises(ValueError, match=r"indices holds 0 at \(1,\); it must be from -1 to -1"):
            gather_voxels(torch.zeros(0, 3, *SIZE), torch.tensor([-1, 0]))


def contrast() -> list[Tensor]:
    counts = (torch.tensor([4, 2, 0]), torch.tensor([3, 2, 2]), torch.tensor([5, 0, 3]))
    return [torch.randn(3, 4, 8), counts[0], torch.randn(3, 8), counts[1], torch.randn(3, 5, 8), counts[2]]


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize(("which", "name_of", "most"), [(1, "anchor_counts", 4), (5, "negative_counts", 5)])
@pytest.mark.parametrize("count", [-1, 6, 2**40, -(2**40)])
def test_a_count_beyond_the_rows_is_refused(name: str, which: int, name_of: str, most: int, count: int) -> None:
    case = contrast()
    case[which][1] = count
    with backend(name):
        if TARGET.device == "cuda":
            assert voxel_infonce(*case).loss.isnan()
            return
        with pytest.raises(ValueError, match=rf"{name_of} holds {count} at \(1,\); it must be from 0 to {most}"):
            voxel_infonce(*case)


@on_every_backend
@pytest.mark.parametrize("which", [1, 5])
@pytest.mark.parametrize("count", [-1, 6, 2**40, -(2**40)])
def test_the_kernels_read_no_row_beyond_the_last(which: int, count: int) -> None:
    case = contrast()
    case[which][1] = count
    sums, lse = ops_for(case[0]).voxel_infonce(*case, 0.1)
    assert sums[0].isnan()
    assert voxel_infonce_ref(*case, 0.1)[0].isnan()
    fits = [t.clone() for t in case]
    fits[which].clamp_(0, case[which - 1].shape[1])
    grad = ops_for(case[0]).voxel_infonce_backward(torch.ones(2).double(), lse, *case, 0.1)
    assert torch.equal(grad, ops_for(case[0]).voxel_infonce_backward(torch.ones(2).double(), lse, *fits, 0.1))


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("classes", [2, 3, 5, 31, 32])
def test_flags_of_a_class_that_does_not_exist_are_refused(name: str, classes: int) -> None:
    logits, other, flags = random_map(2, classes, SIZE), random_map(2, classes, SIZE), random_flags(2, classes, SIZE)
    flags[1, 2, 3, 4] = 31  # unreliable: its class does not matter
    with backend(name):
        assert not pseudo_supervised(logits, flags).ce.isnan()
        for wrong in {RELIABLE + classes, 64, 96, 255}:
            flags[1, 2, 3, 5] = flags[1, 4, 0, 0] = wrong
            message = rf"flags holds 2 values above {31 + classes}, .*; the first, {wrong}, is at \(1, 2, 3, 5\)"
            if TARGET.device == "cuda":
                assert pseudo_supervised(logits, flags).ce.isnan()
                assert rectified_consistency(logits, other, flags).rectified.isnan()
                continue
            with pytest.raises(ValueError, match=message):
                pseudo_supervised(logits, flags)
            with pytest.raises(ValueError, match=message):
                rectified_consistency(logits, other, flags)


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_counts_of_every_dtype_and_layout_give_the_same(name: str, dtype: torch.dtype) -> None:
    case = contrast()
    with backend(name):
        expected = voxel_infonce(*case)
        for which in (1, 3, 5):
            case[which] = torch.stack((case[which], 0 * case[which] - 99), 1)[:, 0].to(dtype)
            case[which] = case[which].repeat_interleave(2)[::2]
        assert voxel_infonce(*case) == expected
        for which in (1, 3, 5):
            case[which] = torch.tensor([2], dtype=dtype).expand(3)
        assert voxel_infonce(*case) == voxel_infonce(*(t.contiguous() if t.ndim > 1 else t.long() for t in case))


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("bad", BAD)
def test_vectors_that_are_no_numbers_spoil_what_they_count_in_and_nothing_else(name: str, bad: float) -> None:
    case = contrast()
    case[0].requires_grad_()
    case[3][1] = 0  # prototype 1 and the anchors of class 1 count nowhere; class 2 has no anchor
    with backend(name):
        expected = voxel_infonce(*case).loss
        gradient = torch.autograd.grad(expected, case[0])[0]
        for which, row in ((0, (0, 0, 3)), (0, (0, 3, 7)), (2, (0, 3)), (4, (0, 0, 0)), (4, (0, 4, 5))):
            spoiled = [t.detach().clone() for t in case]
            spoiled[which][row] = bad
            assert voxel_infonce(*spoiled).loss.isnan()
        for which, row in ((0, (1, 0, 3)), (0, (2, 0, 0)), (2, (1, 3)), (4, (1, 0, 5)), (4, (2, 0, 0))):
            case[which].data[row] = bad
        found = voxel_infonce(*case).loss
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found, case[0])[0], gradient)


def test_a_negative_number_of_voxels_is_refused() -> None:
    case = contrast()
    case[3][2] = -3
    with pytest.raises(ValueError, match=r"prototype_counts holds -3 at \(2,\); it must be at least 0"):
        voxel_infonce(*case)


def losses(op: Callable[..., tuple[Tensor, ...]], *arguments: Tensor, **options: float) -> list[Tensor]:
    """The floating-point results."""
    return [value for value in op(*arguments, **options) if value.is_floating_point()]


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("bad", BAD)
def test_logits_of_voxels_that_count_in_no_sum_do_not_matter(name: str, bad: float, classes: int) -> None:
    a, b = random_map(2, classes, SIZE), random_map(2, classes, SIZE)
    labels, flags = torch.randint(0, classes, (2, *SIZE)), random_flags(2, classes, SIZE)
    labels[1, 2, 3, 4], flags[1, 2, 3, 4] = -1, 1
    b[1, :, 2, 3, 4] = 0  # the teacher is not sure

    def every_loss(a: Tensor) -> list[Tensor]:
        certain = losses(partial(masked_consistency, max_entropy=0.6), a, b)
        return [*losses(dual_supervised, a, b, labels), *losses(pseudo_supervised, a, flags), *certain]

    with backend(name):
        expected = every_loss(a)
        for c in range(classes):
            spoiled = a.clone()
            spoiled[1, c, 2, 3, 4] = bad
            spoiled.requires_grad_()
            found = every_loss(spoiled)
            torch.testing.assert_close(found, expected)
            sum(value.sum() for value in found if value.requires_grad).backward()
            assert spoiled.grad is not None
            assert spoiled.grad.isfinite().all()
            assert not spoiled.grad[1, :, 2, 3, 4].any()


@on_every_backend
@kernels_and_reference()
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("bad", BAD)
def test_a_logit_that_is_no_number_makes_what_it_counts_in_nan(name: str, bad: float, classes: int) -> None:
    a, b = random_map(2, classes, SIZE), random_map(2, classes, SIZE)
    labels, flags = torch.randint(0, classes, (2, *SIZE)), random_flags(2, classes, SIZE)
    with backend(name):
        for c in range(classes):
            spoiled = a.clone()
            spoiled[1, c, 2, 3, 4] = bad
            for label in range(classes):  # the class of the logit, and another
                labels[1, 2, 3, 4], flags[1, 2, 3, 4] = label, RELIABLE + label
                found = dual_supervised(spoiled, b, labels)
                assert found.ce.isnan().tolist() == found.dice.isnan().tolist() == [True, False]
                assert pseudo_supervised(spoiled, flags).ce.isnan()
                assert rectified_consistency(spoiled, b, flags).rectified.isnan()
                assert rectified_consistency(b, spoiled, flags).rectified.isnan()
            assert masked_consistency(spoiled, b).loss.isnan()
            assert masked_consistency(b, spoiled, max_entropy=0.1).loss.isnan()


@kernels_and_reference()
@pytest.mark.parametrize("bad", BAD)
def test_a_logit_that_is_no_number_counts_the_same_when_compiled(name: str, bad: float) -> None:
    logits, flags = random_map(2, 3, SIZE), random_flags(2, 3, SIZE)
    flags[0, 0, 0, 0], flags[1, 0, 0, 0] = 0, RELIABLE
    compiled = torch.compile(lambda z: pseudo_supervised(z, flags).ce, fullgraph=True)
    for volume in (0, 1):
        spoiled = logits.clone()
        spoiled[volume, 1, 0, 0, 0] = bad
        with backend(name):
            assert bool(compiled(spoiled.requires_grad_()).isnan()) == (volume == 1)


@on_every_backend
@kernels_and_reference()
def test_a_logit_that_is_no_number_spoils_the_discrepancy_where_it_is_on_the_mask(name: str) -> None:
    a, b = torch.zeros(2, 1, 3, 1, 1, 2)
    b[0, 2, 0, 0, 1] = 9.0  # the second voxel is on the mask whatever a says, the first is not: a is sure of nothing
    labels = torch.ones(1, 1, 1, 2, dtype=torch.long)
    for voxel in (0, 1):
        spoiled = a.clone()
        spoiled[0, 0, 0, 0, voxel] = -torch.inf
        with backend(name):
            found = dual_supervised(spoiled, b, labels)
        assert found.ce.isnan().tolist() == [True, False]
        assert found.discrepancy.isnan().tolist() == [voxel == 1, False]
