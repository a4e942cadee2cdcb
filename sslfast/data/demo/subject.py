"""Makes one subject of a demo cohort: the anatomy of a source under a random warp, with a random image quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DemoParameters:
    """Size of a cohort and strength of each random variation: a standard deviation, unless a comment says otherwise."""

    seed: int = 0
    training: int = 40
    validation: int = 8
    test: int = 48
    first_test: int = 48  # index of the first test case
    spacing: float = 2.0  # mm
    size: tuple[int, int, int] = (112, 96, 96)  # voxels
    size_jitter: int = 8  # largest change of each axis, voxels
    rotation: float = 10.0  # degrees about each axis
    log_scale: float = 0.10  # log of the scale of each axis
    shear: float = 0.06
    shift: float = 12.0  # mm
    warp: tuple[tuple[int, float], ...] = ((5, 9.0), (10, 3.5))  # (size of the velocity grid, mm)
    # HU, knots of the contrast curve
    knots: tuple[float, ...] = (-1000.0, -200.0, 0.0, 80.0, 250.0, 450.0, 700.0, 1500.0)
    contrast: tuple[float, float] = (0.9, 0.3)  # mean and standard deviation of the slopes of that curve
    bias: float = 0.4  # log of the multiplicative bias field
    blur: tuple[float, float] = (0.0, 1.2)  # range, voxels
    noise: tuple[float, float] = (60.0, 400.0)  # range, from a normal to a very low dose
    thick_slices: float = 0.6  # fraction of subjects with slices of two or three voxels
    lesions: float = 0.3  # fraction of subjects with one
    clipped: float = 0.2  # fraction of subjects whose field of view cuts off part of a structure
    oblique: float = 0.2  # fraction of subjects whose grid is tilted relative to the scanner


class SourceAnatomy:
    """Anatomy from which subjects are made. It is sampled at positions in mm from the centre of the labels.

    Args:
        image: [X, Y, Z]; empty space has the value of the first knot of the contrast curve.
        label: [X, Y, Z] classes, 0 is the background.
        affine: [4, 4] voxel index -> mm.
    """

    def __init__(self, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> None:
        self.image = torch.from_numpy(image.astype(np.float32))[None, None]  # [1, 1, X, Y, Z]
        classes = range(1, int(label.max()) + 1)
        self.structures = torch.from_numpy(np.stack([label == c for c in classes]).astype(np.float32))[None]
        self.to_index = torch.from_numpy(np.linalg.inv(affine[:3, :3])).float()  # mm (RAS) -> voxels
        self.centre = torch.from_numpy(np.argwhere(label > 0).mean(0)).float()

    def appearance(self, random: torch.Generator) -> Tensor:
        """The image [1, 1, X, Y, Z] of one subject before its warp; here it is the same for all subjects."""
        return self.image

    def sample(self, values: Tensor, position: Tensor) -> Tensor:
        """Values [1, N, X, Y, Z] linearly interpolated at positions [x, y, z, 3] in mm: [N, x, y, z].

        Outside the volume, the nearest voxel counts.
        """
        index = position @ self.to_index.T + self.centre
        scaled = 2 * index / (torch.tensor(values.shape[2:]) - 1) - 1
        return F.grid_sample(values, scaled.flip(-1)[None], padding_mode="border", align_corners=True)[0]


@torch.no_grad()
def make_subject(
    source: SourceAnatomy, index: int, parameters: DemoParameters
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image [X, Y, Z] int16, label [X, Y, Z] uint8 and affine [4, 4] of subject `index`.

    The result depends on the arguments alone.
    """
    p = parameters
    random = torch.Generator().manual_seed(1_000_003 * p.seed + index)
    size = [n + int(torch.randint(-p.size_jitter, p.size_jitter + 1, (), generator=random)) for n in p.size]
    axes = [(torch.arange(n) - (n - 1) / 2) * p.spacing for n in size]
    position = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # [X, Y, Z, 3] mm from the centre

    at = (warp(position, p.warp, random) - p.shift * normal(3, random)) @ _random_affine(p, random).T
    probabilities = source.sample(source.structures, at)  # [structures, X, Y, Z]
    label = torch.where(probabilities.sum(0) > 0.5, probabilities.argmax(0) + 1, 0)
    floor = p.knots[0]
    image = source.sample(source.appearance(random), at)[0].clamp(floor, p.knots[-1])
    if _chance(p.lesions, random):
        image = _add_lesion(image, label, position, random)
    image = _contrast_curve(image, p.knots, p.contrast, random)
    image = (image - floor) * (p.bias * smooth_field(4, size, random)).exp() + floor
    image = _degrade(image, p, random)
    box = _field_of_view(label, p, random)
    image, label = image[box], label[box]
    return _store(image.round().clamp(-12000, 12000).to(torch.int16).numpy(), label.to(torch.uint8).numpy(), p, random)


def warp(position: Tensor, grids: Sequence[tuple[int, float]], random: torch.Generator) -> Tensor:
    """Positions [X, Y, Z, 3] moved by a diffeomorphism: the flow of a smooth velocity, by scaling and squaring.

    Raises:
        ValueError: the warp folds: its Jacobian is not positive everywhere.
    """
    half = position.abs().amax((0, 1, 2))  # mm
    coarse = (32, 32, 32)
    velocity = sum(
        (smooth_field(n, coarse, random, channels=3) * strength / half.view(3, 1, 1, 1) for n, strength in grids),
        torch.zeros(3, *coarse),
    )  # [3, 32, 32, 32] in units of half the field of view
    line = torch.linspace(-1, 1, coarse[0])
    identity = torch.stack(torch.meshgrid(line, line, line, indexing="ij"))  # [3, 32, 32, 32]
    squarings = 6
    flow = velocity / 2**squarings
    for _ in range(squarings):
        flow = flow + _interpolate(flow, (identity + flow).movedim(0, -1))
    if jacobian(identity + flow).min() <= 0:
        raise ValueError("the warp folds: its Jacobian is not positive everywhere; lower the strengths of `warp`")
    moved = _interpolate(flow, position / half)  # [3, X, Y, Z]
    return position + (moved * half.view(3, 1, 1, 1)).movedim(0, -1)


def jacobian(mapping: Tensor) -> Tensor:
    """Jacobian determinant of a mapping [3, X, Y, Z], sampled on a regular grid over [-1, 1]^3: [X-1, Y-1, Z-1]."""
    n = mapping.shape[1:]
    columns = [mapping.diff(dim=1 + i)[:, : n[0] - 1, : n[1] - 1, : n[2] - 1] * (n[i] - 1) / 2 for i in range(3)]
    return torch.linalg.det(torch.stack(columns).permute(2, 3, 4, 0, 1))


def _random_affine(p: DemoParameters, random: torch.Generator) -> Tensor:
    """[3, 3]: rotation about each axis, scale of each axis, shear."""
    angles = torch.deg2rad(p.rotation * normal(3, random))
    matrix = torch.diag((p.log_scale * normal(3, random)).exp())
    matrix = matrix @ (torch.eye(3) + p.shear * normal(9, random).view(3, 3).triu(1))
    for i, angle in enumerate(angles):
        a, b = (k for k in range(3) if k != i)
        rotation = torch.eye(3)
        rotation[a, a] = rotation[b, b] = angle.cos()
        rotation[a, b], rotation[b, a] = -angle.sin(), angle.sin()
        matrix = rotation @ matrix
    return matrix


def _contrast_curve(
    image: Tensor, knots: Sequence[float], slope: tuple[float, float], random: torch.Generator
) -> Tensor:
    """Applies a piecewise linear curve to the values. A segment may be flat or falling."""
    x = torch.tensor(knots)
    slopes = slope[0] + slope[1] * normal(len(x) - 1, random)
    values = torch.cat((x[:1], x[0] + (x.diff() * slopes).cumsum(0)))
    left = (torch.bucketize(image, x) - 1).clamp(0, len(x) - 2)
    return values[left] + (image - x[left]) * slopes[left]


def _add_lesion(image: Tensor, label: Tensor, position: Tensor, random: torch.Generator) -> Tensor:
    """Adds a soft ellipsoid of another density, centred in a structure."""
    inside = label.nonzero()
    if len(inside) == 0:
        return image
    centre = position[tuple(inside[int(torch.randint(len(inside), (), generator=random))])]
    radii = 6 + 12 * torch.rand(3, generator=random)  # mm
    distance = ((position - centre) / radii).square().sum(-1)
    return image + 300 * normal(1, random) * (-distance).exp()


def _degrade(image: Tensor, p: DemoParameters, random: torch.Generator) -> Tensor:
    """Adds blur, thick slices along one axis, and noise."""
    sigma = _uniform(p.blur, random)
    image = _blur(image, sigma)
    if _chance(p.thick_slices, random):
        axis, thickness = int(torch.randint(3, (), generator=random)), int(torch.randint(2, 4, (), generator=random))
        kernel = [1, 1, 1]
        kernel[axis] = thickness
        slices = F.avg_pool3d(image[None, None], kernel, ceil_mode=True)
        image = F.interpolate(slices, image.shape, mode="trilinear", align_corners=False)[0, 0]
    return image + _uniform(p.noise, random) * torch.randn(image.shape, generator=random)


def _blur(image: Tensor, sigma: float) -> Tensor:
    reach = max(1, math.ceil(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / max(sigma, 1e-3)).square())
    kernel = kernel / kernel.sum()
    for axis in range(3):
        shape, pad = [1, 1, 1, 1, 1], [0] * 6
        shape[2 + axis] = len(kernel)
        pad[2 * (2 - axis)] = pad[2 * (2 - axis) + 1] = reach
        image = F.conv3d(F.pad(image[None, None], pad, mode="replicate"), kernel.view(shape))[0, 0]
    return image


def _field_of_view(label: Tensor, p: DemoParameters, random: torch.Generator) -> tuple[slice, ...]:
    """The whole volume, or a box that cuts off a tenth of the structures' voxels at one side."""
    box = [slice(None)] * 3
    chance, axis, side = _chance(p.clipped, random), int(torch.randint(3, (), generator=random)), _chance(0.5, random)
    inside = label.nonzero()
    if chance and len(inside):
        positions = inside[:, axis].sort().values
        cut = int(positions[int(0.1 * len(positions))]), int(positions[int(0.9 * len(positions))])
        box[axis] = slice(cut[0], None) if side else slice(0, cut[1])
    return tuple(box)


def _store(
    image: np.ndarray, label: np.ndarray, p: DemoParameters, random: torch.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stores the axes as LPS or RAS and, for some subjects, tilts the grid relative to the scanner."""
    affine = np.diag([p.spacing, p.spacing, p.spacing, 1.0])
    if _chance(0.5, random):
        image, label = (np.ascontiguousarray(v[::-1, ::-1]) for v in (image, label))
        affine = affine @ nib.affines.from_matvec(np.diag([-1, -1, 1]), [image.shape[0] - 1, image.shape[1] - 1, 0])
    tilt = math.radians(15 * float(normal(1, random)) if _chance(p.oblique, random) else 0)
    rotation = np.array([[math.cos(tilt), -math.sin(tilt), 0], [math.sin(tilt), math.cos(tilt), 0], [0, 0, 1]])
    return image, label, nib.affines.from_matvec(rotation, (20 * normal(3, random)).double().numpy()) @ affine


def smooth_field(grid: int, size: Sequence[int], random: torch.Generator, channels: int | None = None) -> Tensor:
    """A random field: standard normal values on a coarse grid, interpolated to [*size], or [channels, *size]."""
    coarse = torch.randn(1, channels or 1, grid, grid, grid, generator=random)
    middle = F.interpolate(coarse, [3 * grid] * 3, mode="trilinear", align_corners=True)
    middle = F.avg_pool3d(F.pad(middle, [1] * 6, mode="replicate"), 3, stride=1)  # smooths the kinks
    field = F.interpolate(middle, list(size), mode="trilinear", align_corners=True)[0]
    return field if channels else field[0]


def _interpolate(field: Tensor, position: Tensor) -> Tensor:
    """[channels, X, Y, Z] linearly interpolated at positions [x, y, z, 3] in [-1, 1]: [channels, x, y, z]."""
    return F.grid_sample(field[None], position.flip(-1)[None], padding_mode="border", align_corners=True)[0]


def normal(count: int, random: torch.Generator) -> Tensor:
    return torch.randn(count, generator=random)


def _uniform(span: tuple[float, float], random: torch.Generator) -> float:
    return span[0] + (span[1] - span[0]) * float(torch.rand((), generator=random))


def _chance(probability: float, random: torch.Generator) -> bool:
    return bool(torch.rand((), generator=random) < probability)
