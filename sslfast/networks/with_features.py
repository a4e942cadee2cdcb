"""A wrapper with which any network returns (logits, features)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sslfast.ops.check import described


class Call(NamedTuple):
    """One call of a module in the first forward pass."""

    name: str
    module: nn.Module
    inputs: Tensor  # [N, channels, *spatial], as the outputs
    outputs: Tensor
    number: int  # of the calls of this module, from 0


class WithFeatures(nn.Module):
    """Wraps a network that returns logits so that it also returns the input of its classifier.

        network = WithFeatures(monai.networks.nets.UNet(3, 1, 2, (16, 32, 64), (2, 2)))
        logits, features = network(images)

    The first forward pass finds the classifier, by following the logits back to the layer that made them from another
    number of channels. Layers after it that keep the number of channels belong to the classifier. So the features of
    MONAI's `VNet`, which ends in two convolutions, are the input of the first of them. Those of its
    `UNet(num_res_units=2)` are the input of the last transposed convolution, before the residual unit; they have half
    the resolution and are interpolated. If the features are as wide as there are classes, an earlier layer is found;
    `classifier` chooses another.

    Before `torch.compile(fullgraph=True)`, call it once, or name the classifier.

    Args:
        network: returns logits [N, C, D, H, W], or a sequence or a dict whose first value is the logits, or logits of
            several depths stacked [N, S, C, D, H, W], as MONAI's `DynUNet` does, of which the first are taken.
        classifier: the name of the classifier among `network.named_modules()`. None: it is found.

    Raises:
        TypeError: the network is no module; in the forward pass, it returns no logits.
        ValueError: no module of that name, or no 3D convolution in the network.
        RuntimeError: in the forward pass, if the classifier is not found, did not run, or has no features at voxels.
    """

    def __init__(self, network: nn.Module, classifier: str | None = None) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"network is {described(network)}; it must be an nn.Module")
        convolutions = [
            name for name, module in network.named_modules() if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d))
        ]
        if not convolutions:
            raise ValueError(f"{type(network).__name__} has no 3D convolution; name its classifier")
        self.network = network
        self.classifier: str | None = None  # its name, once it is known
        self._number = -1  # which of the calls of the classifier makes the logits; -1: the last
        self._features: tuple[Tensor, ...] = ()
        if classifier is not None:
            if not classifier or classifier not in dict(network.named_modules()):
                raise ValueError(
                    f"{type(network).__name__} has no module {classifier!r}; "
                    f"its convolutions are {', '.join(convolutions)}"
                )
            self._follow(classifier)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, C, D, H, W] and features [N, K, D, H, W], which are resized to the logits' grid if needed."""
        self._features = ()
        if self.classifier is None:
            if torch.compiler.is_compiling():
                raise RuntimeError("the classifier is not known yet; call the network once before it is compiled")
            logits = self._find(images)
        else:
            logits = self._logits(images)
        features, self._features = self._features, ()
        if not features:
            raise RuntimeError(f"the classifier {self.classifier!r} did not run in the forward pass; name another one")
        chosen = features[self._number]
        if chosen.ndim != logits.ndim or len(chosen) != len(logits):
            raise RuntimeError(
                f"the input of the classifier {self.classifier!r} has shape {tuple(chosen.shape)}; for logits "
                f"{tuple(logits.shape)} it must be [{len(logits)}, K, D, H, W]. Name another one."
            )
        if chosen.shape[2:] != logits.shape[2:]:
            chosen = nn.functional.interpolate(chosen, logits.shape[2:], mode="trilinear", align_corners=False)
        return logits, chosen

    def _find(self, images: Tensor) -> Tensor:
        """Runs the network, finds its classifier, and returns the logits."""
        calls: list[Call] = []
        hooks = [
            module.register_forward_hook(partial(_record, calls, name), with_kwargs=True)
            for name, module in self.network.named_modules()
        ]
        try:
            logits = self._logits(images)
        finally:
            for hook in hooks:
                hook.remove()
        found = find_classifier(calls, logits)
        if found is None or _is_same(found.inputs, images):
            likely = [c.name for c in calls if _is_leaf(c.module) and c.outputs.shape[1] == logits.shape[1]]
            raise RuntimeError(
                f"no layer of {type(self.network).__name__} makes the logits that it returns from another number of "
                "channels, so that its classifier is not known. Name it, as WithFeatures(network, classifier=...); "
                f"layers with {logits.shape[1]} output channels are {', '.join(dict.fromkeys(likely)) or 'not there'}"
            )
        self._features = tuple(call.inputs for call in calls if call.module is found.module)
        self._follow(found.name)
        self._number = -1 if found.number == len(self._features) - 1 else found.number
        return logits

    def _follow(self, classifier: str) -> None:
        self.classifier = classifier
        self.network.get_submodule(classifier).register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._features = (*self._features, _channels_second(module, next(iter((*inputs, *named.values())))))

    def _logits(self, images: Tensor) -> Tensor:
        """Runs the network; the logits among what it returns."""
        returned = output = self.network(images)
        if isinstance(output, dict):
            output = [*output.values()]
        if isinstance(output, Sequence) and output and not isinstance(output, str):
            output = output[0]
        if not isinstance(output, Tensor) or output.ndim < 3:
            shape = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else described(returned)
            raise TypeError(
                f"{type(self.network).__name__} returns {shape}; it must return logits [N, C, D, H, W], or a sequence "
                "or a dict whose first value they are"
            )
        return output[:, 0] if output.ndim == images.ndim + 1 else output


def find_classifier(calls: list[Call], logits: Tensor) -> Call | None:
    """The call that makes the logits from another number of channels; None if a step to it is no module's.

    Args:
        calls: the calls of the forward pass, in the order in which they ended: those of a module's parts come before
            its own.
    """
    copies = (_trace_back(calls, call.outputs) for call in reversed(calls) if _is_copy(call.outputs, logits))
    return next((found for found in copies if found is not None), None)


def _trace_back(calls: list[Call], target: Tensor) -> Call | None:
    while True:
        made = [n for n, c in enumerate(calls) if _is_same(c.outputs, target) and not _is_same(c.inputs, target)]
        if not made:
            return None
        call = calls[made[0]]
        has_weights = next(call.module.parameters(), None) is not None
        if call.inputs.shape[1] != call.outputs.shape[1] and has_weights:
            return call if _is_leaf(call.module) else None  # else it computes something between its modules
        calls, target = calls[: made[0]], call.inputs


def _record(
    calls: list[Call], name: str, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], outputs: Any
) -> None:
    first = next(iter((*inputs, *named.values())), None)
    if isinstance(first, Tensor) and isinstance(outputs, Tensor) and first.ndim > 2 < outputs.ndim:
        number = sum(call.module is module for call in calls)
        calls.append(Call(name, module, _channels_second(module, first), _channels_second(module, outputs), number))


def _channels_second(module: nn.Module, values: Tensor) -> Tensor:
    return values.movedim(-1, 1) if isinstance(module, nn.Linear) else values


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _is_same(a: Tensor, b: Tensor) -> bool:
    """The same memory."""
    return a is b or (a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr())


def _is_copy(a: Tensor, b: Tensor) -> bool:
    """The same values, maybe in another dtype."""
    return a.shape == b.shape and (_is_same(a, b) or torch.equal(a.to(b.dtype), b))
