"""Random views: rotated and zoomed volumes, with the teacher's prediction resampled onto them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.ops.check import FLOATS, check_tensor, described
from sslfast.renamed import old_names

if not TYPE_CHECKING:
    __getattr__ = old_names(__name__)

ROTATION = math.radians(30)  # largest angle about each axis, but see `largest_angles`
ZOOM = 0.7, 1.4  # range along each axis


class TeacherView(NamedTuple):
    """Random views of unlabelled volumes, and the teacher's prediction for them."""

    images: Tensor  # [U, M, D, H, W] the students' input
    teacher: Tensor  # [U, C, D, H, W] log-probabilities


def teacher_view(
    network_a: nn.Module, network_b: nn.Module, images: Tensor, *, spacing: Sequence[float] = (1, 1, 1)
) -> TeacherView:
    """A random view of each volume, and both networks' averaged prediction for the original volume, resampled onto it.

        view, teacher = teacher_view(network_a, network_b, unlabelled)
        images = torch.cat((labelled, view))
        ...
        result = criterion(logits_a, logits_b, features_a, features_b, labels, step=step, teacher=teacher)

    Segmentation is equivariant to rotation and zoom; enforcing it is a training signal that needs no label
    (transformation-consistent self-ensembling, Li et al., arXiv 1903.00348, with both networks as the teacher).

    A view is rotated by up to 30 degrees about each axis, less about those that would turn a flat volume out of itself,
    and zoomed by 0.7 to 1.4 along each. Outside the volume the nearest voxel is repeated.

    Args:
        network_a, network_b: networks that return (logits [U, C, D, H, W], …). They run in evaluation mode, without
            gradients.
        images: [U, M, D, H, W], U > 0.
        spacing: length of a voxel along D, H and W, in any unit; a volume is rotated in space, not on its grid.

    Raises:
        TypeError: a network is no module or does not return (logits, …); the images are no floating-point tensor.
        ValueError: the images have another shape; the spacing is not three positive numbers.
    """
    for name, network in (("network_a", network_a), ("network_b", network_b)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} is {described(network)}; it must be a torch.nn.Module")
    check_tensor("images", images, FLOATS)
    if images.ndim != 5 or not len(images):
        raise ValueError(f"images has shape {tuple(images.shape)}; it must be [U, M, D, H, W] with at least one volume")
    if len(spacing) != 3 or not all(0 < length < math.inf for length in spacing):
        raise ValueError(f"spacing is {tuple(spacing)}; it must be three positive numbers")
    with torch.no_grad():
        probabilities = (eval_probabilities(network_a, images) + eval_probabilities(network_b, images)) / 2
    torch.clear_autocast_cache()  # its weights were cast without gradient; the training pass must cast them again
    with torch.autocast(images.device.type, enabled=False):
        grid = random_affine_grid(images, spacing)
        teacher = resample(probabilities, grid).clamp_min(torch.finfo(torch.float32).tiny).log()
        return TeacherView(resample(images, grid), teacher)


def eval_probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """Probabilities [U, C, D, H, W] float32 of a network in evaluation mode; restores the mode of each module."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        outputs = network(images)
        if not isinstance(outputs, (tuple, list)):
            raise TypeError(
                f"{type(network).__name__} returns {described(outputs)}; it must return (logits, features), as "
                "sslfast.WithFeatures(network) does"
            )
        probabilities: Tensor = outputs[0].float().softmax(1)
    finally:
        for module in training:
            module.training = True
    return probabilities


def random_affine_grid(images: Tensor, spacing: Sequence[float] = (1, 1, 1)) -> Tensor:
    """Random sampling grids [U, D, H, W, 3] for volumes [U, M, D, H, W], as `torch.nn.functional.grid_sample` takes.

    `spacing`: length of a voxel along D, H and W.
    """
    count, device = len(images), images.device
    lengths = [n * length / min(spacing) for n, length in zip(images.shape[2:], spacing, strict=True)][::-1]  # x, y, z
    angles = torch.empty(3, count, device=device).uniform_(-ROTATION, ROTATION)
    angles = torch.stack([of * (most / ROTATION) for of, most in zip(angles, largest_angles(lengths), strict=True)])
    matrix = torch.empty(count, 3, device=device).uniform_(*map(math.log, ZOOM)).exp().diag_embed()  # [U, 3, 3]
    for axis, angle in enumerate(angles):
        i, k = (other for other in range(3) if other != axis)
        rotation = torch.eye(3, device=device).repeat(count, 1, 1)
        rotation[:, i, i] = rotation[:, k, k] = angle.cos()
        rotation[:, i, k], rotation[:, k, i] = -angle.sin(), angle.sin()
        matrix = rotation @ matrix
    extent = torch.cat([matrix.new_full((1,), length) for length in lengths])  # nothing waits
    matrix = matrix * extent / extent.unsqueeze(1)  # from lengths to the grid's unit, half the extent of an axis
    return F.affine_grid(F.pad(matrix, (0, 1)), list(images.shape), align_corners=False)


def largest_angles(extents: Sequence[float]) -> list[float]:
    """The largest angle of a rotation about each axis of a volume of these extents.

    It is `ROTATION`, unless an edge of the volume would then leave it at the other axis' end.
    """
    pairs = [sorted(extent for other, extent in enumerate(extents) if other != axis) for axis in range(3)]
    return [min(ROTATION, math.atan(short / long)) for short, long in pairs]


def resample(volumes: Tensor, grid: Tensor) -> Tensor:
    """Volumes [U, M, D, H, W] at the grid's points, linearly interpolated; outside the volume, the nearest voxel."""
    return F.grid_sample(volumes.float(), grid, padding_mode="border", align_corners=False).to(volumes.dtype)
