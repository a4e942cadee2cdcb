"""Random views: volumes seen rotated and zoomed, and the predictions of who saw them straight carried along."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROTATION = math.radians(30)  # at most, about each axis
ZOOM = 0.7, 1.4  # of each axis


class TeacherView(NamedTuple):
    """Unlabelled volumes as the students see them, and what they should say there."""

    images: Tensor  # [U, M, D, H, W]
    teacher: Tensor  # [U, C, D, H, W] log-probabilities


def teacher_view(network_a: nn.Module, network_b: nn.Module, images: Tensor) -> TeacherView:
    """A random view of each volume, and what the networks on average say of it when they see it straight.

        view, teacher = teacher_view(network_a, network_b, unlabelled)
        images = torch.cat((labelled, view))
        ...
        result = criterion(logits_a, logits_b, features_a, features_b, labels, step=step, teacher=teacher)

    A segmentation turns with the volume, so that a network which says of a view what it said before has learned something
    that no label showed it (transformation-consistent self-ensembling, Li et al., arXiv 1903.00348, with both networks for
    the teacher). A view is rotated by up to 30 degrees about each axis and zoomed by 0.7 to 1.4 along each, counted
    in voxels, which should be about as long as wide; where it looks beyond the volume, it sees the nearest voxel.

    Args:
        network_a, network_b: give (logits [U, C, D, H, W], …); they look in evaluation mode, and learn nothing here.
        images: [U, M, D, H, W], U > 0.
    """
    with torch.no_grad():
        probabilities = (eval_probabilities(network_a, images) + eval_probabilities(network_b, images)) / 2
    torch.clear_autocast_cache()  # of weights cast without gradient, which the training pass must not find
    with torch.autocast(images.device.type, enabled=False):
        grid = random_affine_grid(images)
        teacher = resample(probabilities, grid).clamp_min(torch.finfo(torch.float32).tiny).log()
        return TeacherView(resample(images, grid), teacher)


def eval_probabilities(network: nn.Module, images: Tensor) -> Tensor:
    """Probabilities [U, C, D, H, W], float32, of a network in evaluation mode; each of its modules is left in the mode that it was in."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        probabilities: Tensor = network(images)[0].float().softmax(1)
    finally:
        for module in training:
            module.training = True
    return probabilities


def random_affine_grid(images: Tensor) -> Tensor:
    """Where in each volume [U, M, D, H, W] a random view looks: [U, D, H, W, 3], as `torch.nn.functional.grid_sample` takes it."""
    count, device = len(images), images.device
    angles = torch.empty(3, count, device=device).uniform_(-ROTATION, ROTATION)
    matrix = torch.empty(count, 3, device=device).uniform_(*map(math.log, ZOOM)).exp().diag_embed()  # [U, 3, 3]
    for axis, angle in enumerate(angles):
        i, k = (other for other in range(3) if other != axis)
        turn = torch.eye(3, device=device).repeat(count, 1, 1)
        turn[:, i, i] = turn[:, k, k] = angle.cos()
        turn[:, i, k], turn[:, k, i] = -angle.sin(), angle.sin()
        matrix = turn @ matrix
    extent = torch.tensor([float(n) for n in images.shape[:1:-1]]).to(device, non_blocking=True)  # of x, y, z: voxels
    matrix = matrix * extent / extent.unsqueeze(1)  # in voxels alike along every axis; the grid counts in half extents
    return F.affine_grid(F.pad(matrix, (0, 1)), list(images.shape), align_corners=False)


def resample(volumes: Tensor, grid: Tensor) -> Tensor:
    """Volumes [U, M, D, H, W] at the grid's places, linearly interpolated; outside, the nearest voxel."""
    return F.grid_sample(volumes.float(), grid, padding_mode="border", align_corners=False).to(volumes.dtype)
