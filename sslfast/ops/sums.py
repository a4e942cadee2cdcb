"""Ops from voxel maps to sums over the voxels, one small tensor. Losses are plain PyTorch on these sums.

A kernel knows no loss weight, no smoothing constant and no other process. It returns sums; its backward pass takes
their gradient and writes the gradient of the maps. In between, `reducer.sum` all-reduces the sums, and plain PyTorch
computes the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslfast.ops.backend import ops_for, runs_fused
from sslfast.ops.check import to_compute_dtype
from sslfast.ops.linear_logits import Logits, empty_gradient, for_kernels, materialize, pack_logits, unpack_logits
from sslfast.ops.registry import define, no_result

CLASSES = -1
"""Stands for the number of classes in a slot's shape."""

SMOOTH = 1e-5
"""Dice's epsilon."""

Slots = Mapping[str, tuple[int, ...]]


def pack(slots: Slots, **values: Tensor) -> Tensor:
    """The sums [n] float64, from the values of the slots."""
    return torch.cat([values[name].reshape(-1).double() for name in slots])


def unpack(slots: Slots, sums: Tensor) -> dict[str, Tensor]:
    """The values of the slots from sums [n], each in its shape."""
    plain = sum(math.prod(shape) for shape in slots.values() if CLASSES not in shape)
    by_class = sum(math.prod(shape[:-1]) for shape in slots.values() if CLASSES in shape)
    classes = (sums.shape[0] - plain) // max(by_class, 1)
    shapes = {name: tuple(classes if size == CLASSES else size for size in shape) for name, shape in slots.items()}
    slices = sums.split([math.prod(shape) for shape in shapes.values()])
    return {name: values.view(shape) for (name, shape), values in zip(shapes.items(), slices, strict=True)}


def dice_loss(overlap: Tensor, size: Tensor, smooth: float, weights: Tensor | None = None) -> Tensor:
    """Mean over the foreground classes of 1 - (2 overlap + smooth) / (size + smooth), from [..., C] to [...].

    `weights` [C]: factor of each class.
    """
    by_class = 1 - (2 * overlap + smooth) / (size + smooth)
    return (by_class if weights is None else by_class * weights)[..., 1:].mean(-1)


def masked_logits(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [N, C, *spatial] in the dtype of the arithmetic, as they count in sums over the voxels of a mask.

    A voxel outside of the mask [N, *spatial] has zeros, whatever it held. One inside with a logit that is NaN or
    infinite has NaN in all classes: -inf too, whose softmax would be finite. None: all voxels count.
    """
    values = to_compute_dtype(logits)
    values = values if mask is None else torch.where(mask.unsqueeze(1), values, 0)
    return torch.where(values.isfinite().all(1, keepdim=True), values, torch.nan)


def sum_by_class(values: Tensor) -> Tensor:
    """Sums [C] float64 of values [N, C, *spatial] over volumes and voxels; 0 for the background."""
    sums = values.sum((0, *range(2, values.ndim)), dtype=torch.float64)
    return torch.cat((torch.zeros_like(sums[:1]), sums[1:]))


@dataclass(frozen=True, eq=False)
class SumsOp:
    """An op from voxel maps to sums. Its kernels are `<name>` and `<name>_backward`.

    Their arguments are the logits of `maps`, each as a pair (values, weights) (see `unpack_logits`), and then `rest`.
    """

    name: str
    slots: Slots
    maps: tuple[str, ...]
    students: int  # the number of maps with a gradient, which come first
    rest: str  # further arguments, as in a schema
    ref: Callable[..., Tensor]  # the specification in plain PyTorch, from maps as tensors and `rest` to sums

    def __post_init__(self) -> None:
        maps = "".join(f"Tensor {name}, Tensor? {name}_weights, " for name in self.maps)
        gradients = "".join(
            f", Tensor({2 * i}!) grad_{name}, Tensor({2 * i + 1}!)? grad_{name}_weights"
            for i, name in enumerate(self.maps[: self.students])
        ).translate({ord("0") + i: "abcd"[i] for i in range(4)})
        define(f"{self.name}({maps}{self.rest}) -> Tensor", self._fake)
        define(f"{self.name}_backward(Tensor grad_sums, {maps}{self.rest}{gradients}) -> ()", no_result)

    @property
    def scalars(self) -> int:
        """Number of sums that are not per class; they come first."""
        return sum(math.prod(shape) for shape in self.slots.values() if CLASSES not in shape)

    @property
    def rows(self) -> int:
        """Number of sums per class."""
        return sum(math.prod(shape[:-1]) for shape in self.slots.values() if CLASSES in shape)

    def slot_index(self, slot: str) -> int:
        """Index of a slot's first sum, among the scalars or among the rows."""
        by_class = CLASSES in self.slots[slot]
        before = list(self.slots)[: list(self.slots).index(slot)]
        return sum(
            math.prod(self.slots[name]) * (-1 if by_class else 1)
            for name in before
            if (CLASSES in self.slots[name]) == by_class
        )

    def _fake(self, values: Tensor, weights: Tensor | None, *_: Any) -> Tensor:
        classes = pack_logits(values, weights).shape[1]
        return values.new_empty(self.scalars + self.rows * classes, dtype=torch.float64)

    def __call__(self, maps: Sequence[Logits], *rest: Any) -> Tensor:
        """The sums [n] float64, computed by the backend; only the students get a gradient."""
        maps = [*maps[: self.students], *(logits.detach() for logits in maps[self.students :])]
        if not runs_fused(*maps):
            return self.ref(*map(materialize, maps), *rest)
        tensors = [tensor for logits in maps for tensor in unpack_logits(for_kernels(logits))]
        sums: Tensor = _Sums.apply(self, rest, *tensors)
        return sums

    def forward(self, maps: Sequence[Logits], *rest: Any) -> Tensor:
        """The sums [n] float64 by the kernels, without a gradient; maps as `for_kernels` returns them."""
        arguments = [tensor for logits in maps for tensor in unpack_logits(logits)]
        sums: Tensor = getattr(ops_for(maps[0]), self.name)(*arguments, *rest)
        return sums

    def backward(self, grad_sums: Tensor, maps: Sequence[Logits], *rest: Any, to: Sequence[Logits]) -> None:
        """Writes the gradients of the students' maps into `to`."""
        arguments = [tensor for logits in maps for tensor in unpack_logits(logits)]
        gradients = [tensor for logits in to for tensor in unpack_logits(logits)]
        getattr(ops_for(maps[0]), f"{self.name}_backward")(grad_sums, *arguments, *rest, *gradients)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: SumsOp, rest: tuple[Any, ...], first: Tensor, *others: Tensor | None) -> Tensor:
        tensors = (first, *others)  # torch.compile drops `ctx` where it counts one argument more than the signature has
        tensors_of_rest = [value for value in rest if isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors, *tensors_of_rest)
        ctx.op = op
        ctx.options = [None if isinstance(value, Tensor) else value for value in rest]
        return op.forward(_pairs(tensors), *rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        op, count = ctx.op, 2 * len(ctx.op.maps)
        tensors, tensors_of_rest = ctx.saved_tensors[:count], list(ctx.saved_tensors[count:])
        rest = [tensors_of_rest.pop(0) if value is None else value for value in ctx.options]
        maps = _pairs(tensors)
        to = [empty_gradient(logits) for logits in maps[: op.students]]
        op.backward(grad_sums, maps, *rest, to=to)
        gradients = [tensor for logits in to for tensor in unpack_logits(logits)]
        return None, None, *gradients, *((count - len(gradients)) * [None])


def _pairs(tensors: Sequence[Tensor | None]) -> list[Logits]:
    return [
        pack_logits(values, weights)  # type: ignore[arg-type]
        for values, weights in zip(tensors[::2], tensors[1::2], strict=True)
    ]
