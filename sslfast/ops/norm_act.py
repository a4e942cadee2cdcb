"""`norm_act`: batch or instance normalisation, scale and shift, an optional residual, ReLU, an optional skip."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslfast.ops.backend import norm_ops_for
from sslfast.ops.check import (
    FLOATS,
    check_device,
    check_map,
    check_pair,
    check_range,
    check_reducer,
    check_tensor,
    compute_dtype,
    to_compute_dtype,
)
from sslfast.ops.recomputation import keep_recipe
from sslfast.ops.reduce import SINGLE_PROCESS, Reducer
from sslfast.ops.registry import define, no_result

EPS = 1e-5  # as torch.nn.BatchNorm3d and InstanceNorm3d


class NormAct(NamedTuple):
    """The activations, and the statistics with which they were normalised."""

    values: Tensor  # [N, C, *spatial]
    statistics: Tensor  # [G, 2, C] float64: mean and population variance; G = 1 for the batch, or N
    size: Tensor | int  # numbers in each mean, over all processes


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    statistics: Tensor | None = None,
    per_volume: bool = False,
    relu: bool = True,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    eps: float = EPS,
    reducer: Reducer = SINGLE_PROCESS,
) -> NormAct:
    """relu((x - mean) / sqrt(variance + eps) · weight + bias + residual) + skip, each read and written once.

    Batch normalisation (Ioffe & Szegedy, ICML 2015) or instance normalisation (arXiv 1607.08022) with what follows it
    in a network. A channel whose values are all equal, such as a single voxel, becomes its bias; one with a NaN or
    infinite value becomes NaN, and no other.

    Args:
        x: [N, C, *spatial] float32, bfloat16 or float16; float64 runs the reference.
        weight, bias: [C].
        statistics: [1, 2, C] or [N, 2, C], mean and population variance, as for evaluation. None: those of `x`, through
            which gradients flow.
        per_volume: instance normalisation, each volume by its own statistics. False: batch normalisation.
        relu: False leaves the ReLU out.
        residual: added before the ReLU, as in ResNet; as `x`.
        skip: added after the ReLU, as in V-Net's decoder; as `x`.
        eps: added to the variance.
        reducer: process group whose batches are normalised as one.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not match.
    """
    _check(x, weight, bias, statistics, residual, skip, eps, reducer)
    weight, bias = (v.to(compute_dtype(x)).contiguous() for v in (weight, bias))
    ops = norm_ops_for(x)
    if ops is not None:
        x = to_dense_layout(x)
        residual, skip = (other if other is None else to_layout_of(x, other) for other in (residual, skip))
    reducer = SINGLE_PROCESS if per_volume else reducer
    count = math.prod(x.shape[2:]) * (1 if per_volume else len(x))
    size: Tensor | int = count
    given = statistics is not None
    statistics = statistics if statistics is None else statistics.detach().double().contiguous()
    if statistics is None:
        if not x.numel():
            statistics = x.new_zeros(len(x) if per_volume else 1, 2, x.shape[1], dtype=torch.float64)
        elif ops is None:
            statistics = norm_statistics_ref(x, per_volume)
        else:
            statistics = ops.norm_statistics(x.detach(), per_volume)
        if reducer.group is not None:
            statistics, size = _over_processes(statistics, count, reducer)
    if ops is None:
        values = norm_act_ref(x, weight, bias, statistics, relu, residual, skip, eps)
        return NormAct(values, statistics.detach().double(), size)
    values = _Fused.apply(x, weight, bias, residual, skip, statistics, (ops, eps, relu, given, size, reducer))
    keep_recipe(values, _apply, ops, x, statistics, weight, bias, eps, relu, residual, skip)
    return NormAct(values, statistics, size)


def norm_statistics_ref(x: Tensor, per_volume: bool) -> Tensor:
    """The specification of the statistics in plain PyTorch: [G, 2, C], with gradient."""
    voxels = [*range(2, x.ndim)]
    variance, mean = torch.var_mean(to_compute_dtype(x), voxels if per_volume else [0, *voxels], correction=0)
    return torch.stack((mean, variance), -2).view(-1, 2, x.shape[1])


def norm_act_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    relu: bool,
    residual: Tensor | None,
    skip: Tensor | None,
    eps: float,
) -> Tensor:
    """The specification of the activations in plain PyTorch."""
    mean, variance, weight, bias = (
        v.to(compute_dtype(x)).view(-1, x.shape[1], *(1 for _ in x.shape[2:]))
        for v in (statistics[:, 0], statistics[:, 1], weight, bias)
    )
    z = (to_compute_dtype(x) - mean) * (variance + eps).rsqrt() * weight + bias
    if residual is not None:
        z = z + to_compute_dtype(residual)
    y = z.relu() if relu else z
    if skip is not None:
        y = y + to_compute_dtype(skip)
    return y.to(x.dtype)


def _over_processes(statistics: Tensor, count: int, reducer: Reducer) -> tuple[Tensor, Tensor]:
    """Statistics [1, 2, C] and count of the batches of all processes, from those of this process's."""
    n = reducer.sum(statistics.new_tensor(float(count)))
    mean = reducer.sum(statistics[:, 0] * count) / n
    variance = reducer.sum(count * (statistics[:, 1] + (statistics[:, 0] - mean).square())) / n
    return torch.stack((mean, variance), 1), n


def _apply(
    ops: Any,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
    residual: Tensor | None,
    skip: Tensor | None,
) -> Tensor:
    y = torch.empty_like(x)
    ops.norm_apply(x, statistics, weight, bias, eps, relu, residual, skip, y)
    return y


define(
    "norm_statistics(Tensor x, bool per_volume) -> Tensor",
    lambda x, per_volume: x.new_empty((len(x) if per_volume else 1, 2, x.shape[1]), dtype=torch.float64),
)
define(
    "norm_apply(Tensor x, Tensor statistics, Tensor weight, Tensor bias, float eps, bool relu, Tensor? residual,"
    " Tensor? skip, Tensor(a!) y) -> ()",
    no_result,
)
define(  # sums [G, 2, C] float64 of dz and of dz (x - mean) / sqrt(variance + eps); dz: the gradient before the ReLU
    "norm_backward_sums(Tensor grad, Tensor x, Tensor statistics, Tensor weight, Tensor bias, float eps, bool relu,"
    " Tensor? residual) -> Tensor",
    lambda grad, x, statistics, *_: torch.empty_like(statistics),
)
define(  # means [G, 2, C] float64: the sums over the count of the statistics, or 0 if these are constants
    "norm_backward(Tensor grad, Tensor x, Tensor statistics, Tensor weight, Tensor bias, float eps, bool relu,"
    " Tensor? residual, Tensor means, Tensor(a!) grad_x, Tensor(b!)? grad_residual) -> ()",
    no_result,
)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        weight, bias, residual, skip, statistics, ctx.options = arguments
        ops, eps, relu, *_ = ctx.options
        ctx.save_for_backward(x, statistics, weight, bias, residual if relu else None)
        return _apply(ops, x, statistics, weight, bias, eps, relu, residual, skip)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, statistics, weight, bias, residual = ctx.saved_tensors
        ops, eps, relu, given, size, reducer = ctx.options
        grad = to_layout_of(x, grad)
        sums = ops.norm_backward_sums(grad, x, statistics, weight, bias, eps, relu, residual)
        means = torch.zeros_like(sums) if given else reducer.sum(sums) / size
        grad_x = torch.empty_like(x)
        grad_residual = torch.empty_like(x) if ctx.needs_input_grad[3] else None
        ops.norm_backward(grad, x, statistics, weight, bias, eps, relu, residual, means, grad_x, grad_residual)
        grad_bias, grad_weight = sums.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, grad_residual, grad if ctx.needs_input_grad[4] else None, None, None


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    eps: float,
    reducer: Reducer,
) -> None:
    check_tensor("x", x)
    check_map("x", x)
    check_range("eps", eps, 0, math.inf)
    if eps == 0:
        raise ValueError("eps is 0; it must be above 0")
    check_reducer(reducer)
    channels = x.shape[1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_tensor(name, tensor, FLOATS)
        if tuple(tensor.shape) != (channels,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; for x {tuple(x.shape)} it must be ({channels},)")
        check_device(name, tensor, "x", x)
    if statistics is not None:
        check_tensor("statistics", statistics, FLOATS)
        if tuple(statistics.shape) not in ((1, 2, channels), (len(x), 2, channels)):
            raise ValueError(
                f"statistics has shape {tuple(statistics.shape)}; for x {tuple(x.shape)} it must be (1, 2, {channels}) "
                f"or ({len(x)}, 2, {channels})"
            )
        check_device("statistics", statistics, "x", x)
    for name, other in (("residual", residual), ("skip", skip)):
        if other is not None:
            check_pair("x", x, name, other)


def to_dense_layout(x: Tensor) -> Tensor:
    """The tensor itself if it is contiguous or channels last, else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def to_layout_of(x: Tensor, other: Tensor) -> Tensor:
    """`other` [N, C, *spatial] with the strides of `x`, which is contiguous or channels last."""
    if other.stride() == x.stride():
        return other  # not a view of it, which would have no recipe
    return other.contiguous() if x.is_contiguous() else other.movedim(1, -1).contiguous().movedim(-1, 1)
