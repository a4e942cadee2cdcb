"""A wrapper with which any network returns (logits, features)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class WithFeatures(nn.Module):
    """Wraps a network that returns logits so that it also returns the input of its classifier.

        network = WithFeatures(monai.networks.nets.UNet(3, 1, 2, (16, 32, 64), (2, 2)))
        logits, features = network(images)

    The classifier is the convolution defined last, unless `classifier` names it. Name it if another convolution is
    defined later, such as that of an auxiliary output.

    Args:
        network: returns logits [N, C, D, H, W], or a sequence or a dict whose first value is the logits.
        classifier: the name of the classifier among `network.named_modules()`.

    Raises:
        ValueError: no module of that name, or no 3D convolution in the network.
        RuntimeError: in the forward pass, if the classifier did not run.
    """

    def __init__(self, network: nn.Module, classifier: str | None = None) -> None:
        super().__init__()
        convolutions = [
            name for name, module in network.named_modules() if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d))
        ]
        if not convolutions:
            raise ValueError(f"{type(network).__name__} has no 3D convolution; name its classifier")
        name = classifier if classifier is not None else convolutions[-1]
        modules = dict(network.named_modules())
        if name not in modules:
            raise ValueError(
                f"{type(network).__name__} has no module {name!r}; its convolutions are {', '.join(convolutions)}"
            )
        self.network = network
        self._features: Tensor | None = None
        modules[name].register_forward_pre_hook(self._keep)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, C, D, H, W] and features [N, K, D, H, W], which are resized to the logits' grid if needed."""
        output = self.network(images)
        if isinstance(output, dict):
            output = next(iter(output.values()))
        logits = output if isinstance(output, Tensor) else output[0]
        features, self._features = self._features, None
        if features is None:
            raise RuntimeError("the classifier did not run in the forward pass; name another one")
        if features.shape[2:] != logits.shape[2:]:
            features = nn.functional.interpolate(features, logits.shape[2:], mode="trilinear", align_corners=False)
        return logits, features

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._features = inputs[0]
