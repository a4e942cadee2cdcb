"""Networks of MONAI as the trainer takes its own: (logits, features), `LinearLogits`, dropout, a checked grid."""

from __future__ import annotations

from typing import Any

from monai.networks.blocks import ADN
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn

from sslfast.networks.vnet import GuardedConv3d, check_grid, kernels
from sslfast.networks.with_features import WithFeatures
from sslfast.ops.linear_logits import Logits, linear_logits
from sslfast.options import NetworkName, NetworkOptions, Triple

RESIDUAL_BLOCKS = (1, 2, 2, 4, 4, 4)  # of SegResNet's stages; MONAI's default, and further stages as its last


class MonaiNetwork(WithFeatures):
    """A network whose classifier is a 1x1x1 convolution, called as `sslfast.networks.vnet.EncoderDecoder` is.

    Args:
        network: returns logits.
        classifier, bottleneck: names of these modules of it. Both are preceded or followed by dropout.
        options: as it was built with.
    """

    def __init__(self, network: nn.Module, classifier: str, bottleneck: str, options: NetworkOptions) -> None:
        for module in network.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = GuardedConv3d
        super().__init__(network, classifier)
        self.width = options.width
        self.factors = options.factors
        """What the axes of the input must be multiples of."""
        self.dropout = nn.Dropout3d(options.dropout)
        network.get_submodule(classifier).register_forward_pre_hook(self._drop_inputs)  # once the features are kept
        network.get_submodule(bottleneck).register_forward_hook(self._drop_outputs)

    def forward(self, images: Tensor, linear: bool = False) -> tuple[Logits, Tensor]:  # type: ignore[override]
        """Logits [N, C, D, H, W] and features [N, width, D, H, W] of images [N, channels, D, H, W].

        Args:
            linear: return `LinearLogits`, which are not stored, for the losses of `sslfast.ops`.

        Raises:
            ValueError: an axis is not a multiple of its factor.
        """
        check_grid(images, self.factors)
        logits, features = super().forward(images)
        features = features.to(logits.dtype)  # under autocast, MONAI's normalisations may return float32
        if linear:
            assert self.classifier is not None
            classifier: Any = self.network.get_submodule(self.classifier)
            return linear_logits(classifier, features, self.dropout), features
        return logits, features

    def _drop_inputs(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return self.dropout(inputs[0])

    def _drop_outputs(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self.dropout(output)


class FullResolutionUNet(UNet):
    """MONAI's `UNet` with a 1x1x1 classifier of `width` features behind its last, transposed convolution."""

    def __init__(self, num_classes: int, in_channels: int, widths: list[int], strides: Any, norm: Any) -> None:
        super().__init__(3, in_channels, widths[0], widths, strides, num_res_units=2, norm=norm)
        self.adn = ADN("NA", widths[0], act="prelu", norm=norm, norm_dim=3)
        self.classifier = nn.Conv3d(widths[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.adn(super().forward(x)))
        return logits


def build(name: NetworkName, options: NetworkOptions, num_classes: int, in_channels: int = 1) -> MonaiNetwork:
    """A freshly initialised network of MONAI; `options` have been checked."""
    norm = ("instance", {"affine": True}) if options.norm == "instance" else "batch"
    widths = [options.width * 2**stage for stage in range(options.depth)]
    network: nn.Module
    if name == "dynunet":
        ones: list[Triple] = [(1, 1, 1)]
        strides = options.strides
        network = DynUNet(
            3, in_channels, num_classes, kernels(strides), [*ones, *strides], strides, widths, norm_name=norm
        )
        return MonaiNetwork(network, "output_block.conv.conv", "bottleneck", options)
    if name == "segresnet":
        network = SegResNet(
            3, options.width, in_channels, num_classes,
            norm=norm, blocks_down=RESIDUAL_BLOCKS[: options.depth], blocks_up=(1,) * (options.depth - 1),
            upsample_mode="deconv",  # the gradient of the default, interpolation, is not reproducible on a GPU
        )  # fmt: skip
        return MonaiNetwork(network, "conv_final.2.conv", f"down_layers.{options.depth - 1}", options)
    network = FullResolutionUNet(num_classes, in_channels, widths, options.strides, norm)
    return MonaiNetwork(network, "classifier", "model" + ".1.submodule" * (options.depth - 1), options)
