"""Random maps of voxels, the same numbers in other layouts, and values in which rounding decides nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from helpers.options import TARGET, some
from sslfast.ops.dual_supervised import OP as SUPERVISED
from sslfast.ops.flags import RELIABLE
from sslfast.ops.masked_consistency import OP as MASKED
from sslfast.ops.pseudo_supervised import OP as PSEUDO
from sslfast.ops.rectified_consistency import OP as RECTIFIED

SIZES = some([(7, 3, 5), (33,), (1, 1, 1), (16, 16, 17), (5, 31), (20, 21, 41)], 3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SUMS_OPS = {op.name: op for op in (SUPERVISED, PSEUDO, RECTIFIED, MASKED)}


def random_map(volumes: int, channels: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(volumes, channels, *size)).to(dtype)


def random_flags(volumes: int, classes: int, size: tuple[int, ...], reliable: float = 0.6) -> Tensor:
    label = torch.randint(0, classes, (volumes, *size))
    return (label + RELIABLE * (torch.rand(volumes, *size) < reliable)).to(torch.uint8)


def layouts(values: Tensor) -> dict[str, Tensor]:
    """The same numbers laid out otherwise."""
    result = {"sliced batch": torch.cat((values, values))[: len(values)]}
    padded = torch.zeros(*values.shape[:-1], values.shape[-1] + 3, dtype=values.dtype)
    padded[..., : values.shape[-1]] = values
    result["sliced axis"] = padded[..., : values.shape[-1]]
    result["transposed axes"] = values.transpose(2, -1).contiguous().transpose(2, -1)
    result["channels last"] = values.movedim(1, -1).contiguous().movedim(-1, 1)
    result["every other channel"] = values.repeat_interleave(2, 1)[:, ::2]
    return result


def sums_otherwise(layout: str) -> bool:
    """True where sums are added in another order: Triton spreads a tile over a warp by layout and dtype."""
    return layout in ("channels last", "labels' dtype") and TARGET.name == "triton"


def clear_threshold(*logits: Tensor) -> float:
    """A threshold above 0.5 that no confidence is near, so that rounding decides no confident class or mask."""
    confidences = torch.cat([z.double().softmax(1).amax(1).flatten() for z in logits])
    candidates = torch.linspace(0.51, 0.6, 91, dtype=torch.float64)
    return float(candidates[(candidates[:, None] - confidences).abs().amin(1).argmax()])


def limit_between(teacher: Tensor) -> float:
    """An entropy that no voxel's is close to, so that rounding decides nothing."""
    q = teacher.double().softmax(1)
    entropy = torch.special.entr(q).sum(1).flatten().sort().values
    gap = int(entropy.diff().argmax()) if len(entropy) > 1 else 0
    return float(entropy[gap : gap + 2].mean()) + (1e-3 if len(entropy) == 1 else 0.0)


def labels_with_errors(volumes: int, classes: int, size: tuple[int, ...]) -> Tensor:
    """Labels of every class, ignored (-1), and out of range."""
    return torch.randint(-2, classes + 1, (volumes, *size))


def sums_arguments(name: str, a: Tensor, b: Tensor) -> list[tuple[Any, ...]]:
    """What an op of `SUMS_OPS` takes besides the maps, in which rounding decides nothing."""
    volumes, classes, *size = a.shape
    if name == "dual_supervised":
        return [(labels_with_errors(volumes, classes, tuple(size)), clear_threshold(a, b), -1)]
    if name == "masked_consistency":
        return [(0.5, math.inf), (1.0, limit_between(b))]
    return [(random_flags(volumes, classes, tuple(size)),)]
