"""Random views: rigid in voxels, the same for images and predictions; and the teacher that the loss takes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sslfast
from sslfast import views


class Pointwise(nn.Module):
    """Logits of each voxel by itself, with dropout in training."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classifier = nn.Conv3d(1, classes, 1)
        self.dropout = nn.Dropout3d(0.5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.classifier(self.dropout(images)), images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images is None; it must be a torch.Tensor"),
        ([1.0], "images is a list; it must be a torch.Tensor"),
        (torch.ones(1, 1, 4, 4, 4).numpy(), "images is a NumPy array; it must be a torch.Tensor"),
        (torch.ones(1, 1, 4, 4, 4).to_sparse(), "images is a sparse_coo tensor; it must be dense"),
        (torch.ones(1, 1, 4, 4, 4).long(), "images has dtype torch.int64; it must be float32, bfloat16, float16 or"),
    ],
)
def test_images_of_the_wrong_kind_are_named(images: Any, message: str) -> None:
    network = nn.Conv3d(1, 2, 1)
    with pytest.raises(TypeError, match=f"^{message}"):
        views.teacher_view(network, network, images)


def test_images_of_another_shape_and_networks_that_are_none_are_named() -> None:
    network, images = nn.Conv3d(1, 2, 1), torch.ones(1, 1, 4, 4, 4)
    for wrong in (images[0], images[:0]):
        with pytest.raises(ValueError, match=r"it must be \[U, M, D, H, W\] with at least one volume$"):
            views.teacher_view(network, network, wrong)
    with pytest.raises(TypeError, match=r"^network_b is a function; it must be a torch\.nn\.Module$"):
        views.teacher_view(network, lambda x: (x, x), images)
    with pytest.raises(TypeError, match=r"^Conv3d returns a Tensor; it must return \(logits, features\), as ssl"):
        views.teacher_view(network, network, images)


def test_views_keep_angles_and_distances_on_any_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "ZOOM", (1.0, 1.0))
    grid = views.random_affine_grid(torch.zeros(3, 1, 7, 12, 9))
    positions = grid * torch.tensor([9.0, 12.0, 7.0]) / 2  # voxels from the centre
    along = [positions.diff(dim=axis)[:, :6, :8, :8] for axis in (1, 2, 3)]
    for i, step in enumerate(along):
        torch.testing.assert_close(step.norm(dim=-1), torch.ones(3, 6, 8, 8))
        for other in along[:i]:
            torch.testing.assert_close((step * other).sum(-1), torch.zeros(3, 6, 8, 8), atol=1e-5, rtol=0)
    assert not torch.allclose(positions[0], positions[1])


def test_mixed_precision_changes_neither_views_nor_what_has_a_gradient() -> None:
    """A rounded grid would bend the view; weights cast in the teacher's pass would have no gradient in training."""
    networks = [Pointwise(3), Pointwise(3)]
    images = torch.randn(2, 1, 9, 8, 7)
    torch.manual_seed(2)
    exact = views.random_affine_grid(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        seen, teacher = views.teacher_view(*networks, images)
        sum(network(seen)[0].float().square().sum() for network in networks).backward()
    torch.testing.assert_close(seen, views.resample(images, exact), atol=1e-5, rtol=1e-5)
    assert seen.dtype == teacher.dtype == torch.float32
    assert all(network.classifier.weight.grad.any() for network in networks)


def test_what_is_frozen_stays_frozen() -> None:
    class Frozen(Pointwise):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(self.norm(images))

    network = Frozen(2)
    network.norm = nn.BatchNorm3d(1).eval()
    before = network.norm.running_mean.clone()
    views.teacher_view(network, network, 5 + torch.randn(1, 1, 4, 4, 4))
    assert network.training
    assert not network.norm.training
    assert torch.equal(network.norm.running_mean, before)


def test_a_teacher_who_is_very_sure_still_splits_the_voxels() -> None:
    """Were tiny probabilities cut off, most voxels would have one entropy, and none would lie below the percentile."""

    class Sure(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return torch.cat((18 + 12 * images, torch.zeros_like(images)), 1), images

    _, teacher = views.teacher_view(Sure(), Sure(), torch.rand(1, 1, 12, 12, 12))
    leaves = [torch.randn(2, k, 12, 12, 12, requires_grad=True) for k in (2, 2, 4, 4)]
    criterion = sslfast.DualContrastiveLoss(2, percentile=80)
    found = criterion(*leaves, torch.zeros(1, 12, 12, 12, dtype=torch.int64), 0, teacher)
    assert float(found.terms["kept_fraction"]) > 0.75


def test_zoom_stays_within_its_bounds() -> None:
    grid = views.random_affine_grid(torch.zeros(50, 1, 8, 8, 8))
    sizes = torch.stack([(grid * 4).diff(dim=axis)[:, 0, 0, 0].norm(dim=-1) for axis in (1, 2, 3)])
    low, high = views.ZOOM
    assert low < sizes.min() < 0.8 < 1.2 < sizes.max() < high


def test_teacher_is_the_mean_of_both_networks_seen_straight_and_carried() -> None:
    networks = [Pointwise(3).train(), Pointwise(3).train()]
    images = torch.randn(2, 1, 6, 7, 8)
    torch.manual_seed(5)
    seen, teacher = views.teacher_view(*networks, images)
    torch.manual_seed(5)
    grid = views.random_affine_grid(images)
    original = sum(network.classifier(images).softmax(1) for network in networks) / 2
    torch.testing.assert_close(seen, views.resample(images, grid))
    torch.testing.assert_close(teacher.exp(), views.resample(original, grid))
    assert not teacher.requires_grad
    assert all(network.training and network.dropout.training for network in networks)


def test_views_are_drawn_anew_and_repeat_with_the_seed() -> None:
    images = torch.randn(2, 1, 6, 6, 6)
    torch.manual_seed(3)
    first, second = views.random_affine_grid(images), views.random_affine_grid(images)
    torch.manual_seed(3)
    assert torch.equal(first, views.random_affine_grid(images))
    assert not torch.equal(first, second)


def outputs(classes: int) -> list[Tensor]:
    logits = [2 * torch.randn(3, classes, 4, 5, 6, dtype=torch.float64) for _ in range(2)]
    features = [torch.randn(3, 5, 4, 5, 6, dtype=torch.float64) for _ in range(2)]
    return [value.requires_grad_() for value in (*logits, *features)]


@pytest.mark.parametrize("classes", [2, 4])
def test_both_networks_learn_from_the_teacher(classes: int) -> None:
    a, b, *features = outputs(classes)
    teacher = torch.randn(2, classes, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(classes, (1, 4, 5, 6))
    criterion = sslfast.DualContrastiveLoss(classes, percentile=40, gate=(0, 0), contrast_weight=0, ramp_steps=1)
    found = criterion(a, b, *features, labels, 1, teacher)
    target = teacher.detach().softmax(1)
    entropy = -(target * target.log()).sum(1)
    sure = entropy < entropy.flatten().quantile(0.4)
    for own, pseudo, dice in zip((a, b), found.terms["pseudo"], found.terms["pseudo_dice"]):
        p = own[1:].softmax(1)
        kl = (target * (target / p).log()).sum(1)
        ce = nn.functional.cross_entropy(own[1:], target.argmax(1), reduction="none")
        apart = 1 - nn.functional.cosine_similarity(p, target, dim=1).mean()
        torch.testing.assert_close(pseudo, ((-kl).exp() * ce + kl)[sure].mean() + apart)
        overlap = 2 * (p * target).sum((0, 2, 3, 4)) / (p.square() + target.square()).sum((0, 2, 3, 4))
        torch.testing.assert_close(dice, 1 - overlap[1:].mean(), rtol=1e-5, atol=1e-5)
    found.loss.backward()
    assert teacher.grad is None
    assert a.grad[1:].any()
    assert b.grad[1:].any()


@pytest.mark.parametrize("preset", ["recommended", "paper"])
def test_kernels_and_reference_agree_on_what_a_teacher_teaches(preset: Any) -> None:
    leaves = [value.detach().float().requires_grad_() for value in outputs(4)]
    teacher, labels = torch.randn(2, 4, 4, 5, 6), torch.randint(4, (1, 4, 5, 6))
    criterion = sslfast.DualContrastiveLoss(
        4, preset=preset, percentile=60, gate=(0, 0), ramp_steps=1, anchors=8, negatives=8
    ).eval()  # so that the first call does not change the averages
    found = []
    for backend in ("cpu", "reference"):
        with sslfast.backend(backend):
            result = criterion(*leaves, labels, 1, teacher)
            loss = result.loss_a + 3 * result.loss_b
            grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
            found.append([loss.detach(), result.terms["kept_fraction"], *grads])
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_a_teacher_is_sure_below_the_percentile() -> None:
    leaves, teacher = outputs(3), torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    labels = torch.zeros(1, 4, 5, 6, dtype=torch.int64)
    for options, share in (({}, 0.2), ({"percentile": 30}, 0.3), ({"preset": "paper"}, 0.8)):
        criterion = sslfast.DualContrastiveLoss(3, **options)
        kept = [float(criterion(*leaves, labels, 0, t).terms["kept_fraction"]) for t in (None, teacher)]
        assert kept == pytest.approx([share, share], abs=0.01)


@pytest.mark.parametrize("classes", [2, 5])
def test_logits_that_are_not_stored_learn_from_the_teacher_alike(classes: int) -> None:
    features = [torch.randn(3, 6, 4, 5, 6, requires_grad=True) for _ in range(2)]
    teacher, labels = torch.randn(2, classes, 4, 5, 6), torch.randint(classes, (1, 4, 5, 6))
    head = sslfast.DualContrastiveHead(classes, 6, gate=(0, 0), ramp_steps=1, anchors=8, negatives=8)
    head.criterion.eval()  # so that the first call does not change the averages
    leaves = [*features, *head.parameters()]
    found = []
    for stored in (False, True):
        if stored:
            logits = head.classifier_a(features[0]), head.classifier_b(features[1])
            loss = head.criterion(*logits, *features, labels, 1, teacher).loss
        else:
            loss = head(*features, labels, 1, teacher).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    leaves, labels = outputs(2), torch.zeros(1, 4, 5, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match="teacher"):
        sslfast.DualContrastiveLoss(2)(*leaves, labels, teacher=torch.zeros(3, 2, 4, 5, 6))
    with pytest.raises(TypeError, match=r"teacher has dtype torch\.int64"):
        sslfast.DualContrastiveLoss(2)(*leaves, labels, teacher=torch.zeros(2, 2, 4, 5, 6, dtype=torch.int64))


def test_views_keep_lengths_where_voxels_are_longer_along_one_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "ZOOM", (1.0, 1.0))
    spacing = (1.0, 1.0, 3.0)
    grid = views.random_affine_grid(torch.zeros(3, 1, 10, 12, 5), spacing)
    positions = grid * torch.tensor([5.0 * 3, 12.0, 10.0]) / 2  # lengths from the centre, along x, y and z
    for axis, length in enumerate(spacing, 1):
        steps = positions.diff(dim=axis).norm(dim=-1)
        torch.testing.assert_close(steps, torch.full_like(steps, length))


def test_a_flat_volume_is_not_turned_out_of_itself() -> None:
    about_x, about_y, about_z = views.largest_angles((100, 100, 10))
    assert about_z == views.ROTATION
    assert about_x == about_y == pytest.approx(math.atan(0.1))
    assert views.largest_angles((112, 112, 80)) == [views.ROTATION] * 3  # as published


def test_an_isotropic_spacing_changes_nothing() -> None:
    grids = []
    for spacing in ((1, 1, 1), (1.3, 1.3, 1.3)):
        torch.manual_seed(0)
        grids.append(views.random_affine_grid(torch.zeros(2, 1, 8, 9, 7), spacing))
    assert torch.equal(*grids)


def test_a_spacing_that_is_none_is_named() -> None:
    network, images = nn.Conv3d(1, 2, 1), torch.ones(1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"^spacing is \(1, 0, 1\); it must be three positive numbers$"):
        views.teacher_view(network, network, images, spacing=(1, 0, 1))
