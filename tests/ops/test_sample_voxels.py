"""The voxel sample against its definition, and the kernels that draw and gather it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.compare import ROUNDING, reference, with_gradients
from helpers.maps import DTYPES, layouts, random_flags, random_map
from helpers.options import TARGET, not_on, on_every_backend, some
from sslfast.ops import gather_voxels, sample_voxels
from sslfast.ops.backend import backend, ops_for
from sslfast.ops.flags import RELIABLE
from sslfast.ops.sample_voxels import sample_voxels_ref


def test_another_step_seed_or_role_is_another_draw() -> None:
    flags = torch.zeros(1, 20, 20, 20, dtype=torch.uint8)
    flags[:, 10:] = RELIABLE + 1
    drawn = [
        sample_voxels(flags, [50, 50], *key).indices[0].tolist() for key in [(1, 0), (1, 1), (2, 0), (1 + 2**32, 0)]
    ]
    assert drawn[0] == sample_voxels(flags, [50, 50], 1, 0).indices[0].tolist()
    assert len({tuple(d) for d in drawn}) == 4


def test_draws_are_uniform() -> None:
    flags = torch.zeros(1, 10, 10, 10, dtype=torch.uint8)
    hits = torch.zeros(1000)
    for step in range(400):
        hits[sample_voxels(flags, [100, 0], 7, step).indices[0]] += 1
    # 400 draws of 10 %: mean 40, standard deviation 6; a chi-square of 1000 cells stays far below 1300
    assert hits.mean() == 40
    assert ((hits - 40) ** 2 / 36).sum() < 1300


def test_gather_reads_the_drawn_voxels_and_routes_their_gradient() -> None:
    features = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 119, 120, 239], [7, -1, -1, -1]])
    vectors = gather_voxels(features, indices)
    rows = features.detach().movedim(1, -1).reshape(-1, 3)
    assert torch.equal(vectors[0], rows[indices[0]])
    assert not vectors[1, 1:].any()
    vectors.sum().backward()
    touched = features.grad.movedim(1, -1).reshape(-1, 3)
    assert touched.sum() == 3 * 5
    assert touched[[0, 7, 119, 120, 239]].eq(1).all()


def test_no_unlabelled_volume_gives_an_empty_sample() -> None:
    sample = sample_voxels(torch.zeros(0, 4, 4, 4, dtype=torch.uint8), [3, 3], 0, 0)
    assert sample.counts.tolist() == [0, 0]
    features = torch.zeros(0, 5, 4, 4, 4, requires_grad=True)
    vectors = gather_voxels(features, sample.indices)
    assert vectors.shape == (2, 3, 5)
    vectors.sum().backward()


def test_refusals_name_the_argument() -> None:
    flags = random_flags(2, 2, (6, 7, 5), reliable=0.5)
    with pytest.raises(TypeError, match="flags has dtype"):
        sample_voxels(flags.long(), [1, 1], 0, 0)
    with pytest.raises(ValueError, match="quotas is"):
        sample_voxels(flags, [1, -1], 0, 0)
    with pytest.raises(ValueError, match="step is -1"):
        sample_voxels(flags, [1, 1], 0, -1)
    with pytest.raises(ValueError, match="role is 'keys'"):
        sample_voxels(flags, [1, 1], 0, 0, role="keys")


# The kernels


@on_every_backend
@pytest.mark.parametrize("role", ["anchors", "negatives"])
@pytest.mark.parametrize("classes", some([2, 5, 32], 2))
@pytest.mark.parametrize("voxels", some([0, 1, 1025 if TARGET.interpreted else 4097, 15, 16, 40000], 3))
def test_the_sample_is_the_references(role: Any, classes: int, voxels: int) -> None:
    flags = random_flags(1, classes, (voxels,), reliable=0.7)
    quotas = torch.randint(0, 300, (classes,)).tolist()
    seed, step = int(torch.randint(0, 2**62, ())) * 4 + 3, int(torch.randint(0, 2**32 - 1, ()))
    sample = sample_voxels(flags, quotas, seed, step, role=role)
    for number in (step, torch.tensor(step)):
        for name in (TARGET.backend, "reference"):
            with backend(name):
                expected = sample_voxels(flags, quotas, seed, number, role=role)
            assert all(map(torch.equal, sample, expected))


@on_every_backend
def test_rare_classes_and_large_quotas_are_sampled_whole() -> None:
    voxels = 2_000 if TARGET.interpreted else 50_000  # Triton compares each candidate with every other
    flags = torch.zeros(1, voxels, dtype=torch.uint8)
    flags[0, :: voxels // 5] = 3
    for quotas in ([10, 10, 10, 10], [voxels, 0, 1, 100]):
        sample = sample_voxels(flags, quotas, 1, 2)
        with backend("reference"):
            assert torch.equal(sample.indices, sample_voxels(flags, quotas, 1, 2).indices)


@on_every_backend
@not_on("reference")
@pytest.mark.parametrize("first", [5, 2**32 - 1000, 2**40 + 3])
def test_a_draw_that_counts_from_another_voxel_is_the_references(first: int) -> None:
    flags = random_flags(2, 2, (9, 11, 13))
    for role in ("anchors", "negatives"):
        sample = ops_for(flags).sample_voxels(flags, [30, 40], 1337, torch.tensor(7), role == "negatives", first)
        assert all(map(torch.equal, sample, sample_voxels_ref(flags, [30, 40], 1337, 7, role, first)))


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_rows_and_their_gradient_are_the_references_in_every_layout(dtype: torch.dtype) -> None:
    features = random_map(3, 7, (4, 5, 6), dtype)
    indices = torch.tensor([[0, 119, 120], [359, -1, 5], [5, 5, -1]])  # a voxel may come twice
    for values in (features, *layouts(features).values()):
        ours = with_gradients(lambda f: [gather_voxels(f, indices)], values)
        exact = reference(lambda f: [gather_voxels(f, indices)], features)
        assert torch.equal(ours[0].double(), exact[0])
        torch.testing.assert_close(ours[1].double(), exact[1], rtol=ROUNDING[dtype], atol=0)


@on_every_backend
@not_on("reference")
def test_rows_beyond_2_to_the_31_elements_are_read_and_written() -> None:
    """Only the pages that are touched take memory."""
    f = torch.empty(2, 2, 2**29 + 5, dtype=torch.bfloat16)
    indices = torch.tensor([0, 2**29 + 4, 2**29 + 5, 2 * 2**29 + 9])
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    for volume in f:
        volume[:, :1] = volume[:, -1:] = 0  # what was there is added to
    ops_for(f).gather_voxels_backward(rows, indices, f)
    assert f[1, 1, -1] == 8
    assert f[0, 1, -1] == 4
    assert f[1, 0, 0] == 5
    assert torch.equal(ops_for(f).gather_voxels(f, indices), rows)
