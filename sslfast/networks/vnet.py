"""V-Net, and its decoder on a 3D ResNet-34 encoder: the two networks of arXiv 2311.12617.

Milletari et al., V-Net (3DV 2016); He et al., Deep residual learning (CVPR 2016).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sslfast.networks.conv_norms import ConvNorms
from sslfast.networks.norm_act import NormAct
from sslfast.ops.linear_logits import LinearLogits, Logits, linear_logits
from sslfast.ops.recomputation import recompute_activations
from sslfast.options import Norm, Triple

LARGE = 2**23
"""Numbers in a full-resolution activation of a batch that is evaluated patch by patch."""


class GuardedConv3d(nn.Conv3d):
    """A convolution that, on a CPU, does not autocast inputs whose first spatial axis has size 2.

    For them oneDNN's bfloat16 weight gradient (seen in v3.12) reads uninitialised memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[2] == 2:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.to(self.weight.dtype))
        return super().forward(x)


class SameConv3d(GuardedConv3d):
    """A convolution of an odd kernel that keeps the grid size, or halves it along axes of stride 2."""

    def __init__(self, inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__(inputs, outputs, kernel, stride, (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2), bias=False)


def kernels(strides: Sequence[Triple]) -> list[Triple]:
    """The kernel size of each stage: 3, but 1 along an axis up to the stage before the first that halves it.

    There, voxels are longer along this axis than along the others. The last stage has 3 along each.
    """
    begins = [next((i for i, stride in enumerate(strides) if stride[axis] > 1), len(strides)) for axis in range(3)]
    sizes = ([3 if stage >= begin else 1 for begin in begins] for stage in range(len(strides) + 1))
    return [(x, y, z) for x, y, z in sizes]


def check_grid(images: Tensor, factors: Sequence[int]) -> None:
    """Raises ValueError if an axis of images [N, channels, D, H, W] is not a multiple of its factor."""
    if any(size % factor for size, factor in zip(images.shape[2:], factors, strict=True)):
        wanted = ", ".join(map(str, factors))
        raise ValueError(f"images has shape {tuple(images.shape)}; D, H and W must be multiples of {wanted}")


def conv_block(inputs: int, outputs: int, convs: int, norm: Norm, kernel: Triple) -> ConvNorms:
    """`convs` times convolution, normalisation, ReLU."""
    widths = [inputs, *[outputs] * convs]
    layers = [(SameConv3d(i, o, kernel), NormAct(o, norm)) for i, o in zip(widths, widths[1:], strict=False)]
    return ConvNorms(*(module for layer in layers for module in layer))


class ResidualBlock(nn.Module):
    """ResNet's basic block in 3D; a stride of 2 halves the grid along its axis."""

    def __init__(self, inputs: int, outputs: int, norm: Norm, kernel: Triple, stride: Triple = (1, 1, 1)) -> None:
        super().__init__()
        self.body = ConvNorms(
            SameConv3d(inputs, outputs, kernel, stride),
            NormAct(outputs, norm),
            SameConv3d(outputs, outputs, kernel),
            NormAct(outputs, norm),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != (1, 1, 1) or inputs != outputs:
            self.shortcut = ConvNorms(
                nn.Conv3d(inputs, outputs, 1, stride, bias=False), NormAct(outputs, norm, relu=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.body(x, residual=self.shortcut(x)))


class Encoder(nn.Module):
    """Returns the output of every stage. `stages[0]` keeps the grid size, further stages halve axes of it."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class Decoder(nn.Module):
    """Doubles the halved axes at each stage, adds the encoder's output of that size, and convolves. Empties `skips`."""

    def __init__(self, widths: Sequence[int], norm: Norm, strides: Sequence[Triple]) -> None:
        super().__init__()
        # (deep, shallow, stride, kernel), from the bottom up
        rises = [*zip(widths[1:], widths[:-1], strides, kernels(strides)[:-1], strict=True)][::-1]
        self.rise = nn.ModuleList(
            ConvNorms(nn.ConvTranspose3d(deep, shallow, stride, stride, bias=False), NormAct(shallow, norm))
            for deep, shallow, stride, _ in rises
        )
        self.blocks = nn.ModuleList(
            conv_block(shallow, shallow, min(3, len(rises) - i), norm, kernel)
            for i, (_, shallow, _, kernel) in enumerate(rises)
        )

    def forward(self, skips: list[Tensor]) -> Tensor:
        x = skips.pop()
        for rise, block in zip(self.rise, self.blocks, strict=True):
            x = rise(x, skip=skips.pop())  # whose memory is free from here on
            x = block(x)
        return x


class EncoderDecoder(nn.Module):
    """Encoder, decoder and a 1x1x1 classifier; returns logits and the features before dropout and classifier.

    Args:
        encoder: see `Encoder`.
        widths: channels of each stage.
        strides: strides along the axes of each stage after the first, 1 or 2.
        num_classes: C.
        dropout: rate of Dropout3d at the bottleneck and before the classifier.
        norm: "batch", "sync-batch" (see `NormAct`) or "instance".
        checkpointing: recompute the convolutions at full resolution in the backward pass instead of keeping their
            outputs: less memory, the same gradients, a little more time.
    """

    def __init__(
        self,
        encoder: Encoder,
        widths: Sequence[int],
        strides: Sequence[Triple],
        num_classes: int,
        dropout: float,
        norm: Norm,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.width = widths[0]
        self.factors = tuple(math.prod(along) for along in zip(*strides, strict=True))
        """What the axes of the input must be multiples of."""
        self.encoder = encoder
        self.decoder = Decoder(widths, norm, strides)
        self.dropout = nn.Dropout3d(dropout)
        self.classifier = nn.Conv3d(widths[0], num_classes, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor, linear: bool = False) -> tuple[Logits, Tensor]:
        """Logits [N, C, D, H, W] and features [N, width, D, H, W] of images [N, channels, D, H, W].

        Args:
            linear: return `LinearLogits`, which are not stored, for the losses of `sslfast.ops`.

        Raises:
            ValueError: an axis is not a multiple of its factor.
        """
        check_grid(images, self.factors)
        if self.goes_patch_by_patch(images):
            logits, parts = zip(*(self._compute(patch, linear) for patch in images.split(1)), strict=True)
            features = torch.cat(parts)
            if linear:
                return LinearLogits(features, torch.cat([part.weights for part in logits])), features
            return torch.cat(logits), features
        return self._compute(images, linear)

    def goes_patch_by_patch(self, images: Tensor) -> bool:
        """True in evaluation, for large patches on a CPU: it computes the same and takes less memory."""
        return (
            len(images) > 1
            and images.device.type == "cpu"
            and images[:, 0].numel() * self.width >= LARGE
            and not self.training
            and not torch.compiler.is_compiling()
        )

    def _compute(self, images: Tensor, linear: bool) -> tuple[Logits, Tensor]:
        for layers in (self.encoder.stages[0], self.decoder.rise[-1], self.decoder.blocks[-1]):  # at full resolution
            cast(ConvNorms, layers).recomputes = self.checkpointing
        with recompute_activations(max_depth=4 if self.checkpointing else 2):
            skips = self.encoder(images)
            skips[-1] = self.dropout(skips[-1])
            features = self.decoder(skips)
        if linear:
            return linear_logits(self.classifier, features, self.dropout), features
        return self.classifier(self.dropout(features)), features


class VNet(EncoderDecoder):
    """V-Net: strided convolutions down, transposed convolutions up, skip connections added.

    Args:
        num_classes: C.
        in_channels: channels of the images.
        width: channels of the first stage; each further stage doubles them.
        depth: number of stages, 2 to 6.
        strides: strides along D, H, W of each stage after the first, 1 or 2; None: 2 along each. Before the first
            stage that halves an axis, kernels have size 1 along it.
        dropout: rate of Dropout3d at the bottleneck and before the classifier.
        norm: "instance"; "batch", as published; or "sync-batch" (see `NormAct`). Unlabelled volumes that differ from
            the labelled ones spoil the averages of batch normalisation, except with `forward_apart`.
        checkpointing: recompute the convolutions at full resolution in the backward pass.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 1,
        width: int = 16,
        depth: int = 5,
        strides: Sequence[Triple] | None = None,
        dropout: float = 0.5,
        norm: Norm = "instance",
        checkpointing: bool = False,
    ) -> None:
        widths, strides = _stages(width, depth, strides)
        sizes = kernels(strides)
        stages: list[nn.Module] = [conv_block(in_channels, width, 1, norm, sizes[0])]
        for i, (shallow, deep) in enumerate(zip(widths, widths[1:], strict=False)):
            down = nn.Conv3d(shallow, deep, strides[i], strides[i], bias=False), NormAct(deep, norm)
            stages.append(ConvNorms(*down, *conv_block(deep, deep, min(3, i + 2), norm, sizes[i + 1])))
        super().__init__(Encoder(stages), widths, strides, num_classes, dropout, norm, checkpointing)


class ResVNet(EncoderDecoder):
    """V-Net's decoder on a 3D ResNet encoder. Depth 5 gives ResNet-34's [3, 4, 6, 3] basic blocks after a stem at full
    resolution.

    Args: as `VNet`.
    """

    BLOCKS = (3, 4, 6, 3, 3)

    def __init__(
        self,
        num_classes: int,
        *,
        in_channels: int = 1,
        width: int = 16,
        depth: int = 5,
        strides: Sequence[Triple] | None = None,
        dropout: float = 0.5,
        norm: Norm = "instance",
        checkpointing: bool = False,
    ) -> None:
        widths, strides = _stages(width, depth, strides)
        first, *sizes = kernels(strides)
        stages: list[nn.Module] = [conv_block(in_channels, width, 1, norm, first)]
        for shallow, deep, blocks, kernel, stride in zip(widths, widths[1:], self.BLOCKS, sizes, strides, strict=False):
            stages.append(
                nn.Sequential(
                    ResidualBlock(shallow, deep, norm, kernel, stride),
                    *(ResidualBlock(deep, deep, norm, kernel) for _ in range(blocks - 1)),
                )
            )
        super().__init__(Encoder(stages), widths, strides, num_classes, dropout, norm, checkpointing)


def _stages(width: int, depth: int, strides: Sequence[Triple] | None) -> tuple[list[int], list[Triple]]:
    """The channels of each stage, and the strides of each after the first."""
    if width < 1 or not 2 <= depth <= 6:
        raise ValueError(f"width is {width} and depth {depth}; width must be 1 or more, and depth 2 to 6")
    given = [(2, 2, 2)] * (depth - 1) if strides is None else [(x, y, z) for x, y, z in strides]
    if len(given) != depth - 1 or not {n for stride in given for n in stride} <= {1, 2}:
        raise ValueError(f"strides is {strides}; with depth {depth} it must be {depth - 1} triples of 1 or 2")
    return [width * 2**i for i in range(depth)], given
