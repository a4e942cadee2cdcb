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


class ConvNorms(nn.Sequential):
    """One or more times convolution and `NormAct`.

    They are named 0, 1, 3, 4, ...: checkpoints have these names from when a ReLU was the third of each group.

    Without gradients and with running statistics, the normalisation is folded into the weights of the convolution, and
    oneDNN adds the residual and applies the ReLU while it writes the output.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(OrderedDict((str(i // 2 * 3 + i % 2), module) for i, module in enumerate(modules)))
        self.folded: dict[int, Folded] = {}
        self.recomputes = False
        """Within `recompute_activations`, also compute the convolutions again instead of keeping their outputs."""

    def forward(self, x: Tensor, *, residual: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """The output; the last `NormAct` takes residual and skip."""
        modules: list[Any] = list(self)
        last = len(modules) - 2
        if self.training:
            self.folded.clear()
        for i in range(0, len(modules), 2):
            conv, norm = modules[i : i + 2]
            others = {"residual": residual, "skip": skip} if i == last else {}
            if _can_fold(conv, norm):
                x = self._folded(i, conv, norm, x)(x, **others)
                continue
            convolved = conv(x)
            if self.recomputes:
                keep_recipe(convolved, _convolve, conv, _autocast_dtype(x), x)
            x = norm(convolved, **others)
        return x

    def _folded(self, index: int, conv: Convolution, norm: NormAct, x: Tensor) -> Folded:
        dtype = _autocast_dtype(x) or x.dtype
        folded = self.folded.get(index)
        if folded is None or not folded.is_of(conv, norm, dtype):
            folded = self.folded[index] = Folded(conv, norm, dtype)
        return folded


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the current autocast, or None."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _convolve(conv: nn.Module, dtype: torch.dtype | None, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        result: Tensor = conv(x)
    return result


def _can_fold(conv: nn.Module, norm: nn.Module) -> bool:
    return not (
        not isinstance(norm, NormAct)
        or norm.training
        or norm.running_mean is None
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not isinstance(conv, (nn.Conv3d, nn.ConvTranspose3d))
    )


class Folded:
    """A convolution without bias and its batch normalisation by running statistics, as one convolution with bias."""

    def __init__(self, conv: Convolution, norm: NormAct, dtype: torch.dtype) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.source = _source(conv, norm, dtype)
        self.conv = conv
        self.relu = norm.relu
        scale = norm.weight * (norm.running_var + EPS).rsqrt()
        by_output = (1, -1, 1, 1, 1) if isinstance(conv, nn.ConvTranspose3d) else (-1, 1, 1, 1, 1)
        self.weight = (conv.weight * scale.view(by_output)).to(dtype)
        self.bias = (norm.bias - norm.running_mean * scale).to(dtype)

    def is_of(self, conv: Convolution, norm: NormAct, dtype: torch.dtype) -> bool:
        """True if it was made of these tensors, and they have not changed since."""
        return self.source is not None and self.source == _source(conv, norm, dtype)

    def __call__(self, x: Tensor, residual: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """relu(conv(x) + residual) + skip"""
        x = x.to(self.weight.dtype)
        y = self._in_onednn(x, residual) if _has_onednn(x) else self._in_steps(x, residual)
        return y if skip is None else y.add_(skip)

    def _in_onednn(self, x: Tensor, residual: Tensor | None) -> Tensor:
        conv, ops = self.conv, torch.ops.mkldnn
        where = conv.stride, conv.dilation, conv.groups
        relu = "relu" if self.relu else "none"
        if isinstance(conv, nn.ConvTranspose3d):
            y = ops._convolution_transpose_pointwise(
                x, self.weight, self.bias, conv.padding, conv.output_padding, *where, relu, [], ""
            )
        elif residual is None:
            y = ops._convolution_pointwise(x, self.weight, self.bias, conv.padding, *where, relu, [], "")
        else:
            y = ops._convolution_pointwise.binary(
                x, residual.to(x.dtype), self.weight, self.bias, conv.padding, *where, "add", None,
                "relu" if self.relu else None, [], "",
            )  # fmt: skip
        result: Tensor = y
        return result

    def _in_steps(self, x: Tensor, residual: Tensor | None) -> Tensor:
        conv, transposed = self.conv, isinstance(self.conv, nn.ConvTranspose3d)
        assert not isinstance(conv.padding, str)
        with torch.autocast(x.device.type, enabled=False):
            y = torch.convolution(
                x, self.weight, self.bias, conv.stride, conv.padding, conv.dilation, transposed, conv.output_padding,
                conv.groups,
            )  # fmt: skip
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if self.relu else y


def _source(conv: Convolution, norm: NormAct, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """What a `Folded` depends on; None if changes cannot be noticed."""
    tensors = conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var
    if any(t is None or t.is_inference() for t in tensors):
        return None
    return (dtype, *((t.data_ptr(), t._version) for t in tensors if t is not None))


def _has_onednn(x: Tensor) -> bool:
    """True if oneDNN convolves this tensor and can apply what follows; these ops are what torch.compile calls."""
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and x.dtype in (torch.float32, torch.bfloat16)
    )
