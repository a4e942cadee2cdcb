"""Argument checks that precede every op. An error names the argument, what it was and what it must be."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

MAX_CLASSES = 32  # the flags have five bits for the class
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class VoxelMap(Protocol):
    """A tensor [N, channels, *spatial], or `LinearLogits`."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def check_floats(name: str, values: VoxelMap) -> None:
    """A floating-point dtype."""
    if values.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {values.dtype}; it must be float32, bfloat16, float16 or float64")


def check_map(name: str, values: VoxelMap) -> None:
    """A floating-point map [N, channels, *spatial]."""
    check_floats(name, values)
    if values.ndim < 3:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; it must be [N, channels, D, H, W]")


def check_classes(name: str, logits: VoxelMap) -> None:
    """2 to 32 classes."""
    if not 2 <= logits.shape[1] <= MAX_CLASSES:
        raise ValueError(f"{name} has {logits.shape[1]} classes (dimension 1); it must have 2 to {MAX_CLASSES}")


def check_logits(logits_a: VoxelMap, logits_b: VoxelMap) -> None:
    """Both networks' logits: floating-point [N, C, *spatial] of the same shape, dtype and device, 2 <= C <= 32."""
    check_pair("logits_a", logits_a, "logits_b", logits_b)
    check_classes("logits_a", logits_a)


def check_pair(name_a: str, a: VoxelMap, name_b: str, b: VoxelMap) -> None:
    """Two voxel maps [N, channels, *spatial] of the same shape, dtype and device."""
    check_map(name_a, a)
    check_map(name_b, b)
    if a.shape != b.shape:
        raise ValueError(f"{name_b} has shape {tuple(b.shape)}; it must be that of {name_a}, {tuple(a.shape)}")
    if a.dtype != b.dtype:
        raise TypeError(f"{name_b} has dtype {b.dtype}; it must be that of {name_a}, {a.dtype}")
    if a.device != b.device:
        raise ValueError(f"{name_b} is on {b.device}; it must be on the device of {name_a}, {a.device}")


def check_voxels(name: str, values: Tensor, like_name: str, like: VoxelMap, dtypes: tuple[torch.dtype, ...]) -> None:
    """An integer map [N, *spatial] over the voxels of `like` [N, channels, *spatial]."""
    if values.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} has dtype {values.dtype}; it must be {allowed}")
    expected = (like.shape[0], *like.shape[2:])
    if tuple(values.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; for {like_name} {tuple(like.shape)} it must be {expected}"
        )
    if values.device != like.device:
        raise ValueError(f"{name} is on {values.device}; it must be on the device of {like_name}, {like.device}")


def check_class_weights(name: str, weights: Tensor, like_name: str, like: VoxelMap) -> None:
    """Floating-point [2, C], for both networks and the classes of `like` [N, C, *spatial]."""
    check_floats(name, weights)
    expected = (2, like.shape[1])
    if tuple(weights.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}; for {like_name} {tuple(like.shape)} it must be {expected}"
        )
    if weights.device != like.device:
        raise ValueError(f"{name} is on {weights.device}; it must be on the device of {like_name}, {like.device}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """A number in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be from {low:g} to {high:g}")


def check_step(step: int | Tensor, device: torch.device) -> None:
    """A training step: 32 bits. A CUDA graph would record a number, and every replay would draw the same sample.

    Raises:
        ValueError, TypeError: out of range (not checked for a tensor on a GPU); wrong shape, dtype or device.
        RuntimeError: the step is a number and the current CUDA stream is being captured.
    """
    if isinstance(step, Tensor):
        if step.dtype not in INTEGERS:
            raise TypeError(f"step has dtype {step.dtype}; as a tensor it must be an integer")
        if step.ndim or step.device.type != device.type:
            where = f"shape {tuple(step.shape)} on {step.device}"
            raise ValueError(f"step has {where}; as a tensor it must be [] on {device}, the device of the maps")
        if device.type != "cpu" or torch.compiler.is_compiling():
            return
        step = int(step)
    if not 0 <= step < 2**32:
        raise ValueError(f"step is {step}; it must be from 0 to 2^32 - 1")
    if device.type == "cuda" and not torch.compiler.is_compiling() and _is_capturing(device):
        raise RuntimeError(
            f"a CUDA graph is being captured: step {step} would be part of it, so that every replay drew the same "
            "voxels with the same weights; pass step as an int64 tensor [] on the device and change it between replays"
        )


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def to_compute_dtype(values: Tensor) -> Tensor:
    """The values in the dtype of the arithmetic: float64 stays, others become float32."""
    return values if values.dtype == torch.float64 else values.float()


def compute_dtype(values: VoxelMap) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or a tensor [] as a tensor [] of this dtype; a number is put on the device without synchronisation."""
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)
