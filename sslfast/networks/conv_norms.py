"""Convolutions, each followed by its `NormAct`; in evaluation, a convolution and its batch normalisation are one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from sslfast.networks.norm_act import NormAct
from sslfast.ops.norm_act import EPS
from sslfast.ops.recomputation import keep_recipe

Convolution = nn.Conv3d | nn.ConvTranspose3d

LEAST_SLOPE = 2.0**-149
"""The least float above 0. oneDNN's ReLU makes 0 of NaN; its leaky ReLU, with this slope for numbers below 0, does not.
"""


class ConvNorms(nn.Sequential):
    """One or more times convolution and `NormAct`.

    They are named 0, 1, 3, 4, ...: checkpoints have these names from when a ReLU was the third of each group.

    Without gradients and with running statistics, the normalisation is folded into the weights of the convolution, and
    oneDNN adds the residual or applies the ReLU while it writes the output.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(OrderedDict((str(i // 2 * 3 + i % 2), module) for i, module in enumerate(modules)))
        self.recomputes = False
        """Within `recompute_activations`, also compute the convolutions again instead of keeping their outputs."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """The output; the last `NormAct` takes residual and skip."""
        modules: list[Any] = list(self)
        last = len(modules) - 2
        for i in range(0, len(modules), 2):
            conv, norm = modules[i : i + 2]
            others = {"residual": residual, "skip": skip} if i == last else {}
            if _can_fold(conv, norm):
                x = convolve_folded(conv, norm, x, **others)
                continue
            convolved = conv(x)
            if self.recomputes:
                keep_recipe(convolved, _convolve, conv, _autocast_dtype(x), x)
            x = norm(convolved, **others)
        return x


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the current autocast, or None."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _convolve(conv: nn.Module, dtype: torch.dtype | None, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        result: Tensor = conv(x)
    return result


def _can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    return (
        isinstance(conv, Convolution)
        and conv.bias is None
        and isinstance(norm, NormAct)
        and norm.running_mean is not None
        and not (norm.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
    )


def convolve_folded(
    conv: Convolution, norm: NormAct, x: Tensor, residual: Tensor | None = None, skip: Tensor | None = None
) -> Tensor:
    """relu(norm(conv(x)) + residual) + skip as one convolution, with the running statistics in its weights and bias.

    They are folded at each call: nothing tells for sure whether weights have changed since an earlier one.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = _autocast_dtype(x) or x.dtype
    scale = norm.weight * (norm.running_var + EPS).rsqrt()
    by_output = (1, -1, 1, 1, 1) if isinstance(conv, nn.ConvTranspose3d) else (-1, 1, 1, 1, 1)
    weight = (conv.weight * scale.view(by_output)).to(dtype)
    bias = (norm.bias - norm.running_mean * scale).to(dtype)
    x = x.to(dtype)
    if _has_onednn(x):
        y = _convolve_in_onednn(conv, x, weight, bias, None if residual is None else residual.to(dtype), norm.relu)
    else:
        assert not isinstance(conv.padding, str)
        with torch.autocast(x.device.type, enabled=False):
            y = torch.convolution(
                x, weight, bias, conv.stride, conv.padding, conv.dilation, isinstance(conv, nn.ConvTranspose3d),
                conv.output_padding, conv.groups,
            )  # fmt: skip
        y = y if residual is None else y.add_(residual)
        y = y.relu_() if norm.relu else y
    return y if skip is None else y.add_(skip)


def _convolve_in_onednn(
    conv: Convolution, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    ops, where = torch.ops.mkldnn, (conv.stride, conv.dilation, conv.groups)
    if residual is not None:
        y: Tensor = ops._convolution_pointwise.binary(
            x, residual, weight, bias, conv.padding, *where, "add", None, None, [], None
        )
        return y.relu_() if relu else y
    then = ("leaky_relu", [LEAST_SLOPE], "") if relu else ("none", [], "")
    if isinstance(conv, nn.ConvTranspose3d):
        y = ops._convolution_transpose_pointwise(x, weight, bias, conv.padding, conv.output_padding, *where, *then)
    else:
        y = ops._convolution_pointwise(x, weight, bias, conv.padding, *where, *then)
    return y


def _has_onednn(x: Tensor) -> bool:
    """True if oneDNN convolves this tensor and can apply what follows; these ops are what torch.compile calls."""
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
        and x.is_contiguous(memory_format=torch.channels_last_3d)  # it refuses others, if there is a residual
    )
