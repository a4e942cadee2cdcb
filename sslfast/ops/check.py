"""Argument checks that precede every op. An error names the argument, what it was and what it must be."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sslfast.errors import MAX_CLASSES, too_many_classes
from sslfast.ops.reduce import Reducer

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class VoxelMap(Protocol):
    """A tensor [N, channels, *spatial], or `LinearLogits`."""

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


class UnstoredMap:
    """Base of `LinearLogits`, which ops take in place of a stored map."""

    def check(self, name: str) -> None:
        """Raises TypeError or ValueError if its parts are no map together; `name` is that of the argument."""
        raise NotImplementedError


def check_tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    """A dense tensor, of one of these dtypes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {described(value)}; it must be a torch.Tensor")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested" if value.is_nested else f"a {str(value.layout).removeprefix('torch.')}"
        raise TypeError(f"{name} is {kind} tensor; it must be dense, as of .to_dense()")
    if dtypes is not None and value.dtype not in dtypes:
        *others, last = (str(d).removeprefix("torch.") for d in dtypes)
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise TypeError(f"{name} has dtype {value.dtype}; it must be {allowed}")


def check_map(name: str, values: Any) -> None:
    """A floating-point map [N, channels, *spatial]."""
    if isinstance(values, UnstoredMap):
        values.check(name)
    else:
        check_tensor(name, values, FLOATS)
        if values.ndim < 3:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; it must be [N, channels, D, H, W]")
        if not values.shape[1]:
            raise ValueError(f"{name} has shape {tuple(values.shape)}; it must have at least one channel (dimension 1)")


def check_num_classes(name: str, count: int) -> None:
    """2 to 32 classes."""
    if isinstance(count, numbers.Integral) and count > MAX_CLASSES:
        raise ValueError(f"{name}: {too_many_classes(count)}")
    check_range(name, count, 2, MAX_CLASSES, whole=True)


def check_classes(name: str, logits: VoxelMap) -> None:
    """Logits of 2 to 32 classes."""
    if logits.shape[1] < 2:
        raise ValueError(f"{name} has {logits.shape[1]} classes (dimension 1); it must have 2 to {MAX_CLASSES}")
    check_num_classes(name, logits.shape[1])


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
    check_device(name_b, b, name_a, a)


def check_device(name: str, values: VoxelMap, like_name: str, like: VoxelMap) -> None:
    """The device of `like`."""
    if values.device != like.device:
        raise ValueError(f"{name} is on {values.device}; it must be on the device of {like_name}, {like.device}")


def check_voxels(name: str, values: Tensor, like_name: str, like: VoxelMap, dtypes: tuple[torch.dtype, ...]) -> None:
    """An integer map [N, *spatial] over the voxels of `like` [N, channels, *spatial]."""
    check_tensor(name, values, dtypes)
    expected = (like.shape[0], *like.shape[2:])
    if tuple(values.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}; for {like_name} {tuple(like.shape)} it must be {expected}"
        )
    check_device(name, values, like_name, like)


def check_class_weights(name: str, weights: Any, like_name: str, like: VoxelMap) -> None:
    """Floating-point [2, C], for both networks and the classes of `like` [N, C, *spatial]."""
    check_tensor(name, weights, FLOATS)
    expected = (2, like.shape[1])
    if tuple(weights.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}; for {like_name} {tuple(like.shape)} it must be {expected}"
        )
    check_device(name, weights, like_name, like)


def check_range(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """A number in [low, high]; `whole`: an integer."""
    kind: Any = numbers.Integral if whole else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} is {described(value)}; it must be a {'whole ' if whole else ''}number")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must be from {low:g} to {high:g}")


def check_values(name: str, values: Tensor, low: int, high: int | None = None) -> None:
    """A few integers from `low` on, to `high`; not checked on a GPU, where reading them would synchronise."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or not values.numel():
        return
    least, most = (int(value) for value in values.aminmax())
    if least < low or (high is not None and most > high):
        wrong = values < low if high is None else (values < low) | (values > high)
        first = tuple(wrong.nonzero()[0].tolist())
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} holds {int(values[first])} at {first}; it must be {allowed}")


def check_choice(name: str, value: Any, choices: tuple[str, ...], earlier: Mapping[str, str] | None = None) -> None:
    """One of some words; `earlier`: what to say of those of earlier versions."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {described(value)}; it must be {' or '.join(map(repr, choices))}")
    if value not in choices:
        instead = f"; {earlier[value]}" if earlier and value in earlier else ""
        raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, choices))}{instead}")


def check_reducer(reducer: Any) -> None:
    """The process group of an op."""
    if not isinstance(reducer, Reducer):
        raise TypeError(f"reducer is {described(reducer)}; it must be a sslfast.ops.reduce.Reducer")


def check_batch(
    logits_a: Any,
    logits_b: Any,
    features_a: Any,
    features_b: Any,
    labels: Any,
    step: Any,
    teacher: Any,
    reducer: Reducer,
    *,
    contrast: bool,
) -> None:
    """The arguments of a whole step, see `dual_contrastive`; `contrast`: the features are compared."""
    check_reducer(reducer)
    check_logits(logits_a, logits_b)
    volumes, classes, *spatial = logits_a.shape
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        check_tensor(name, features)
        check_map(name, features)
        if features.shape[0] != volumes or list(features.shape[2:]) != spatial:
            raise ValueError(
                f"{name} has shape {tuple(features.shape)}; for logits_a {tuple(logits_a.shape)} it must be "
                f"[{volumes}, K, {', '.join(map(str, spatial))}]"
            )
        check_device(name, features, "logits_a", logits_a)
    if contrast:
        wide, narrow = max(features_a.shape[1], features_b.shape[1]), min(features_a.shape[1], features_b.shape[1])
        if wide != narrow:
            raise ValueError(
                f"features_b has shape {tuple(features_b.shape)}, features_a {tuple(features_a.shape)}; with a "
                "contrastive loss they must have the same number of channels. Choose networks of the same width, "
                f"project the narrower features by nn.Conv3d({narrow}, {wide}, 1), or set contrast_weight=0"
            )
        check_pair("features_a", features_a, "features_b", features_b)
    check_tensor("labels", labels, INTEGERS)
    least = 1 if reducer.size == 1 else 0  # another rank may have labelled volumes
    if labels.ndim != len(spatial) + 1 or not least <= len(labels) <= volumes:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; for logits_a {tuple(logits_a.shape)} it must be [L, "
            f"{', '.join(map(str, spatial))}] with 1 to {volumes} labelled volumes"
        )
    check_voxels("labels", labels, "the labelled logits_a", logits_a[: len(labels)], INTEGERS)
    if teacher is not None:
        check_tensor("teacher", teacher)
        check_map("teacher", teacher)
        expected = (volumes - len(labels), classes, *spatial)
        if tuple(teacher.shape) != expected:
            raise ValueError(
                f"teacher has shape {tuple(teacher.shape)}; it must be that of the unlabelled logits_a, {expected}"
            )
        check_device("teacher", teacher, "logits_a", logits_a)
    check_step(step, logits_a.device)


def check_scalar(name: str, value: Any, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    """A tensor [] on the device of the maps."""
    check_tensor(name, value, dtypes)
    if value.ndim or value.device != device:
        where = f"shape {tuple(value.shape)} on {value.device}"
        raise ValueError(f"{name} has {where}; as a tensor it must be [] on {device}, the device of the maps")


def check_step(step: int | Tensor, device: torch.device) -> None:
    """A training step: 32 bits. A CUDA graph would record a number, and every replay would draw the same sample.

    Raises:
        ValueError, TypeError: out of range (not checked for a tensor on a GPU); wrong shape, dtype or device.
        RuntimeError: the step is a number and the current CUDA stream is being captured.
    """
    if isinstance(step, Tensor):
        check_scalar("step", step, device, INTEGERS)
        if device.type != "cpu" or torch.compiler.is_compiling():
            return
        step = int(step)
    if isinstance(step, bool) or not isinstance(step, numbers.Integral):
        raise TypeError(f"step is {described(step)}; it must be a whole number, or an integer tensor []")
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


def described(value: Any) -> str:
    """What a wrong argument was: None, the number or word itself, or its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    kind = {"ndarray": "NumPy array"}.get(type(value).__name__, type(value).__name__)
    return f"{'an' if kind[0].lower() in 'aeio' else 'a'} {kind}"
